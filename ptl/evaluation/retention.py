"""Retention: how well a model still predicts text that it was neither scored nor trained on for a benchmark.

What is in no calibration text is lost first, and no benchmark of reasoning shows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ptl.config.run import Evaluate, Gate
from ptl.errors import InputError
from ptl.json_lines import read_json_lines

FIELD = "evaluate.retention"
PROSE = Path(__file__).with_name("retention.jsonl")  # English, written for ptl and nowhere else
LARGEST = 700.0  # nats of which a float can hold the exponential
KNOWN = 4.0  # bits for a byte; the frequencies of letters alone need as many


@dataclass(frozen=True)
class TextLosses:
    """A checkpoint on the held-out texts."""

    texts: str  # their file
    bytes: int  # of all of them
    tokens: list[int]  # of each text
    losses: list[float]  # of each text, summed over its tokens, in nats

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(min(sum(self.losses) / sum(self.tokens), LARGEST))

    @property
    def is_known(self) -> bool:
        """Whether the model predicts such text at all, so that there is something to retain."""
        return sum(self.losses) / math.log(2) / self.bytes < KNOWN


@dataclass(frozen=True)
class Retained:
    """The perplexity of held-out text, beside the dense model's."""

    texts: str
    items: int
    dense: float  # perplexity
    candidate: float
    ratio: float  # of the two
    low: float  # bound of the ratio, one-sided at alpha
    high: float

    def fails(self, limit: float, strict: bool) -> bool:
        """Whether the ratio is above the limit; with `strict` also where it is not shown to be below."""
        return not (self.high if strict else self.low) <= limit  # NaN fails


def texts(settings: Evaluate) -> list[str]:
    """The held-out texts. Raises InputError for a file that is no list of texts."""
    path = Path(settings.retention) if settings.retention else PROSE
    if not path.is_file():
        raise InputError(
            f"no file {path}",
            field=FIELD,
            remedy="give a .jsonl file with a column `text`, or leave it out",
        )
    found = [row.get("text") for row in read_json_lines(path, FIELD, str(path))]
    number = next((i for i, text in enumerate(found, 1) if not _is_text(text)), 0)
    if number or len(found) < 2:
        problem = f"row {number} of {path} has no text" if number else f"{path} has a single text"
        raise InputError(
            problem, field=FIELD, remedy="give two or more rows, each with a column `text`"
        )
    return [str(text) for text in found]


def _is_text(value: Any) -> bool:
    """Whether a tokenizer takes it: JSON can hold half of a surrogate pair (\\ud83d)."""
    return (
        isinstance(value, str)
        and bool(value.strip())
        and not any("\ud800" <= c <= "\udfff" for c in value)
    )


def measure(lm: Any, settings: Evaluate) -> TextLosses:
    """Losses of the held-out texts by the harness's model, each after what the tokenizer begins a text with.

    That is mostly BOS; where it adds nothing, the text's own first token, as behind a BOS that it has never seen a
    model predicts the rest worse. What the tokenizer adds is not scored. A window at a time, and in float32: the logits
    of a batch of whole texts need more memory than answers do, and sums in bfloat16 are whole nats.
    """
    import torch
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    held_out = texts(settings)
    dtype, lm.softmax_dtype = getattr(lm, "softmax_dtype", None), torch.float32
    counts, losses = [], []
    for text in tqdm(held_out, desc="held-out texts"):
        start, ids = _start_and_text(lm.tokenizer, text)
        # A window has room for the start of a text, although only the first begins with it.
        room = lm.max_length - len(start) + 1
        windows = [
            *map(
                make_disjoint_window, get_rolling_token_windows(ids, start[-1], room, context_len=1)
            )
        ]
        windows[:1] = [(start, scored) for _, scored in windows[:1]]
        found = [
            lm._loglikelihood_tokens([(("", ""), *window)], disable_tqdm=True) for window in windows
        ]
        counts.append(len(ids))
        losses.append(-sum(likelihood for ((likelihood, _),) in found))
    lm.softmax_dtype = dtype
    size = sum(len(text.encode()) for text in held_out)
    return TextLosses(Path(settings.retention or PROSE).name, size, counts, losses)


def _start_and_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens that a text begins with and are given, and those of the text that are scored.

    Some tokenizers add two in front ([gMASK]<sop>), and some add EOS behind.
    """
    # Without the warning of texts that are longer than the context.
    whole = tokenizer(text, verbose=False)["input_ids"]
    own = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(own) + 1)
    added = next((place for place in places if whole[place : place + len(own)] == own), 0)
    return (whole[:added], own) if added else (own[:1], own[1:])


def compare(dense: TextLosses, candidate: TextLosses, alpha: float) -> Retained | None:
    """The candidate against the dense model, paired by text; None where the dense model predicts no such text.

    The bounds are Student's, for the ratio of two sums (Cochran, Sampling Techniques, 6.4): each text's deviation from
    the common difference per token is one observation. A bootstrap of the percentiles is too narrow for some 50 texts.
    """
    import numpy as np
    from scipy import stats

    if not dense.is_known:
        return None
    tokens = np.array(dense.tokens)  # [texts]
    differences = np.array(candidate.losses) - np.array(dense.losses)  # [texts], in nats
    num_texts = len(tokens)

    mean = differences.sum() / tokens.sum()  # nats per token
    deviations = (differences - mean * tokens) / tokens.mean()  # [texts], in nats per token
    standard_error = math.sqrt((deviations**2).sum() / (num_texts - 1) / num_texts)
    margin = stats.t.ppf(1 - alpha, num_texts - 1) * standard_error
    ratio, low, high = (
        math.exp(min(nats, LARGEST)) for nats in (mean, mean - margin, mean + margin)
    )
    return Retained(
        dense.texts, num_texts, dense.perplexity, candidate.perplexity, ratio, low, high
    )


def check_gate(gate: Gate, dense: TextLosses) -> None:
    """Raise InputError for a gate that is to hold what the dense model has not."""
    if gate.retention and not dense.is_known:
        raise InputError(
            f"{gate.retention:g}, but the dense model does not predict the held-out texts: there is nothing to retain",
            field="gate.retention",
            remedy="name texts that it knows (evaluate.retention), or leave gate.retention out",
        )


def describe(retained: Retained) -> str:
    """A comparison in words."""
    return (
        f"perplexity of held-out text {retained.dense:,.4g} -> {retained.candidate:,.4g}, times {retained.ratio:.3g} "
        f"({retained.low:.3g} to {retained.high:.3g}, {retained.items} texts)"
    )
