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
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ptl.config.recover import DataSource, Decontaminate
from ptl.data.sources import SourceRow, bare, numbered_rows, texts

# A word is a run of letters and digits; in scripts that put no spaces between words each character is one.
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphens, zero-width spaces and joiners
MAX_EXAMPLES = 5  # dropped rows that the report quotes
TEMPLATE_ITEMS = 20  # from so many items on, the words that all prompts of a benchmark share are its template's
SHORTEST = 4  # words of an item below which its words are in too many rows by chance

Words = tuple[str, ...]
Affixes = tuple[Words, Words]  # words that all prompts of a benchmark begin and end with: its template
Item = tuple[str, str]  # prompt and right answer of a benchmark's item, or prompt and completion of a row


@dataclass
class Benchmark:
    """The text of a benchmark that is searched for in training rows, and how many were dropped for it."""

    items: int  # all of them
    short: int  # items of too few words beside the template: inside a row they are found with words of it only
    ngrams: set[Words]  # of long items and answers
    short_items: dict[Words, list[Words]]  # searched for inside a row; by their first words, of one length
    lines: set[Words]  # items that are too short to be found inside a row: compared with its lines
    affixes: Affixes
    dropped: int = 0  # training rows

    def shares(self, row: RowWords) -> bool:
        """Whether a training row has text of this benchmark."""
        return (
            not self.ngrams.isdisjoint(row.ngrams)
            or any(map(self._has_short_item, row.texts))
            or any(map(self._is_item, row.lines))
        )

    def counts(self) -> dict[str, int]:
        """For the report."""
        return {
            "items": self.items,
            "short": self.short,
            "dropped": self.dropped,
        }

    def _has_short_item(self, words: Words) -> bool:
        """Whether the words of a short item are among these, one after another."""
        if not self.short_items:
            return False
        # all keys have one length
        size = len(next(iter(self.short_items)))
        for start in range(len(words) - size + 1):
            for item in self.short_items.get(words[start : start + size], ()):
                if words[start : start + len(item)] == item:
                    return True
        return False

    def _is_item(self, line: Words) -> bool:
        """Whether a line is an item, with or without the words of a template."""
        return line in self.lines or _without_affixes(line, self.affixes) in self.lines


@dataclass(frozen=True)
class RowWords:
    """The words of a training row."""

    texts: set[Words]  # as it is trained on; its columns alone too, where the templates have words of their own
    lines: list[Words]  # the lines of its prompt, and all of it
    ngrams: set[Words]  # of the texts


@dataclass
class Filter:
    """Decides which rows to leave out, and counts them."""

    ngram: int  # words in a row that must be equal
    benchmarks: dict[str, Benchmark]
    not_compared: list[str]  # benchmarks whose items are not known
    dropped: int = 0
    examples: list[str] = field(default_factory=list)  # text of dropped rows
    decisions: dict[tuple[DataSource, int], bool] = field(default_factory=dict)  # whether a row stays

    def keeps(self, row: SourceRow) -> bool:
        """Whether a training row stays. A row that comes up again, after an epoch, is counted once."""
        key = (row.source, row.number)  # not by name alone: a hub id has several subsets and splits
        if key not in self.decisions:
            self.decisions[key] = not self._leaks(row)
        return self.decisions[key]

    def _leaks(self, row: SourceRow) -> bool:
        """Whether a row shares text with a benchmark; counted for each of them."""
        columns = texts(bare(row))
        words = _row_words(columns, texts(row), self.ngram)
        leaked = [benchmark for benchmark in self.benchmarks.values() if benchmark.shares(words)]
        if not leaked:
            return False
        for benchmark in leaked:
            benchmark.dropped += 1
        self.dropped += 1
        if len(self.examples) < MAX_EXAMPLES:
            excerpt = _question(columns).strip()[:200]
            self.examples.append(f"{row.source.source} row {row.number}: {excerpt}")
        return True

    def report(self) -> dict[str, Any]:
        """What was compared and dropped, for the step's metadata; see `sentence`."""
        benchmarks = self.benchmarks.values()
        items = sum(benchmark.items for benchmark in benchmarks)
        return {
            # with no items, no row was compared
            "rows": len(self.decisions) if items else 0,
            "dropped": self.dropped,  # a row that shares text with two benchmarks counts once
            "items": items,
            "short": sum(benchmark.short for benchmark in benchmarks),
            "ngram": self.ngram,
            "benchmarks": {name: benchmark.counts() for name, benchmark in self.benchmarks.items()},
            "not_compared": self.not_compared,
            "examples": self.examples,
        }


