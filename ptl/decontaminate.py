"""Training rows that share text with a benchmark: overlap of word n-grams, as for GPT-3 (2005.14165, appendix C).

An item of at least `ngram` words shares text with a row that has `ngram` of its words one after another; a shorter item
with a row that has all of its words so, whatever surrounds them. Words are compared after Unicode's NFKC normalisation
and case folding, without punctuation, so that none of these hides a copy.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptl.config import DataSource, Decontaminate
from ptl.sources import bare, read_rows, texts

# A word is a run of letters and digits; in scripts that put no spaces between words each character is one.
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphens, zero-width spaces and joiners
EXAMPLES = 5  # dropped rows that the report quotes
TEMPLATE_ITEMS = 20  # from so many items on, the words that all prompts of a benchmark share are its template's
SHORTEST = 4  # words of an item below which its words stand in too many rows by chance

Words = list[str]
Gram = tuple[str, ...]


@dataclass
class Benchmark:
    """What of a benchmark is searched for in training rows, and how many were dropped for it."""

    items: int
    short: int  # items of too few words beside the template: inside a row they are found with words of it only
    grams: frozenset[Gram]  # the n-grams of long items and answers
    inside: dict[Gram, tuple[Gram, ...]]  # short items, by their first words
    whole: frozenset[Gram]  # items that are too short to be found inside a row
    template: tuple[Gram, Gram]  # words that all prompts begin and end with
    dropped: int = 0

    def shares(self, row: RowWords) -> bool:
        """Whether a training row has text of this benchmark."""
        return (
            not self.grams.isdisjoint(row.grams)
            or any(_holds(words, self.inside) for words in row.texts)
            or any(_stripped(line, self.template) in self.whole or line in self.whole for line in row.lines)
        )


@dataclass(frozen=True)
class RowWords:
    """The words of a training row."""

    texts: list[Gram]  # as it is trained on; its columns alone too, where the templates have words of their own
    lines: list[Gram]  # the lines of its prompt, and all of it
    grams: set[Gram]  # n-grams of the texts


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
            columns, trained = texts(row, bare(source), number), texts(row, source, number)
            words = _row_words(columns, trained, self.ngram)
            leaked = [each for each in self.benchmarks.values() if each.shares(words)]
            for each in leaked:
                each.dropped += 1
            self.seen[key] = not leaked
            if leaked:
                self.dropped += 1
                if len(self.examples) < EXAMPLES:
                    shown = columns[0] or columns[1]
                    self.examples.append(f"{source.source} row {number}: {shown.strip()[:200]}")
        return self.seen[key]

    def report(self) -> dict[str, Any]:
        """What was compared and dropped, for the step's metadata; see `sentence`."""
        items = sum(each.items for each in self.benchmarks.values())
        return {
            "rows": len(self.seen) if items else 0,
            "dropped": self.dropped,
            "items": items,
            "short": sum(each.short for each in self.benchmarks.values()),
            "ngram": self.ngram,
            "benchmarks": {
                name: {"items": each.items, "short": each.short, "dropped": each.dropped}
                for name, each in self.benchmarks.items()
            },
            "not_compared": list(self.not_compared),
            "examples": self.examples,
        }


