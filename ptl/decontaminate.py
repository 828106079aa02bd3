"""Training rows that share text with a benchmark: overlap of word n-grams, as for GPT-3 (2005.14165, appendix C)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ptl.config import DataSource, Decontaminate
from ptl.sources import read_rows, texts

WORD = re.compile(r"\w+")
EXAMPLES = 5  # dropped rows that the report quotes


@dataclass
class Filter:
    """Says which rows to leave out, and counts them."""

    ngram: int
    grams: frozenset[tuple[str, ...]]
    items: int  # benchmark items compared with
    looked_at: int = 0
    dropped: int = 0
    examples: list[str] = field(default_factory=list)
    seen: dict[tuple[str, int], bool] = field(default_factory=dict)

    def keeps(self, source: DataSource, number: int, prompt: str, completion: str) -> bool:
        """Whether a training row stays. A row that comes up again, after an epoch, is counted once."""
        row = (source.source, number)
        if row not in self.seen:
            self.seen[row] = self.grams.isdisjoint(_grams(prompt, completion, self.ngram))
            self.looked_at += 1
            if not self.seen[row]:
                self.dropped += 1
                if len(self.examples) < EXAMPLES:
                    self.examples.append(f"{source.source} row {number}: {(prompt or completion)[:200]}")
        return self.seen[row]

    def report(self) -> dict[str, Any]:
        """What was dropped, for the step's facts."""
        counts = {"rows": self.looked_at, "dropped": self.dropped, "items": self.items, "ngram": self.ngram}
        return counts | {"examples": self.examples}


def build(settings: Decontaminate | None) -> Filter | None:
    """The filter against the benchmarks of the settings, or None."""
    if settings is None:
        return None
    grams: set[tuple[str, ...]] = set()
    items = 0
    for source in settings.against:
        for number, row in enumerate(read_rows(source), 1):
            prompt, completion = texts(row, source, number)
            grams |= _grams(prompt, completion, settings.ngram)
            items += 1
    return Filter(settings.ngram, frozenset(grams), items)


def _grams(prompt: str, completion: str, n: int) -> set[tuple[str, ...]]:
    """The n-grams of prompt and completion, each apart: a solution that leaked alone is a leak too.

    A question of fewer words counts as a whole. A short completion does not count: equal short answers are no leak.
    """
    question, answer = WORD.findall((prompt or completion).lower()), WORD.findall(completion.lower())
    whole = {tuple(question)} if 0 < len(question) < n else set()
    return whole | {tuple(words[i : i + n]) for words in (question, answer) for i in range(len(words) - n + 1)}
