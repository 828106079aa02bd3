"""May it be shipped? The paired verdicts of the final model in plain words, which promise no more than the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptl.config.rehearsal import is_rehearsal
from ptl.evaluation.paired import can_fall
from ptl.report import cells
from ptl.report.result import Result, dense_row, final_row
from ptl.report.result_rows import Row
from ptl.units import counted, listed

Kind = Literal["good", "bad", "unclear", "none"]  # how the pages colour it


@dataclass(frozen=True)
class Answer:
    """A verdict for a reader."""

    kind: Kind
    text: str  # without a full stop


# What a comparison says -> how it is coloured; the worst comes first in a sentence.
KINDS: dict[str, Kind] = {
    "inferior": "bad",
    "fell": "unclear",
    "unsolved": "unclear",
    "unclear": "unclear",
    "not inferior": "good",
}


def answer(result: Result) -> Answer:
    """The answer for all benchmarks together: the worst verdict comes first and gives the colour."""
    if is_rehearsal(result["settings"]):
        return Answer(
            "unclear", "Cannot be said: this was a rehearsal, with about 1 % of the work, and no number counts"
        )
    final = final_row(result)
    if final is None:
        return Answer("unclear", "Cannot be said: the final checkpoint was not scored")
    if final is dense_row(result):
        return Answer("none", "Nothing to ship: the final checkpoint is the dense model")
    # what is said -> benchmarks
    names: dict[str, list[str]] = {}
    for task in final["scores"]["tasks"]:
        said = _said(dense_pair(result, task["task"]))
        names.setdefault(said, []).append(task["task"])
    parts = [_part(result, said, names[said]) for said in KINDS if said in names]
    if "" in names:
        parts.append(f"not tested on {listed(names[''])}")
    text = "; ".join(parts)
    return Answer(_worst(set(names)), text[0].upper() + text[1:])


def dense_pair(result: Result, task: str) -> Row | None:
    """The paired comparison of the final model with the dense one on a benchmark; None without items."""
    pair: Row | None = result["paired_tasks"].get(task, {}).get("dense")
    return pair


def of_pair(pair: Row | None, reference: str) -> Answer:
    """The verdict on one benchmark, for a row of a table; `reference` names the other model: `the dense model`."""
    if pair is None:
        return Answer("unclear", "Not tested")
    items = counted(pair["items"], "item")
    margin = cells.margin(pair)
    words = {
        "inferior": "Worse",
        "fell": f"Fell; whether by more than {margin} cannot be said with {items}",
        "unsolved": f"Cannot be said: {reference} solves {solved(pair)}",
        "unclear": f"Cannot be said with {items}",
        "not inferior": f"Not worse within the margin of {margin}",
    }
    said = _said(pair)
    return Answer(KINDS[said], words[said])


def _said(pair: Row | None) -> str:
    """The verdict of a comparison, empty where there is none.

    Of the unclear ones, `fell` is one where only the size of the fall is unclear, `unsolved` one where the reference
    solves too few items to fall by more than the margin.
    """
    if pair is None:
        return ""
    if pair["verdict"] == "unclear" and pair["p_worse"] <= pair["alpha"]:
        return "fell"
    # A significant improvement is one all the same.
    if not can_fall(pair["reference"], pair["margin"]) and pair["low"] <= 0:
        return "unsolved"
    return str(pair["verdict"])


def is_unsolved(pair: Row) -> bool:
    """Whether the reference solves too few items of a benchmark for any verdict."""
    return _said(pair) == "unsolved"


def solved(pair: Row) -> str:
    """How many items the reference solves: `none of 500 items`."""
    number = round(pair["reference"] * pair["items"])
    return f"{f'{number:,}' if number else 'none'} of {counted(pair['items'], 'item')}"


def _part(result: Result, said: str, names: list[str]) -> str:
    """The part of the sentence that says the same of these benchmarks."""
    pairs = [dense_pair(result, name) for name in names]
    margin = f"the margin of {cells.margin(pairs[0] or {})}"
    counts = [f"{counted(pair['items'], 'item')} of {name}" for pair, name in zip(pairs, names, strict=True) if pair]
    items = listed(counts)
    unsolved = listed([f"{solved(pair)} of {name}" for pair, name in zip(pairs, names, strict=True) if pair])
    sentences = {
        "inferior": f"worse than the dense model on {items}",
        "fell": f"the score fell on {items}, and whether by more than {margin} cannot be said with so few",
        "unsolved": f"cannot be said: the dense model solves {unsolved}",
        "unclear": f"cannot be said with {items} whether the score fell by more than {margin}",
        "not inferior": f"not worse than the dense model within {margin} on {items}",
    }
    return sentences[said]


def _worst(all_said: set[str]) -> Kind:
    """One worse benchmark is enough; good is only what was tested on every benchmark."""
    if "inferior" in all_said:
        return "bad"
    return "good" if all_said == {"not inferior"} else "unclear"