def most(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The count of most rows: each stage reads the training data from its start, and so counts what others counted."""
    return max(counts, key=lambda each: each["rows"])


def sentence(report: dict[str, Any]) -> str:
    """What a report's counts say: never that no row was left out where nothing could be compared."""
    rows, dropped, items, short = (report[name] for name in ("rows", "dropped", "items", "short"))
    parts = []
    if dropped:
        parts.append(f"{dropped:,} of {rows:,} training rows were left out: they share text with a benchmark")
    elif items > short:
        parts.append(f"None of {rows:,} training rows shares text with one of {items - short:,} benchmark items")
    if short:
        parts.append(f"{short:,} of {items:,} benchmark items have too few words to be found inside a row")
    if report["not_compared"]:
        which = ", ".join(report["not_compared"])
        parts.append(f"Training rows were not compared with {which}, whose items are not known")
    elif not items:
        parts.append("Training rows were not compared with a benchmark: there are no items")
    return ". ".join(parts) + "."


def build(settings: Decontaminate, scored: Path | None) -> Filter | None:
    """The filter against what the settings name; None where that is nothing.

    `scored` is the folder that the run's first evaluation wrote: its items are those of `evaluate.tasks`, so that
    neither the benchmarks' data nor the harness is needed here.
    """
    if not settings.tasks and not settings.against:
        return None
    benchmarks: dict[str, Benchmark] = {}
    missing: tuple[str, ...] = ()
    if settings.tasks and scored is None:
        missing = ("evaluate.tasks",)
    elif settings.tasks and scored is not None:
        pairs = _scored(scored)
        benchmarks = {name: _benchmark(each, settings.ngram) for name, each in pairs.items()}
        tasks = json.loads((scored / "scores.json").read_text())["tasks"]
        missing = tuple(task["task"] for task in tasks if task["task"] not in pairs)
    for source in settings.against:
        plain = bare(source)
        rows = [texts(_asked(row, plain), plain, number) for number, row in enumerate(read_rows(source), 1)]
        name = " ".join(part for part in (source.source, source.subset, source.split) if part)
        name += f" ({len(benchmarks)})" if name in benchmarks else ""  # other columns of the same rows
        benchmarks[name] = _benchmark(
            [(prompt or completion, completion) for prompt, completion in rows], settings.ngram
        )
    return Filter(settings.ngram, benchmarks, missing)


def _scored(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Prompts and right answers of each task, from an evaluation's items.jsonl."""
    found: dict[str, list[tuple[str, str]]] = {}
    with (folder / "items.jsonl").open(encoding="utf-8") as lines:  # str.splitlines would split at U+2028 in a text too
        for line in lines:
            item = json.loads(line)
            found.setdefault(item["task"], []).append((item["prompt"], str(item["target"])))
    return found


def _asked(row: Any, source: DataSource) -> Any:
    """A benchmark's chat without its system message, which is no part of the question."""
    chat = row.get(source.messages) if source.format == "messages" else None
    if not isinstance(chat, list):
        return row
    asked = [message for message in chat if not (isinstance(message, dict) and message.get("role") == "system")]
    return {**row, source.messages: asked}


def _benchmark(items: Sequence[tuple[str, str]], ngram: int) -> Benchmark:
    prompts, template = _without_template([_words(prompt) for prompt, _ in items])
    answers, _ = _without_template([_words(answer) for _, answer in items])
    grams = {gram for answer in answers for gram in _grams(answer, ngram)}
    known, least = len(items) >= TEMPLATE_ITEMS, min(SHORTEST, ngram)
    inside: set[Gram] = set()
    whole: set[Gram] = set()
    short = 0
    for prompt, question in zip((_words(prompt) for prompt, _ in items), prompts, strict=True):
        words = question if known else prompt
        if len(words) >= ngram:
            grams |= _grams(words, ngram)
            continue
        searched = [each for each in (words, *_widened(question, template, least)) if len(each) >= least]
        short += len(words) < least
        if question and len(prompt) >= least:
            searched.append(prompt)  # a copy may have the template's words too
        inside.update(map(tuple, searched))
        if 0 < len(words) < least:
            whole.add(tuple(words))
    starts: dict[Gram, tuple[Gram, ...]] = {}
    for each in inside:
        starts[each[:least]] = (*starts.get(each[:least], ()), each)
    return Benchmark(len(items), short, frozenset(grams), starts, frozenset(whole), template)


def _widened(question: Words, template: tuple[Gram, Gram], least: int) -> list[Words]:
    """A question without its template, and with as many of its words as are needed: some may be its own (`What is`)."""
    if len(question) < 2:
        return []
    begin, end = template
    missing = max(0, least - len(question))
    before = begin[max(0, len(begin) - missing) :]
    return [question, [*before, *question], [*question, *end[:missing]]]


def _row_words(columns: tuple[str, str], trained: tuple[str, str], ngram: int) -> RowWords:
    found = dict.fromkeys(tuple(_words("\n".join(each))) for each in (columns, trained))
    asked = columns[0] or columns[1]  # a line of an answer is too often a line of another answer
    lines = [tuple(_words(line)) for line in (*asked.splitlines(), asked)]
    return RowWords(list(found), lines, {gram for words in found for gram in _grams(words, ngram)})


def _holds(words: Gram, inside: dict[Gram, tuple[Gram, ...]]) -> bool:
    """Whether one of the short items is among the words, in a row."""
    if not inside:
        return False
    size = len(next(iter(inside)))
    return any(
        words[start : start + len(item)] == item
        for start in range(len(words) - size + 1)
        for item in inside.get(words[start : start + size], ())
    )


def _stripped(line: Gram, template: tuple[Gram, Gram]) -> Gram:
    """A line without the words of a benchmark's template, or those next to the item: `Calculate` of `Q: Calculate`."""
    begin, end = template
    before = next((n for n in range(len(begin), 0, -1) if line[:n] == begin[-n:]), 0)
    after = next((n for n in range(len(end), 0, -1) if line[-n:] == end[:n]), 0)
    return line[before : len(line) - after]


def _without_template(items: Sequence[Words]) -> tuple[list[Words], tuple[Gram, Gram]]:
    """Texts without the words that all of them begin or end with (`Question: ... Answer:`), and these words."""
    if len(items) < 2:
        return list(items), ((), ())
    begin = _shared(items)
    rest = [words[begin:] for words in items]
    end = _shared([words[::-1] for words in rest])
    template = tuple(items[0][:begin]), tuple(items[0][len(items[0]) - end :])
    return [words[: len(words) - end] for words in rest], template


def _shared(items: Iterable[Words]) -> int:
    """How many words all texts begin with."""
    count = 0
    for column in zip(*items, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _words(text: str) -> Words:
    # Case folding can undo the normalisation, hence it is between two.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return WORD.findall(INVISIBLE.sub("", folded))


def _grams(words: Sequence[str], n: int) -> set[Gram]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
