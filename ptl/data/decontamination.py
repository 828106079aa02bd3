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

from ptl.config.recover import DataSource, Decontaminate
from ptl.data.sources import SourceRow, bare, numbered_rows, texts

# A word is a run of letters and digits; in scripts that put no spaces between words each character is one.
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
# What Unicode calls default ignorable: soft hyphens, zero-width spaces and joiners, directions, fillers.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|[nrt])")  # of JSON, once or more; LaTeX's are changed in both texts
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|[,'\u2019])(?=\d{3}(?!\d))")  # 1,000, and LaTeX's 1{,}000 and 1,\!000
# What a line begins with, `Question 1:`, `2.` or `(A)`, and ends with, `Answer:`.
LABEL = re.compile(r"\W*(?:\w+(?:[^\w:]+\w+){0,5}\s*:(?!\d)|(?:\w+ ?)?\d{1,4}[.)]\s|\w[.)]\s)(?=.*\w)")
END_LABEL = re.compile(r"\s\w+\s*:\s*$")
COMPLETE = re.compile(r"[.!?\u3002]\W*$")
MAX_EXAMPLES = 5  # dropped rows that the report quotes
TEMPLATE_SHARE = 3  # what a third of the prompts share is a template: a group of tasks may have several
NGRAM = 13  # consecutive words that must be equal; of a shorter item, all; in Chinese two characters a word
SHORTEST = 4  # words below which a text is in too many rows by chance

Words = tuple[str, ...]
Beginnings = dict[tuple[int, str], int]  # number of a beginning (0: no word) and the next word -> number of both
Item = tuple[str, str]  # prompt and right answer of a benchmark's item, or prompt and completion of a row


@dataclass(frozen=True)
class RowWords:
    """The words of a training row: as it is trained on, and of its columns alone, as templates have words too."""

    ngrams: set[Words]
    starts: dict[Words, list[tuple[Words, int]]]  # by `_key`: the texts that have these words, and where


@dataclass
class Benchmark:
    """The text of a benchmark that is searched for in training rows, and how many were dropped for it."""

    items: int  # all of them
    ngrams: set[Words]  # of long questions and answers
    short_texts: dict[Words, list[Words]] = field(default_factory=dict)  # by `_key`
    short: int = 0  # items whose own words are too few to be found inside a row
    dropped: int = 0  # training rows

    def shares(self, row: RowWords) -> bool:
        """Whether a training row has text of this benchmark."""
        return not self.ngrams.isdisjoint(row.ngrams) or any(
            words[start : start + len(text)] == text
            for key in self.short_texts.keys() & row.starts.keys()
            for text in self.short_texts[key]
            for words, start in row.starts[key]
        )

    def counts(self) -> dict[str, int]:
        """For the report."""
        return {"items": self.items, "short": self.short, "dropped": self.dropped}


@dataclass
class Filter:
    """Decides which rows to leave out, and counts them."""

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
        # joined, so that an item may begin in the prompt and end in the answer; most templates add no words
        row_texts = {_words("\n".join(pair)) for pair in (columns, texts(row))}
        question = _normal(_question(columns))
        words = _row_words(row_texts, [*question.splitlines(), question])
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
        parts.append(f"{short:,} of {items:,} benchmark items have too few words of their own to be found inside a row")
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
    items: dict[str, list[Item]] = {}
    not_compared: list[str] = []
    if settings.tasks and benchmark_items is None:
        not_compared = ["evaluate.tasks"]
    elif settings.tasks and benchmark_items is not None:
        all_items = _read_items(benchmark_items)
        # tasks whose items have no prompt, such as perplexity
        not_compared = [name for name, its in all_items.items() if not its]
        items = {name: its for name, its in all_items.items() if its}
    for source in settings.against:
        name = " ".join(filter(None, (source.source, source.subset, source.split)))
        # the same rows may be named again, for other columns
        if name in items:
            name += f" ({len(items)})"
        items[name] = _source_items(source)
    benchmarks = {name: _benchmark(pairs) for name, pairs in items.items()}
    return Filter(benchmarks, not_compared)


def _read_items(folder: Path) -> dict[str, list[Item]]:
    """Prompts and right answers of each task; none of one whose items have no prompt."""
    items: dict[str, list[Item]] = {}
    with (folder / "items.jsonl").open(encoding="utf-8") as lines:  # str.splitlines would split at U+2028 in a text too
        for line in lines:
            item = json.loads(line)
            task_items = items.setdefault(item["task"], [])
            if "prompt" in item:
                task_items.append((item["prompt"], item["target"]))
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


@dataclass(frozen=True)
class Line:
    """A line of a benchmark's prompt or answer."""

    label: Words
    body: Words
    end_label: Words
    begin: int  # of its own words in the body: without those that many texts share, a template's or every question's
    end: int
    complete: bool  # it ends as a sentence does

    @property
    def own(self) -> Words:
        """Empty for a line of the template."""
        return self.body[self.begin : self.end]

    def shortest_copy(self) -> Words:
        """The words that a row with this question has at least: with few of its own, others belong to it too."""
        return self.body if 1 < _size(self.own) < SHORTEST else self.own

    def searched(self) -> set[Words]:
        """Its own words; if they are few, with others of the body, of which some may be a template's."""
        if _size(self.own) >= SHORTEST:
            return {self.own}
        # beside a single word of its own, the others are in too many rows
        runs = _runs(self.body, SHORTEST) if _size(self.own) > 1 else ()
        wider = {self.body[run] for run in runs if run.start <= self.begin and self.end <= run.stop}
        return {self.own, self.body} | wider


NO_LINE = Line((), (), (), 0, 0, False)


def _benchmark(items: Sequence[Item]) -> Benchmark:
    """What of a benchmark's items is searched for in rows."""
    prompts = Counter(prompt for prompt, _ in items)
    questions = _without_template(prompts)
    # an answer is searched for only if it is long: short ones are the answers of many questions
    answers = _without_template({answer for _, answer in items})
    sentences = _sentences(questions)
    short_texts = {_joined(line.own for line in lines) for lines in questions}
    for question, *others in sentences:
        short_texts |= {*question.searched(), *(line.own for line in others if _size(line.own) >= SHORTEST)}
    benchmark = Benchmark(
        len(items),
        set().union(*(_own_ngrams(lines) for lines in questions + answers)),
    )
    for text in short_texts:
        if 0 < _size(text) < NGRAM:
            benchmark.short_texts.setdefault(_key(text), []).append(text)
    for (question, *_), count in zip(sentences, prompts.values(), strict=True):
        # planted between other words
        row = _row_words([("", *question.shortest_copy(), "")])
        benchmark.short += 0 if benchmark.shares(row) else count
    return benchmark


def _without_template(prompts: Iterable[str]) -> list[list[Line]]:
    """The lines of each text, and what is left of them without labels and the words that many texts share."""
    split = [[_parts(line) for line in _normal(prompt).splitlines()] for prompt in prompts]
    bodies = [[_find_words(body) for _, body, _ in lines] for lines in split]
    beginnings = _shared_beginnings(bodies)
    endings = _shared_beginnings([[body[::-1] for body in lines] for lines in bodies])

    def line_of(parts: tuple[str, str, str]) -> Line:
        label, body, end_label = map(_find_words, parts)
        begin = _num_shared(body, beginnings)
        # no word belongs to both ends
        end = max(begin, len(body) - _num_shared(body[::-1], endings))
        return Line(
            label,
            body,
            end_label,
            begin,
            end,
            bool(COMPLETE.search(parts[1])),
        )

    return [[line_of(parts) for parts in lines] for lines in split]


def _parts(line: str) -> tuple[str, str, str]:
    """A line's label, body and label of what follows, as in `Question 1: ... Answer:`."""
    label = LABEL.match(line)
    start = label.end() if label else 0
    end_label = END_LABEL.search(line, start)
    end = end_label.start() if end_label else len(line)
    return line[:start], line[start:end], line[end:]


def _shared_beginnings(texts_lines: Sequence[Sequence[Words]]) -> Beginnings:
    """The words with which lines of many texts begin, and each beginning of these."""
    many = max(2, len(texts_lines) / TEMPLATE_SHARE)
    beginnings: Beginnings = {}
    reached = [(text, line, 0) for text, lines in enumerate(texts_lines) for line in lines]
    for position in itertools.count():
        reached = [(text, line, number) for text, line, number in reached if len(line) > position]
        # a line that comes twice in a text counts once
        texts: dict[tuple[int, str], set[int]] = defaultdict(set)
        for text, line, number in reached:
            texts[number, line[position]].add(text)
        for step, its_texts in texts.items():
            if len(its_texts) >= many:
                beginnings[step] = len(beginnings) + 1
        steps = [(text, line, beginnings.get((number, line[position]), 0)) for text, line, number in reached]
        reached = [step for step in steps if step[2]]
        if not reached:
            return beginnings
    raise AssertionError("unreachable")


def _num_shared(words: Words, beginnings: Beginnings) -> int:
    """How many of the first words are a shared beginning."""
    number = 0
    for length, word in enumerate(words):
        number = beginnings.get((number, word), 0)
        if not number:
            return length
    return len(words)


def _own_ngrams(lines: Sequence[Line]) -> set[Words]:
    """The n-grams of a text whose words are its own but for a quarter."""
    words = _joined(line.label + line.body + line.end_label for line in lines)
    own: list[bool] = []
    for line in lines:
        begin = len(line.label) + line.begin
        rest = len(line.body) - line.end + len(line.end_label)
        own += [False] * begin + [True] * len(line.own) + [False] * rest
    return {words[run] for run in _runs(words, NGRAM) if own[run].count(False) <= NGRAM / 4}


def _sentences(questions: Sequence[Sequence[Line]]) -> list[list[Line]]:
    """Of each question the lines that are sentences, or its longest, and that no other question has.

    The first has most words of its own and is no formula, table or end of another line.
    """
    candidates = []
    for lines in questions:
        # of equal ones the last: a question follows its subject
        by_size = sorted(lines, key=lambda line: _size(line.own))[::-1]
        sentences = [line for line in by_size[1:] if line.own and line.complete]
        longest = [line for line in by_size[:1] if line.own]
        candidates.append(longest + sentences)
    # several templates may ask the same question
    distinct = {frozenset(line.own for line in lines) for lines in candidates}
    counts = Counter(itertools.chain.from_iterable(distinct))
    unique = [[line for line in lines if counts[line.own] == 1] for lines in candidates]
    return [
        sorted(
            lines,
            key=lambda line: not (line.complete and _size(line.body) >= SHORTEST),
        )
        or [NO_LINE]
        for lines in unique
    ]


def _row_words(row_texts: Iterable[Words], lines: Iterable[str] = ()) -> RowWords:
    row = RowWords(set(), {})
    for words in row_texts:
        row.ngrams.update(words[run] for run in _runs(words, NGRAM))
        for run in _runs(words, SHORTEST):
            row.starts.setdefault(words[run], []).append((words, run.start))
    # an item of few words is often a line of its own, such as one below `Q:`
    for line in lines:
        for words in (_find_words(line), _find_words(_parts(line)[1])):
            if _size(words) < SHORTEST:
                row.starts[words] = [(words, 0)]
    return row


def _question(columns: Item) -> str:
    """A row's prompt, or all of a text: a line of an answer is too often a line of another answer."""
    return columns[0] or columns[1]


def _words(text: str) -> Words:
    return _find_words(_normal(text))


def _find_words(normal: str) -> Words:
    return tuple(WORD.findall(normal))


def _joined(parts: Iterable[Words]) -> Words:
    return tuple(word for part in parts for word in part)


def _normal(text: str) -> str:
    """A text without what hides a copy: escapes, case and forms of letters, invisible characters, commas in numbers."""
    unescaped = html.unescape(
        ESCAPE.sub(
            lambda escape: chr(int(escape[1], 16)) if escape[1] else " ",
            text,
        )
    )
    # case folding can undo the normalisation, hence it is between two
    folded = unicodedata.normalize("NFKC", unescaped).casefold()
    visible = INVISIBLE.sub("", unicodedata.normalize("NFKC", folded))
    return THOUSANDS.sub("", visible)


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
