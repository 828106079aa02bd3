"""Retention: how well a model still predicts text that it was neither scored nor trained on for a benchmark.

What is in no calibration text is lost first, and no benchmark of reasoning shows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.config.run import Evaluate, Gate
from ptl.errors import InputError
from ptl.evaluation.paired import RESAMPLES
from ptl.json_lines import read_json_lines

FIELD = "evaluate.retention"
PROSE = Path(__file__).with_name("retention.jsonl")  # English, written for ptl and nowhere else
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
        return math.exp(min(sum(self.losses) / sum(self.tokens), 700.0))

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
        return (self.high if strict else self.low) > limit


def texts(settings: Evaluate) -> list[str]:
    """The held-out texts. Raises InputError for a file that is no list of texts."""
    path = Path(settings.retention) if settings.retention else PROSE
    if not path.is_file():
        raise InputError(
            f"no file {path}", field=FIELD, remedy="give a .jsonl file with a column `text`, or leave it out"
        )
    found = [row.get("text") for row in read_json_lines(path, FIELD, str(path))]
    number = next((i for i, text in enumerate(found, 1) if not isinstance(text, str) or not text.strip()), 0)
    if number or len(found) < 2:
        problem = f"line {number} of {path} has no text" if number else f"{path} has a single text"
        raise InputError(problem, field=FIELD, remedy="give two or more lines, each with a column `text`")
    return [str(text) for text in found]


def measure(lm: Any, settings: Evaluate) -> TextLosses:
    """Losses of the held-out texts by the harness's model."""
    from lm_eval.api.instance import Instance

    held_out = texts(settings)
    # Without the warning of texts that are longer than the context, which the harness divides.
    ids = [lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in held_out]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(held_out)]
    likelihoods = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    return TextLosses(
        Path(settings.retention or PROSE).name,
        sum(len(text.encode()) for text in held_out),
        [len(text) for text in ids],
        [-float(likelihood) for likelihood in likelihoods],
    )


def compare(dense: TextLosses, candidate: TextLosses, alpha: float) -> Retained | None:
    """The candidate against the dense model, with a paired bootstrap over the texts; None where it knew nothing."""
    import numpy as np

    if not dense.is_known:
        return None
    tokens = np.array(dense.tokens)  # [texts]
    differences = np.array(candidate.losses) - np.array(dense.losses)  # [texts]
    drawn = np.random.default_rng(0).integers(len(tokens), size=(RESAMPLES, len(tokens)))  # [resamples, texts]
    ratios = np.exp(differences[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))  # [resamples]
    low, high = np.quantile(ratios, [alpha, 1 - alpha])
    ratio = math.exp(differences.sum() / tokens.sum())
    return Retained(
        dense.texts, len(tokens), dense.perplexity, candidate.perplexity, ratio, low=float(low), high=float(high)
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
