"""Training rows that share text with a benchmark: overlap of word n-grams, as for GPT-3 (2005.14165, appendix C).

An item shares text with a row that has `ngram` words of its question or answer one after another. Of a shorter
question, or a shorter line of it, the row has all words so, whatever surrounds them. Words are compared after Unicode's
NFKC normalisation and case folding, without punctuation, invisible characters and escapes of HTML and JSON, so that
none of these hides a copy.

An item's question is its prompt without the benchmark's template. Whether a copy of it would be found inside a row is
tried when the filter is built: an item whose copy is not found is reported as such.
"""

from __future__ import annotations

import html
import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptl.config.data import DataSource, Decontaminate
from ptl.data.sources import SourceRow, numbered_rows, texts

# A word is a run of letters and digits; in scripts that put no spaces between words each character is one.
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
# What Unicode calls default ignorable: soft hyphens, zero-width spaces and joiners, directions, fillers.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
# of JSON, once or more; LaTeX's are changed in both texts
ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|[nrt])")
# 1,000, and LaTeX's 1{,}000 and 1,\!000
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|[,'\u2019])(?=\d{3}(?!\d))")
# What a line begins with, `Question 1:`, `2.` or `(A)`, and ends with, `Answer:`.
LABEL = re.compile(
    r"^(?:\W*(?:\w+(?:[^\w:]+\w+){0,5}\s*:(?!\d)|(?:\w+ ?)?\d{1,4}[.)]\s|\w[.)]\s)(?=.*\w))+"
)
END_LABEL = re.compile(r"(?:^|\s)\w+\s*:\s*$")
COMPLETE = re.compile(r"[.!?\u3002]\W*$")
MAX_EXAMPLES = 5  # dropped rows that the report quotes
# what a third of the prompts share is a template: a group of tasks may have several
TEMPLATE_SHARE = 3
# consecutive words that must be equal; of a shorter item, all; in Chinese two characters a word
NGRAM = 13
SHORTEST = 4  # words below which a text is in too many rows by chance

Words = tuple[str, ...]
# prompt and right answer of a benchmark's item, or prompt and completion of a row
Item = tuple[str, str]


@dataclass
class Filter:
    """Decides which rows to leave out, and counts them."""

    not_compared: list[str]  # benchmarks whose items are not known
    # N-grams of long texts of benchmarks, and short texts as a whole; by `_key`
    searched: dict[Words, list[Words]] = field(default_factory=lambda: defaultdict(list))
    items: int = 0  # of all benchmarks
    short: int = 0  # of these, whose own words are too few to be found inside a row
    dropped: int = 0  # rows
    examples: list[str] = field(default_factory=list)  # text of dropped rows
    # whether a row stays
    decisions: dict[tuple[DataSource, int], bool] = field(default_factory=dict)

    def add(self, items: Sequence[Item]) -> None:
        """Search for a benchmark's items too."""
        prompts = Counter(prompt for prompt, _ in items)
        questions = _without_template(prompts)
        # An answer is searched for only if it is long: short ones are the answers of many questions.
        answers = _without_template({answer for _, answer in items})
        sentences = _sentences(questions)
        searched = {_joined(line.own for line in lines) for lines in questions}
        searched.update(*map(_own_ngrams, questions + answers))
        for lines in sentences:
            searched.update(*(line.searched() for line in lines[:1]))
            searched.update(line.own for line in lines[1:] if _size(line.own) >= SHORTEST)
        for text in filter(None, searched):
            self.searched[_key(text)].append(text)
        self.items += len(items)
        for lines, count in zip(sentences, prompts.values(), strict=True):
            # A copy is planted between other words.
            copy = lines[0].shortest_copy() if lines else ()
            self.short += 0 if self._is_in(("", *copy, "")) else count

    def keeps(self, row: SourceRow) -> bool:
        """Whether a training row stays. A row that comes up again, after an epoch, is counted once."""
        key = (row.source, row.number)  # not by name alone: a hub id has several subsets and splits
        if key not in self.decisions:
            self.decisions[key] = not self._leaks(row)
        return self.decisions[key]

    def _leaks(self, row: SourceRow) -> bool:
        """Whether a row shares text with a benchmark; counted."""
        columns = texts(row)
        # Prompt and answer are joined, since an item may begin in the one and end in the other; a label between them
        # is in the way, and what looks like one may be words of the item.
        normal = _normal("\n".join(columns))
        versions = {_words(normal), _joined(map(_words, _lines(normal)))}
        question = [_words(line) for line in _lines(_normal(_question(columns)))]
        # An item of few words is often a line of its own, such as one below `Q:`.
        lines = [words for words in (_joined(question), *question) if _size(words) < SHORTEST]
        if not any(map(self._is_in, versions)) and self.searched.keys().isdisjoint(lines):
            return False
        self.dropped += 1
        if len(self.examples) < MAX_EXAMPLES:
            excerpt = _question(columns).strip()[:200]
            self.examples.append(f"{row.source.source} row {row.number}: {excerpt}")
        return True

    def _is_in(self, words: Words) -> bool:
        """Whether a text that is searched for is in these words."""
        for run in _runs(words, SHORTEST):
            for text in self.searched.get(words[run], ()):
                if words[run.start : run.start + len(text)] == text:
                    return True
        return False

    def report(self) -> dict[str, Any]:
        """What was compared and dropped, for the step's metadata; see `sentence`."""
        return {
            # with no items, no row was compared
            "rows_compared": len(self.decisions) if self.items else 0,
            "rows_dropped": self.dropped,
            "benchmark_items": self.items,
            "benchmark_items_short": self.short,
            "not_compared": self.not_compared,
            "examples": self.examples,
        }


def most(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The count of most rows: each stage reads the training data from its start, and so counts what others counted."""
    return max(counts, key=lambda report: report["rows_compared"])


def sentence(report: dict[str, Any]) -> str:
    """A report's counts in words: never that no row was left out where nothing could be compared."""
    rows = f"{report['rows_compared']:,} training rows"
    dropped = report["rows_dropped"]
    items, short = report["benchmark_items"], report["benchmark_items_short"]
    parts = []
    if dropped:
        parts.append(f"{dropped:,} of {rows} were left out: they share text with a benchmark")
    elif items > short:
        parts.append(f"None of {rows} shares text with one of {items - short:,} benchmark items")
    if short:
        parts.append(
            f"{short:,} of {items:,} benchmark items have too few words of their own to be found inside a row"
        )
    names = ", ".join(report["not_compared"])
    if names:
        parts.append(f"Training rows were not compared with {names}, whose items are not known")
    elif not items:
        parts.append("Training rows were not compared with a benchmark: there are no items")
    return ". ".join(parts) + "."


def build(settings: Decontaminate, benchmark_items: Path | None) -> Filter | None:
    """The filter against what the settings name; None where that is nothing.

    `benchmark_items` is the folder of `write_items`: those of `evaluate.tasks`, so that neither the benchmarks'
    data nor the harness is needed here.
    """
    if not settings.tasks and not settings.against:
        return None
    tasks: dict[str, list[Item]] = {}
    if settings.tasks:
        tasks = _read_items(benchmark_items) if benchmark_items else {"evaluate.tasks": []}
    # Also tasks whose items have no prompt, such as perplexity.
    leak_filter = Filter(not_compared=[name for name, items in tasks.items() if not items])
    for items in tasks.values():
        leak_filter.add(items)
    for source in settings.against:
        rows = [texts(_without_system_message(row)) for row in numbered_rows(source)]
        # Where the answer begins in a text is not known: all of it is both.
        leak_filter.add([(_question(columns), columns[1]) for columns in rows])
    return leak_filter


def _without_system_message(row: SourceRow) -> SourceRow:
    """A benchmark's chat without its system message, which is no part of the question."""
    column = row.source.messages
    chat = row.columns.get(column)
    if row.source.format != "messages" or not isinstance(chat, list):
        return row
    # What is no message at all is reported where the chat is read.
    kept = [
        message
        for message in chat
        if not isinstance(message, dict) or message.get("role") != "system"
    ]
    return replace(row, columns={**row.columns, column: kept})


def _read_items(folder: Path) -> dict[str, list[Item]]:
    """Prompts and right answers of each task; none of one whose items have no prompt."""
    items: dict[str, list[Item]] = {}
    # str.splitlines would split at U+2028 in a text too
    with (folder / "items.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            task_items = items.setdefault(item["task"], [])
            if "prompt" in item:
                task_items.append((item["prompt"], item["target"]))
    return items


@dataclass(frozen=True)
class Line:
    """A line of a benchmark's prompt or answer, without labels."""

    words: Words
    # of its own words: without those that many texts share, a template's or every question's
    begin: int
    end: int
    complete: bool  # it ends as a sentence does

    @property
    def own(self) -> Words:
        """Empty for a line of the template."""
        return self.words[self.begin : self.end]

    def shortest_copy(self) -> Words:
        """The words that a row with this question has at least: with few of its own, others belong to it too."""
        return self.words if 1 < _size(self.own) < SHORTEST else self.own

    def searched(self) -> set[Words]:
        """Its own words; if they are few, with others of the line, of which some may be a template's."""
        if _size(self.own) >= SHORTEST:
            return {self.own}
        # Beside a single word of its own, the others are in too many rows.
        runs = _runs(self.words, SHORTEST) if _size(self.own) > 1 else ()
        wider = {
            self.words[run] for run in runs if run.start <= self.begin and self.end <= run.stop
        }
        return {self.own, self.words} | wider


def _without_template(prompts: Iterable[str]) -> list[list[Line]]:
    """The lines of each text, and which words of them many texts do not share."""
    text_lines = [_lines(_normal(prompt)) for prompt in prompts]
    beginnings = _shared_beginnings([[_words(line) for line in lines] for lines in text_lines])
    endings = _shared_beginnings([[_words(line)[::-1] for line in lines] for lines in text_lines])

    def line_of(text: str) -> Line:
        words = _words(text)
        begin = _num_shared(words, beginnings)
        # No word belongs to both ends.
        end = max(begin, len(words) - _num_shared(words[::-1], endings))
        return Line(words, begin, end, bool(COMPLETE.search(text)))

    return [[line_of(line) for line in lines] for lines in text_lines]


def _shared_beginnings(text_lines: Sequence[Sequence[Words]]) -> set[Words]:
    """The words with which lines of many texts begin, and each beginning of these."""
    many = max(2, len(text_lines) / TEMPLATE_SHARE)
    shared: set[Words] = set()
    longest: set[Words] = {()}
    while longest:
        shared |= longest
        length = len(next(iter(longest))) + 1
        counts: Counter[Words] = Counter()
        for lines in text_lines:
            continued = [
                line for line in lines if len(line) >= length and line[: length - 1] in longest
            ]
            # A line that comes twice in a text counts once.
            counts.update({line[:length] for line in continued})
        longest = {words for words, count in counts.items() if count >= many}
    return shared


def _num_shared(words: Words, beginnings: set[Words]) -> int:
    """How many of the first words are a shared beginning."""
    length = 0
    while length < len(words) and words[: length + 1] in beginnings:
        length += 1
    return length


def _own_ngrams(lines: Sequence[Line]) -> set[Words]:
    """The n-grams of a text whose words are its own but for a quarter."""
    words = _joined(line.words for line in lines)
    own: list[bool] = []
    for line in lines:
        own += [line.begin <= position < line.end for position in range(len(line.words))]
    return {words[run] for run in _runs(words, NGRAM) if own[run].count(False) <= NGRAM / 4}


def _sentences(questions: Sequence[Sequence[Line]]) -> list[list[Line]]:
    """Of each question the lines that are sentences, or its longest, and that no other question has.

    The first has most words of its own and is no formula, table or end of another line.
    """
    candidates = []
    for lines in questions:
        # Of equal ones the last: a question follows its subject.
        by_size = sorted(lines, key=lambda line: _size(line.own))[::-1]
        sentences = [line for line in by_size[1:] if line.complete]
        candidates.append([line for line in by_size[:1] + sentences if line.own])
    # Several templates may ask the same question.
    distinct = {frozenset(line.own for line in lines) for lines in candidates}
    counts = Counter(itertools.chain.from_iterable(distinct))
    unique = [[line for line in lines if counts[line.own] == 1] for lines in candidates]
    return [sorted(lines, key=_is_fragment) for lines in unique]


def _is_fragment(line: Line) -> bool:
    """Whether a line is a formula, a table or the end of another one."""
    return not line.complete or _size(line.words) < SHORTEST


def _question(columns: Item) -> str:
    """A row's prompt, or all of a text: a line of an answer is too often a line of another answer."""
    return columns[0] or columns[1]


def _lines(normal: str) -> list[str]:
    """The lines of a text without labels."""
    return [END_LABEL.sub("", LABEL.sub("", line)) for line in normal.splitlines()]


def _words(normal: str) -> Words:
    return tuple(WORD.findall(normal))


def _joined(parts: Iterable[Words]) -> Words:
    return tuple(itertools.chain.from_iterable(parts))


def _normal(text: str) -> str:
    """A text without what hides a copy: escapes, case and forms of letters, invisible characters, commas in numbers."""
    unescaped = html.unescape(ESCAPE.sub(_unescaped, text))
    # case folding can undo the normalisation, hence it is between two
    folded = unicodedata.normalize("NFKC", unescaped).casefold()
    visible = INVISIBLE.sub("", unicodedata.normalize("NFKC", folded))
    return THOUSANDS.sub("", visible)


def _unescaped(escape: re.Match[str]) -> str:
    """The character of an escape of JSON; a line or a tab as a space."""
    return chr(int(escape[1], 16)) if escape[1] else " "


def _key(words: Words) -> Words:
    """By what a short text is looked up: its first words, at least so many, or all of them."""
    return words[next(_runs(words, SHORTEST), slice(None))]


def _size(words: Sequence[str]) -> float:
    """How many words these are; in kana and Han, a word has about two characters."""
    return sum(map(_weight, words))


def _weight(word: str) -> float:
    return 0.5 if "\u3040" <= word < "\ua000" else 1.0


def _runs(words: Sequence[str], size: float) -> Iterator[slice]:
    """The shortest runs of at least so many words, one from each word on."""
    end = 0
    inside = 0.0
    for start, word in enumerate(words):
        while inside < size:
            if end == len(words):
                return
            inside += _weight(words[end])
            end += 1
        yield slice(start, end)
        inside -= _weight(word)
