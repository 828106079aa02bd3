"""May it be shipped? The paired verdicts of the final model in plain words, which promise no more than the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptl.config.rehearsal import is_rehearsal
from ptl.report import cells
from ptl.report.result import Result, dense_row, final_row
from ptl.report.result_rows import Row
from ptl.units import counted

Kind = Literal["good", "bad", "unclear", "none"]  # how the pages colour it


@dataclass(frozen=True)
class Answer:
    """A verdict for a reader."""

    kind: Kind
    text: str  # without a full stop


# The verdict of a paired comparison -> how it is coloured; the worst comes first in a sentence.
KINDS: dict[str, Kind] = {"inferior": "bad", "unclear": "unclear", "not inferior": "good"}


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
    # verdict -> benchmarks
    names: dict[str, list[str]] = {}
    for task in final["scores"]["tasks"]:
        pair = dense_pair(result, task["task"])
        verdict = pair["verdict"] if pair else ""
        names.setdefault(verdict, []).append(task["task"])
    parts = [_part(result, verdict, names[verdict]) for verdict in KINDS if verdict in names]
    if "" in names:
        parts.append(f"not tested on {_joined(names[''])}")
    text = "; ".join(parts)
    return Answer(_worst(set(names)), text[0].upper() + text[1:])


def dense_pair(result: Result, task: str) -> Row | None:
    """The paired comparison of the final model with the dense one on a benchmark; None without items."""
    pair: Row | None = result["paired_tasks"].get(task, {}).get("dense")
    return pair


def of_pair(pair: Row | None) -> Answer:
    """The verdict on one benchmark, for the table of evidence."""
    if pair is None:
        return Answer("unclear", "Not tested")
    words = {
        "inferior": "Worse",
        "unclear": f"Cannot be said with {counted(pair['items'], 'item')}",
        "not inferior": f"Not worse within the margin of {cells.margin(pair)}",
    }
    return Answer(KINDS[pair["verdict"]], words[pair["verdict"]])


def _part(result: Result, verdict: str, names: list[str]) -> str:
    """The part of the sentence that has one verdict on these benchmarks."""
    pairs = [dense_pair(result, name) for name in names]
    margin = cells.margin(pairs[0] or {})
    counts = [f"{counted(pair['items'], 'item')} of {name}" for pair, name in zip(pairs, names, strict=True) if pair]
    if verdict == "inferior":
        return f"worse than the dense model on {_joined(counts)}"
    if verdict == "unclear":
        return f"cannot be said with {_joined(counts)} whether it is worse than the dense model (margin {margin})"
    return f"not worse than the dense model within the margin of {margin} on {_joined(counts)}"


def _worst(verdicts: set[str]) -> Kind:
    """One worse benchmark is enough; good is only what was tested on every benchmark."""
    if "inferior" in verdicts:
        return "bad"
    return "good" if verdicts == {"not inferior"} else "unclear"


def _joined(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
