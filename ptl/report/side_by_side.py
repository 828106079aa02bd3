"""Answers that changed, as the pages show them: dense beside final, a handful at once and the others on request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import takewhile

from ptl.report.result import Result
from ptl.report.result_rows import Row

HANDFUL = 3  # of each kind that are shown at once
MAX_CELL = 160  # characters of a text in a Markdown table


@dataclass(frozen=True)
class Text:
    """An answer: the lines in which both models agree at its beginning, and the rest."""

    same: str
    rest: str
    truncated: bool  # by the token limit
    right: bool

    @property
    def whole(self) -> str:
        """All of it on one line, for a Markdown table."""
        return in_cell(f"{self.same} {self.rest}{' (token limit)' if self.truncated else ''}")


@dataclass(frozen=True)
class Example:
    """An item that one of the models answered right."""

    item: str  # its task, where the run has several, and its id
    prompt: str
    target: str
    dense: Text
    final: Text


@dataclass(frozen=True)
class Kind:
    """Regressions or improvements."""

    title: str
    count: int  # of the run, of which the result has the first ones
    first: list[Example]
    others: list[Example]


def kinds(result: Result) -> list[Kind]:
    """Regressions first; a kind without an item is left out."""
    changed = result["examples"]
    if not changed:
        return []
    has_several_tasks = len(result["rows"][0]["scores"]["tasks"]) > 1
    table = []
    for key, title in (("regressions", "Regressions"), ("improvements", "Improvements")):
        items = _mixed(changed[key])
        examples = [_example(item, key == "regressions", has_several_tasks) for item in items]
        if examples:
            table.append(Kind(title, changed[f"num_{key}"], examples[:HANDFUL], examples[HANDFUL:]))
    return table


def _mixed(items: list[Row]) -> list[Row]:
    """The first item of each task, then the second of each, so that a handful has something of every task."""
    counts: Counter[str] = Counter()
    positions = []
    for item in items:
        positions.append(counts[item["task"]])
        counts[item["task"]] += 1
    order = sorted(range(len(items)), key=positions.__getitem__)
    return [items[index] for index in order]


def in_cell(text: str) -> str:
    """A text on one line, shortened."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_CELL else line[:MAX_CELL] + " […]"


def _example(item: Row, regression: bool, name_task: bool) -> Example:
    before = item["before"].strip().splitlines()
    after = item["after"].strip().splitlines()
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    num_same = len(list(pairs))
    same = "\n".join(before[:num_same])
    return Example(
        item=f"{item['task']}, item {item['id']}" if name_task else f"item {item['id']}",
        prompt=item["prompt"].strip(),
        target=item["target"].strip(),
        dense=Text(same, "\n".join(before[num_same:]), item["before_truncated"], regression),
        final=Text(same, "\n".join(after[num_same:]), item["after_truncated"], not regression),
    )
