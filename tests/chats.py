"""Chat templates that trl ships, on the tokenizer of the tiny reasoner with the tokens of such a model."""

from pathlib import Path

import trl
from checkout import DENSE, EXAMPLE
from transformers import AutoTokenizer

THINKER = EXAMPLE / "thinker"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TURN_ENDS = {
    "qwen3": "<|im_end|>",
    "deepseek_r1_distill": "<\uff5cend\u2581of\u2581sentence\uff5c>",
}
TOKENS = [
    "<|im_start|>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<think>",
    "</think>",
    *TURN_ENDS.values(),
]


def tokenizer_with(template):
    """A tokenizer with the template of that name; None: without one."""
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    tokenizer.add_tokens(TOKENS)
    tokenizer.eos_token = TURN_ENDS["qwen3"]
    tokenizer.chat_template = template and (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer
