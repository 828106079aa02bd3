"""Which of llama.cpp's pre-tokenizers splits text as a checkpoint's tokenizer does, found by comparing tokens.

llama.cpp's converter knows byte-level BPE tokenizers by a hash of the tokens of one text, hence only published ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptl.errors import InputError
from ptl.model.llama_runtime import LlamaModel

# One name for each way of splitting (llm_tokenizer_bpe in src/llama-vocab.cpp), the simple and common ones first.
NAMES = (
    "gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o", "deepseek-llm", "deepseek-v3",
    "deepseek-coder", "falcon", "bloom", "viking", "chameleon", "superbpe", "bailingmoe", "seed-coder", "qwen35",
)  # fmt: skip
NUM_RANDOM_TEXTS = 300
MAX_PIECES = 24  # tokens of which a random text is made
TEXTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.\nHow many?\n",
    "Q: 1234567 + 89 = ?\nA: 1,234,656. So 3.14 * 2 ** 10 / 7 != 459.9 (approximately)\n#### 10\n",
    "\n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \na\r\nb  c   d    \n",
    "def f(x):\n    if x <= 0:\n\t\treturn [x_1, {'k': \"v\"}]\n    return f(x - 1)  # f'(x)\n",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it. WE'LL SEE; they'd say so, don't they?",
    "on Monday and  2/5 more on   Tuesday,\t 7 left\n 8 and    9.5\n",
    "Step 1: Let $x^2 + y_{10} \\le \\frac{3}{4}$. Then... ------=======!!!!?? <think>\n\nHmm,</think> **Answer:** 7%",
    "Zoë naïvely paid 3 € for 2½ crêpes; Größe: 10 m². ¿Qué tal? Привет, как дела?",
    "你好\uff0c世界1234。こんにちは 안녕하세요 مرحبا नमस्ते 🚀 ✅",
)


def find(vocabulary: Path, tokenizer: Any) -> tuple[str, list[str]]:
    """(name, notes) of the first pre-tokenizer that gives the tokens of `tokenizer` for every text compared.

    `vocabulary` is a GGUF file with the tokenizer's vocabulary, which may name any pre-tokenizer. Raises InputError
    where none does. Texts with characters that the tokenizer does not know are left out, and noted.
    """
    expected = {}
    notes = []
    for text in (*TEXTS, *_random_texts(tokenizer)):
        tokens = tokenizer(text).input_ids
        if tokenizer.unk_token_id in tokens:
            notes = [f"llama.cpp drops characters for which the tokenizer has {tokenizer.unk_token}"]
        else:
            expected[text] = tokens
    for name in NAMES:
        if _matches(vocabulary, name, expected):
            return name, notes
    raise InputError(
        f"llama.cpp has no pre-tokenizer that gives the tokens of this tokenizer ({len(NAMES)} compared)",
        field="export",
        remedy="serve this checkpoint with transformers or vLLM",
    )


def _matches(vocabulary: Path, name: str, expected: dict[str, list[int]]) -> bool:
    """Whether llama.cpp gives the expected tokens of every text."""
    try:
        model = LlamaModel(vocabulary, vocabulary_only=True, pre_tokenizer=name)
    except InputError:  # a name that this llama.cpp does not have, or has for other vocabularies
        return False
    return all(model.tokens(text) == tokens for text, tokens in expected.items())


def _random_texts(tokenizer: Any) -> Iterator[str]:
    """Texts of random tokens: word ends, spaces and signs in every neighbourhood that the vocabulary allows."""
    special = set(tokenizer.all_special_ids)
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer)) if token not in special]
    pieces = [piece for piece in pieces if piece and "\ufffd" not in piece]  # whole characters
    generator = random.Random(0)
    for _ in range(NUM_RANDOM_TEXTS):
        yield "".join(generator.choices(pieces, k=generator.randint(1, MAX_PIECES)))
