"""What was written for llama.cpp, compared with transformers: the tokens of texts, and the logits of what is asked."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ptl.errors import InputError
from ptl.evaluation.llama_cpp import checked_tokens
from ptl.model import axes, checkpoint, pretrained, text_tower
from ptl.model.llama_runtime import LlamaContext, LlamaModel, Part

SERVE_ELSEWHERE = "serve this checkpoint with transformers or vLLM"
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
    "The train leaves at 9:05 and arrives at 11:50, so the journey takes 2 hours and 45 minutes.",
    "SELECT name, COUNT(*) FROM orders WHERE price >= 10.50 GROUP BY name; -- 3 rows",
)
# What few prompts have in them, and common tokenizers do in another way than llama.cpp: differences are noted.
RARE_TEXTS = (" 7 left", "so{eos}7", "{eos} so", "Zoe\u0308", "नमस्ते", "ΑΒΓ ŞIĞ")

# Of logits: root mean square of the differences over that of the logits, in a mixture of experts of the median token's.
# llama.cpp keeps keys and values in 16 bits: equal models of 32 bits differ by about .001, and by .028 and more where
# one of them computes something else.
TOLERANCE_32 = 0.005
TOLERANCE_16 = 0.1  # where weights or activations have 16 bits

# The small model: what a layer does depends on the other fields of its config, which stay.
NEURONS = 64
VOCABULARY = 256
WINDOW = 8  # tokens of sliding attention, which then matters in short texts
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def compare_tokens(vocabulary: Path, tokenizer: Any, names: Sequence[str]) -> tuple[str, list[str]]:
    """(pre-tokenizer, notes): with which llama.cpp gives the tokens of `tokenizer` for every text compared.

    `vocabulary` is a GGUF file with the tokenizer's vocabulary. `names` are the pre-tokenizers to try; empty where the
    file has the right one, which then is "". Raises InputError with a text and both lists of tokens where they differ.
    The notes name rare texts whose tokens differ, and characters that are dropped.
    """
    problems = []
    for name in names or [""]:
        try:  # also a name that this llama.cpp does not have, or has for other vocabularies
            model = LlamaModel(vocabulary, vocabulary_only=True, pre_tokenizer=name)
            return name, _compare_texts(model, tokenizer)
        except InputError as error:
            problems.append(error.problem)
    raise InputError(
        f"llama.cpp would not run this tokenizer as transformers does: {problems[0]}",
        field="export",
        remedy=f"{SERVE_ELSEWHERE}; one of SentencePiece needs its published tokenizer.model beside tokenizer.json, "
        "without which the converter loses the order of merges",
    )


def _compare_texts(model: LlamaModel, tokenizer: Any) -> list[str]:
    if model.lacks_bytes():
        raise InputError(
            "the vocabulary has no tokens of bytes (byte_fallback), without which llama.cpp ends the process at the "
            "first character that it does not know",
            field="export",
        )
    notes: list[str] = []
    for text in TEXTS:
        if _is_known(tokenizer, text):
            checked_tokens(model, tokenizer, text, special=True)
        elif not notes:
            notes.append(
                f"llama.cpp drops characters for which the tokenizer has {tokenizer.unk_token}"
            )
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
        return str(
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, TypeError, ValueError):  # several templates by name have no default
        return ""


def small_sequences() -> list[list[int]]:
    """Four sequences of 256 tokens of the small model, for `compare_logits`."""
    generator = random.Random(0)
    return [generator.choices(range(3, VOCABULARY), k=256) for _ in range(4)]


def compare_logits(file: Path, src: Path, sequences: Iterable[Sequence[int]], bits: int) -> None:
    """Raise InputError where the GGUF file has other logits than its checkpoint `src` for these sequences of tokens.

    `bits` are those of the file's weights. The checkpoint is loaded in its own dtype.
    """
    import torch

    runtime = LlamaModel(file)
    model = pretrained.causal_lm(src, field="export").eval()
    is_exact = bits == 32 and model.dtype == torch.float32
    differences, squares = [], []
    for tokens in sequences:
        with torch.inference_mode():
            here = model(torch.tensor([tokens])).logits[0].double()  # [tokens, vocabulary]
        logits = LlamaContext(runtime, 1, len(tokens)).append([Part(0, tokens, len(tokens))])
        there = torch.from_numpy(logits).double()
        # The converter may leave out tokens that the tokenizer does not have.
        size = min(there.shape[-1], here.shape[-1])
        there, here = there[:, :size], here[:, :size]
        # The same number may be added to all logits of a token.
        there, here = there - there.mean(-1, keepdim=True), here - here.mean(-1, keepdim=True)
        differences.append((there - here).square().sum(-1))  # [tokens]
        squares.append(here.square().sum(-1))
    of_tokens = torch.cat(differences)
    # Of two experts with nearly the same score rounding chooses: a few tokens then differ, and those that read them.
    is_mixture = getattr(model.config, "num_experts_per_tok", None)
    difference = of_tokens.median() if is_mixture else of_tokens.mean()
    share = float(difference / torch.cat(squares).mean()) ** 0.5
    if not share <= (TOLERANCE_32 if is_exact else TOLERANCE_16):  # also where it is no number
        raise InputError(
            f"llama.cpp would not compute what transformers does for this config.json (model_type "
            f"{model.config.model_type}): the logits differ by {share:.1%}",
            field="export",
            remedy=f"{SERVE_ELSEWHERE}; where layers were removed, prune neurons instead",
        )


def write_small(src: Path, dst: Path, narrow: bool = False) -> Path:
    """Write a random model with the config of `src`, but narrow, and without its tokenizer, to `dst`; returns that.

    It has all the layers, one or two heads in each, few neurons, experts and tokens, and windows shorter than
    `small_sequences`; its weights have 32 bits. `narrow`: its hidden size is not that of its heads together, as if it
    had been pruned. Of `src` only config.json is read, and headers of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    content = text_tower.read_config(src)
    config = pretrained.config_with_defaults(content)
    content |= _small_sizes(config) | (_narrow_sizes(config) if narrow else {})
    dst.mkdir(parents=True)
    checkpoint.write_json(dst / "config.json", content)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(pretrained.config(dst, "export"), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # those of norms stay near what they are
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(dst)
    # As the user's is, with what that leaves out: the converter has defaults of its own.
    checkpoint.write_json(dst / "config.json", content)
    # Of Gemma 3 the converter counts its entries.
    vocabulary = {f"<{token}>": token for token in range(VOCABULARY)}
    checkpoint.write_json(
        dst / "tokenizer.json", {"model": {"vocab": vocabulary}, "added_tokens": []}
    )
    return dst


def _narrow_sizes(config: Any) -> dict[str, Any]:
    """Of the small model, where its hidden size is pruned: `head_dim` is written out, as pruning does."""
    size, of_head = axes.head_size(config), config.hidden_size // config.num_attention_heads
    of_head = size * 3 // 4 if of_head == size else of_head
    return {"head_dim": size, "hidden_size": of_head * _small_heads(config)}


def _small_heads(config: Any) -> int:
    """Query heads of the small model, which share their keys."""
    return min(2, int(config.num_attention_heads // axes.kv_heads(config)))


def _small_sizes(config: Any) -> dict[str, Any]:
    heads, group = config.num_attention_heads, _small_heads(config)
    experts_per_token = getattr(config, "num_experts_per_tok", None) or 0
    groups = getattr(config, "n_group", None) or 1  # of experts
    experts = groups * (experts_per_token // groups + 2)
    sizes = {
        "num_attention_heads": group,
        "num_key_value_heads": 1,
        "hidden_size": config.hidden_size // heads * group,
        "vocab_size": VOCABULARY,
        "pad_token_id": None,
        **{field: NEURONS for field in WIDTHS if hasattr(config, field)},
        **{field: experts for field in EXPERT_COUNTS if hasattr(config, field)},
    }
    # layers that guess further tokens, which transformers leaves out
    if hasattr(config, "num_nextn_predict_layers"):
        sizes["num_nextn_predict_layers"] = 0
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        sizes["sliding_window"] = WINDOW
    return sizes