def most(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The count of most rows: each stage reads the training data from its start, and so counts what others counted."""
    return max(counts, key=lambda report: report["rows"])


def sentence(report: dict[str, Any]) -> str:
    """A report's counts in words: never that no row was left out where nothing could be compared."""
    rows = f"{report['rows']:,} training rows"
    dropped = report["dropped"]
    items = report["items"]
    short = report["short"]
    parts = []
    if dropped:
        parts.append(f"{dropped:,} of {rows} were left out: they share text with a benchmark")
    elif items > short:
        parts.append(f"None of {rows} shares text with one of {items - short:,} benchmark items")
    if short:
        parts.append(f"{short:,} of {items:,} benchmark items have too few words to be found inside a row")
    names = ", ".join(report["not_compared"])
    if names:
        parts.append(f"Training rows were not compared with {names}, whose items are not known")
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
    items: dict[str, list[Item]] = {}
    not_compared: list[str] = []
    if settings.tasks and scored is None:
        not_compared = ["evaluate.tasks"]
    elif settings.tasks and scored is not None:
        items = scored_items(scored)
        # tasks without items that have a prompt and an answer, such as perplexity
        scores = json.loads((scored / "scores.json").read_text())
        names = [task["task"] for task in scores["tasks"]]
        not_compared = [name for name in names if name not in items]
    for source in settings.against:
        name = " ".join(filter(None, (source.source, source.subset, source.split)))
        # the same rows may be named again, for other columns
        if name in items:
            name += f" ({len(items)})"
        items[name] = _source_items(source)
    benchmarks = {name: _benchmark(pairs, settings.ngram) for name, pairs in items.items()}
    return Filter(settings.ngram, benchmarks, not_compared)


def scored_items(folder: Path) -> dict[str, list[Item]]:
    """Prompts and right answers of each task, from an evaluation's items.jsonl."""
    items: dict[str, list[Item]] = {}
    with (folder / "items.jsonl").open(encoding="utf-8") as lines:  # str.splitlines would split at U+2028 in a text too
        for line in lines:
            item = json.loads(line)
            task_items = items.setdefault(item["task"], [])
            task_items.append((item["prompt"], str(item["target"])))
    return items


def _source_items(source: DataSource) -> list[Item]:
    """Prompts and right answers of a benchmark that a source holds."""
    items = []
    for row in numbered_rows(source):
        columns = texts(bare(_without_system_message(row)))
        # where the answer begins in a text is not known: all of it is both
        items.append((_question(columns), columns[1]))
    return items


def _without_system_message(row: SourceRow) -> SourceRow:
    """A benchmark's chat without its system message, which is no part of the question."""
    column = row.source.messages
    chat = row.columns.get(column)
    if row.source.format != "messages" or not isinstance(chat, list):
        return row
    # what is no message at all is reported where the chat is read
    kept = [message for message in chat if not isinstance(message, dict) or message.get("role") != "system"]
    return replace(row, columns={**row.columns, column: kept})


def _benchmark(items: Sequence[Item], ngram: int) -> Benchmark:
    """What of a benchmark's items is searched for in rows."""
    prompts = [_words(prompt) for prompt, _ in items]
    answers = [_words(answer) for _, answer in items]
    questions, affixes = _without_template(prompts)
    bare_answers, _ = _without_template(answers)
    # an answer is searched for only if it is long: short ones are the answers of many questions
    ngrams = _ngrams(bare_answers, ngram)
    # the prompts of a small benchmark may share words that are no template
    has_template = len(items) >= TEMPLATE_ITEMS
    least = min(SHORTEST, ngram)
    searched: set[Words] = set()
    lines: set[Words] = set()
    num_short = 0
    for prompt, question in zip(prompts, questions, strict=True):
        words = question if has_template else prompt
        if len(words) >= ngram:
            ngrams |= _ngrams([words], ngram)
            continue
        # too few words to be searched for inside a row: compared with its lines
        if len(words) < least:
            num_short += 1
            lines.add(words)
        searched |= {words, *_widened(question, affixes, least)}
        if question:
            searched.add(prompt)  # a copy may have the template's words too
    lines.discard(())  # an item without a word
    # by the words they begin with, so that a row is read once for all of them
    short_items: dict[Words, list[Words]] = {}
    for item in searched:
        if len(item) >= least:
            short_items.setdefault(item[:least], []).append(item)
    return Benchmark(len(items), num_short, ngrams, short_items, lines, affixes)


def _widened(question: Words, affixes: Affixes, least: int) -> list[Words]:
    """A question without its template, and with as many of its words as are needed: some may be its own (`What is`)."""
    if len(question) < 2:
        return []
    begin, end = affixes
    missing = max(0, least - len(question))
    # the words of the template that are next to it
    first = max(0, len(begin) - missing)
    before = begin[first:]
    after = end[:missing]
    return [question, before + question, question + after]


def _row_words(columns: Item, trained: Item, ngram: int) -> RowWords:
    # joined, so that an item may begin in the prompt and end in the answer; most templates add no words
    row_texts = {_words("\n".join(pair)) for pair in (columns, trained)}
    # a short item is often a line of its own, such as one below `Q:`
    question = _question(columns)
    lines = [_words(line) for line in [*question.splitlines(), question]]
    return RowWords(row_texts, lines, _ngrams(row_texts, ngram))


def _question(columns: Item) -> str:
    """A row's prompt, or all of a text: a line of an answer is too often a line of another answer."""
    return columns[0] or columns[1]


def _without_affixes(line: Words, affixes: Affixes) -> Words:
    """A line without the words of a benchmark's template, or those next to the item: `Calculate` of `Q: Calculate`."""
    begin, end = affixes
    before = _overlap(begin, line)
    after = _overlap(line, end)
    return line[before : len(line) - after]


def _overlap(first: Words, second: Words) -> int:
    """How many of the last words of the first text are those that the second begins with."""
    for count in range(len(first), 0, -1):
        if first[-count:] == second[:count]:
            return count
    return 0


def _without_template(prompts: Sequence[Words]) -> tuple[list[Words], Affixes]:
    """Texts without the words that all of them begin or end with (`Question: ... Answer:`), and these words."""
    if len(prompts) < 2:
        return list(prompts), ((), ())
    begin = _common_prefix(prompts)
    rest = [words[len(begin) :] for words in prompts]
    # in what is left, so that no word belongs to both ends
    from_the_end = [words[::-1] for words in rest]
    end = _common_prefix(from_the_end)[::-1]
    questions = [words[: len(words) - len(end)] for words in rest]
    return questions, (begin, end)


def _common_prefix(prompts: Sequence[Words]) -> Words:
    """The words that all texts begin with."""
    positions = zip(*prompts, strict=False)
    same = takewhile(lambda words: len(set(words)) == 1, positions)
    return tuple(words[0] for words in same)


def _words(text: str) -> Words:
    # Case folding can undo the normalisation, hence it is between two.
    folded = unicodedata.normalize("NFKC", text).casefold()
    normal = unicodedata.normalize("NFKC", folded)
    visible = INVISIBLE.sub("", normal)
    return tuple(WORD.findall(visible))


def _ngrams(row_texts: Iterable[Words], n: int) -> set[Words]:
    """All runs of n words."""
    ngrams: set[Words] = set()
    for words in row_texts:
        starts = range(len(words) - n + 1)
        ngrams.update(words[start : start + n] for start in starts)
    return ngrams
