"""Estimates, from the files on this machine, how much text there is for what a plan removes."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from ptl.config.data import DataSource
from ptl.config.run import Config
from ptl.data.amount import Amount
from ptl.data.sources import GENERAL, numbered_rows, texts
from ptl.preflight.rows import SAMPLE

CHARACTERS_PER_TOKEN = 4  # roughly


def planned_amount(config: Config, removed: int) -> Amount:
    """The tokens and passes that a config plans for the removal of so many parameters."""
    lengths = [stage.max_length for stage in config.recover if stage.method != "grpo"]
    if not lengths:  # reinforcement learning alone
        return Amount(0, removed, None)
    tokens, sources = config.schedule.recovery_tokens, config.training.sources
    if config.training.answers == "self":  # they are not written yet
        return Amount(tokens, removed, None)
    weights = sum(source.weight for source in sources)
    passes = []
    for i, source in enumerate(sources):
        available = tokens_of(source, max(lengths), f"training.sources.{i}")
        if available:
            passes.append(tokens * source.weight / weights / available)
    return Amount(tokens, removed, max(passes, default=None))


def tokens_of(source: DataSource, max_length: int, field: str) -> float:
    """The tokens of a file's rows, roughly, each truncated to `max_length`; 0 for other sources."""
    if source.source != GENERAL and not Path(source.source).is_file():
        return 0.0
    rows = numbered_rows(source, field)
    lengths = []
    for row in itertools.islice(rows, SAMPLE):
        characters = sum(map(len, texts(row)))
        lengths.append(min(characters / CHARACTERS_PER_TOKEN, max_length))
    num_rows = len(lengths) + sum(1 for _ in rows)
    return num_rows * statistics.mean(lengths)
