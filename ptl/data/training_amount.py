"""How much a recovery trains: tokens for each removed parameter, and passes over the rows.

The paper has 0.1 tokens for each parameter that it removes: 160M for 1.57B of 8B. SmolLM2-135M with 0.0024 to 0.0035
more than doubled the perplexity of other text (docs/results.md, "A pretrained model with few tokens").
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from ptl.config.recover import DataSource
from ptl.config.run import Config
from ptl.data.sources import numbered_rows, texts

PER_PARAMETER = 0.1  # tokens for each removed parameter: the paper's
LEAST = PER_PARAMETER / 10  # below which is warned
PASSES = 4  # over the rows, after which repetition helps little (Muennighoff et al. 2023, 2305.16264)
CHARACTERS = 4  # of a token, roughly
SAMPLE = 200  # rows whose length is measured


@dataclass(frozen=True)
class Amount:
    """The tokens of a recovery beside what was removed and what there is to read."""

    tokens: int
    removed: int  # parameters
    passes: float | None  # over the source that is read most often; None: not known

    @property
    def sentence(self) -> str:
        """Both ratios in words; empty where nothing is trained on text, or nothing was removed."""
        if not self.tokens or self.removed <= 0:
            return ""
        passes = "" if self.passes is None else f", about {_digits(self.passes)} passes over the rows"
        return f"{self.tokens:,} recovery tokens: {_digits(self.tokens / self.removed)} per removed parameter{passes}"

    def warnings(self, least: float = LEAST) -> list[str]:
        """A sentence for fewer than `least` tokens for each removed parameter, and for more than PASSES passes."""
        if not self.sentence:
            return []
        problems = []
        # Both are estimates: half a pass more is no problem.
        if float(f"{self.tokens / self.removed:.1g}") < least:
            problems.append(
                f"the paper has {PER_PARAMETER} per removed parameter, and a model with 0.0035 was far worse on other "
                "text (docs/results.md): lower schedule.target, or give more tokens and rows"
            )
        if self.passes is not None and round(self.passes) > PASSES:
            problems.append(f"more than {PASSES} passes help little: give more rows, or lower schedule.recovery_tokens")
        return [f"{self.sentence}; {problem}" for problem in problems]


def planned(config: Config, removed: int) -> Amount:
    """What a config gives to a removal of so many parameters; rows are those of files on this machine."""
    lengths = [stage.max_length for stage in config.recover if stage.method != "grpo"]
    if not lengths:  # reinforcement learning alone, which trains on the model's own answers
        return Amount(0, removed, None)
    tokens, sources = config.schedule.recovery_tokens, config.training.sources
    weights = sum(source.weight for source in sources)
    passes = []
    for i, source in enumerate(sources):
        there = tokens_of(source, max(lengths), f"training.sources.{i}")
        if there:
            passes.append(tokens * source.weight / weights / there)
    return Amount(tokens, removed, max(passes, default=None))


def tokens_of(source: DataSource, max_length: int, field: str) -> float:
    """Tokens of a file's rows, roughly, of which no more than max_length are read of each; 0 for other sources."""
    if not Path(source.source).is_file():
        return 0.0
    rows = numbered_rows(source, field)
    sample = [
        min(
            sum(map(len, texts(row))) / CHARACTERS,
            max_length,
        )
        for row in itertools.islice(rows, SAMPLE)
    ]
    count = len(sample) + sum(1 for _ in rows)
    return count * sum(sample) / len(sample)


def _digits(value: float) -> str:
    """Two digits that count: 0.0042, 5.8, 10,000."""
    return f"{float(f'{value:.2g}'):,.6g}"
