"""Whether llama.cpp gives the tokens of a checkpoint's tokenizer, found by comparing them."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptl.errors import InputError
from ptl.evaluation.gguf import checked_tokens
from ptl.model.llama_runtime import LlamaModel

# How llama.cpp may split text before byte-level BPE (llm_tokenizer_bpe in src/llama-vocab.cpp), common ones first. Its
# converter knows which one a published tokenizer needs; for any other the first is taken that gives the same tokens.
PRE_TOKENIZERS = (
    "gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o", "deepseek-llm", "deepseek-v3",
    "deepseek-coder", "falcon", "bloom", "viking", "chameleon", "superbpe", "bailingmoe", "seed-coder", "qwen35",
)  # fmt: skip
NUM_RANDOM_TEXTS = 300
MAX_TOKENS = 24  # of a random text
# What prompts and answers may have in them: each is compared with the tokens at its ends, as BOS.
TEXTS = (
    "",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.\nHow many?\n",
    "Q: 1234567 + 89 = ?\nA: 1,234,656. So 3.14 * 2 ** 10 / 7 != 459.9 (approximately)\n#### 10\n",
    "HELLO World, McDonald's iPhone: ASAP",
    "\n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \na\r\nb  c   d    \n",
    "def f(x):\n    if x <= 0:\n\t\treturn [x_1, {'k': \"v\"}]\n    return f(x - 1)  # f'(x)\n",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it. WE'LL SEE; they'd say so, don't they?",
    "on Monday and  2/5 more on   Tuesday,\t 7 left\n 8 and    9.5\n",
    "Step 1: Let $x^2 + y_{10} \\le \\frac{3}{4}$. Then... ------=======!!!!?? <think>\n\nHmm,</think> **Answer:** 7%",
    "Zoë naïvely paid 3 € for crêpes; Größe: 10 m. ¿Qué tal?",
    "2½ m², \ufb01ne, № 5, \uff11\uff12, x\u00a0y",  # characters of compatibility
    "Привет, как дела? αβγ",
    "你好\uff0c世界1234。こんにちは 안녕하세요 مرحبا",
    "🚀 ✅ 🇫🇷",
)
# What few prompts have in them, and common tokenizers do in another way than llama.cpp: differences are noted.
RARE_TEXTS = (" 7 left", "so{eos}7", "{eos} so", "Zoe\u0308", "नमस्ते", "ΑΒΓ ŞIĞ")


def compare(vocabulary: Path, tokenizer: Any, known: bool) -> tuple[str, list[str]]:
    """(pre-tokenizer, notes): with which llama.cpp gives the tokens of `tokenizer` for every text compared.

    `vocabulary` is a GGUF file with the tokenizer's vocabulary. `known`: it names the pre-tokenizer, which is empty
    then, if llama.cpp has one for this kind at all. Raises InputError with a text and both lists of tokens where they
    differ. The notes name rare texts whose tokens differ, and characters that are dropped.
    """
    texts = list(TEXTS) if known else [*TEXTS, *_random_texts(tokenizer)]
    problems = []
    for name in ("",) if known else PRE_TOKENIZERS:
        try:  # also a name that this llama.cpp does not have, or has for other vocabularies
            return name, _compare_texts(
                LlamaModel(vocabulary, vocabulary_only=True, pre_tokenizer=name), tokenizer, texts
            )
        except InputError as error:
            problems.append(error.problem)
    raise InputError(
        f"llama.cpp would not run this tokenizer as transformers does: {problems[0]}",
        field="export",
        remedy="serve this checkpoint with transformers or vLLM; one of SentencePiece needs its published "
        "tokenizer.model beside tokenizer.json, without which the converter loses the order of merges",
    )


def _compare_texts(model: LlamaModel, tokenizer: Any, texts: list[str]) -> list[str]:
    if model.lacks_bytes():
        raise InputError(
            "the vocabulary has no tokens of bytes (byte_fallback), without which llama.cpp ends the process at the "
            "first character that it does not know",
            field="export",
        )
    notes: list[str] = []
    for text in texts:
        if _is_known(tokenizer, text):
            checked_tokens(model, tokenizer, text, special=True)
        elif not notes:
            notes.append(f"llama.cpp drops characters for which the tokenizer has {tokenizer.unk_token}")
    checked_tokens(model, tokenizer, _chat(tokenizer), special=False)
    for text in RARE_TEXTS:
        try:
            if _is_known(tokenizer, text):
                checked_tokens(model, tokenizer, text.format(eos=tokenizer.eos_token), special=True)
        except InputError as error:
            notes.append(error.problem)
    return notes


def _is_known(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer has tokens for all characters."""
    return tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)


def _chat(tokenizer: Any) -> str:
    """A question as the tokenizer's template writes it; empty where there is none, or it does not take a question."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return ""
    try:
        question = [{"role": "user", "content": "Tom has 12."}]
        return str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):  # several templates by name have no default
        return ""


def _random_texts(tokenizer: Any) -> Iterator[str]:
    """Texts of random tokens: word ends, spaces and signs in every neighbourhood that the vocabulary allows."""
    special = set(tokenizer.all_special_ids)
    tokens = [token for token in range(len(tokenizer)) if token not in special]
    generator = random.Random(0)
    for _ in range(NUM_RANDOM_TEXTS):
        chosen = generator.choices(tokens, k=generator.randint(1, MAX_TOKENS))
        pieces = [tokenizer.decode([token]) for token in chosen]
        text = unicodedata.normalize("NFC", "".join(piece for piece in pieces if "\ufffd" not in piece))
        # What RARE_TEXTS have is left out.
        yield "".join(char for char in text if unicodedata.category(char)[0] != "M").strip(" ")
