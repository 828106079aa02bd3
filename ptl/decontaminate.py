"""Training rows that share text with a benchmark: overlap of word n-grams, as for GPT-3 (2005.14165, appendix C)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptl.config import DataSource, Decontaminate
from ptl.sources import bare, read_rows, texts

WORD = re.compile(r"\w+")
EXAMPLES = 5  # dropped rows that the report quotes
TEMPLATE_ITEMS = 20  # from so many items on, the words that all prompts of a benchmark share are its template's

Words = list[str]
Gram = tuple[str, ...]


@dataclass
class Benchmark:
    """The word n-grams of one benchmark, and how many training rows were dropped for them."""

    items: int
    grams: frozenset[Gram]
    dropped: int = 0


@dataclass
class Filter:
    """Says which rows to leave out, and counts them."""

    ngram: int
    benchmarks: dict[str, Benchmark]
    not_compared: tuple[str, ...] = ()  # benchmarks whose items are not known here
    dropped: int = 0
    examples: list[str] = field(default_factory=list)
    seen: dict[tuple[DataSource, int], bool] = field(default_factory=dict)

    def keeps(self, source: DataSource, number: int, row: Any) -> bool:
        """Whether a training row stays. A row that comes up again, after an epoch, is counted once."""
        key = (source, number)  # not by name alone: a hub id has several subsets and splits
        if key not in self.seen:
            prompt, completion = texts(row, bare(source), number)
            grams = _grams(_words(prompt or completion), _words(completion), self.ngram)
            leaked = [each for each in self.benchmarks.values() if not each.grams.isdisjoint(grams)]
            for each in leaked:
                each.dropped += 1
            self.seen[key] = not leaked
            if leaked:
                self.dropped += 1
                if len(self.examples) < EXAMPLES:
                    self.examples.append(f"{source.source} row {number}: {(prompt or completion).strip()[:200]}")
        return self.seen[key]

    def report(self) -> dict[str, Any]:
        """What was dropped, for the step's facts."""
        return {
            "rows": len(self.seen),
            "dropped": self.dropped,
            "ngram": self.ngram,
            "benchmarks": {
                name: {"items": each.items, "dropped": each.dropped} for name, each in self.benchmarks.items()
            },
            "not_compared": list(self.not_compared),
            "examples": self.examples,
        }


def build(settings: Decontaminate, scored: Path | None) -> Filter | None:
    """The filter against what the settings name; None where that is nothing.

    `scored` is the folder that the run's first evaluation wrote: its items are those of `evaluate.tasks`, so that
    neither the benchmarks' data nor the harness is needed here.
    """
    if not settings.tasks and not settings.against:
        return None
    found: dict[str, Benchmark] = {}
    missing: tuple[str, ...] = ()
    if settings.tasks and scored is None:
        missing = ("evaluate.tasks",)
    elif settings.tasks and scored is not None:
        pairs = _scored(scored)
        found = {name: _benchmark(each, settings.ngram) for name, each in pairs.items()}
        told = json.loads((scored / "scores.json").read_text())["tasks"]
        missing = tuple(task["task"] for task in told if task["task"] not in pairs)
    for source in settings.against:
        plain = bare(source)
        rows = [texts(row, plain, number) for number, row in enumerate(read_rows(source), 1)]
        name = " ".join(part for part in (source.source, source.subset, source.split) if part)
        name += f" ({len(found)})" if name in found else ""  # other columns of the same rows
        found[name] = _benchmark([(prompt or completion, completion) for prompt, completion in rows], settings.ngram)
    return Filter(settings.ngram, found, missing)


def _scored(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Prompts and right answers of each task, from an evaluation's items.jsonl."""
    found: dict[str, list[tuple[str, str]]] = {}
    with (folder / "items.jsonl").open(encoding="utf-8") as lines:  # str.splitlines would split at U+2028 in a text too
        for line in lines:
            item = json.loads(line)
            found.setdefault(item["task"], []).append((item["prompt"], str(item["target"])))
    return found


def _benchmark(items: Sequence[tuple[str, str]], ngram: int) -> Benchmark:
    prompts = _without_template([_words(prompt) for prompt, _ in items])
    answers = _without_template([_words(answer) for _, answer in items])
    grams: set[Gram] = set()
    for prompt, answer in zip(prompts, answers, strict=True):
        grams |= _grams(prompt, answer, ngram)
    return Benchmark(len(items), frozenset(grams))


def _without_template(texts_: Sequence[Words]) -> list[Words]:
    """Texts without the words that all of them begin or end with (`Question: ... Answer:`)."""
    if len(texts_) < TEMPLATE_ITEMS:
        return list(texts_)
    begin = _shared(texts_)
    rest = [words[begin:] for words in texts_]
    end = _shared([words[::-1] for words in rest])
    return [words[: len(words) - end] for words in rest]


def _shared(texts_: Iterable[Words]) -> int:
    """How many words all texts begin with."""
    count = 0
    for column in zip(*texts_, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _words(text: str) -> Words:
    return WORD.findall(text.lower())


def _grams(question: Words, answer: Words, n: int) -> set[Gram]:
    """The n-grams of prompt and completion, each apart: a solution that leaked alone is a leak too.

    A question of fewer words counts as a whole. A short completion does not count: equal short answers are no leak.
    """
    whole = {tuple(question)} if 0 < len(question) < n else set()
    return whole | {tuple(words[i : i + n]) for words in (question, answer) for i in range(len(words) - n + 1)}
