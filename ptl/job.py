"""A recovery method's task and its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptl.config import TrainingData
from ptl.preempt import Vault

Log = Callable[[dict[str, float], int], None]  # metrics, optimizer step


@dataclass(frozen=True)
class StageBudget:
    """Where in the run one stage of a recovery stands."""

    tokens: int | None  # its budget; None: only its steps limit it
    earlier: tuple[int, ...]  # budgets that took their tokens from the data before this one
    index: int  # iteration, from 1
    last: bool
    seed: int
    weights: tuple[int, ...] = (1,)  # shares of all iterations in what is shared out, 1:2:4 for example

    def part(self, whole: int) -> tuple[int, int]:
        """Of `whole` things for the run, how many earlier iterations had and how many this one has."""
        done = [whole * sum(self.weights[:i]) // sum(self.weights) for i in (self.index - 1, self.index)]
        return done[0], done[1] - done[0]


@dataclass(frozen=True)
class RecoveryJob:
    """All that a method needs beside its settings and the two folders."""

    data: TrainingData
    this: StageBudget
    scratch: Path  # training checkpoints
    on_log: Log
    teacher: Path | None = None  # the original model, for distillation
    vault: Vault | None = None  # where training checkpoints outlive the machine
    scored: Path | None = None  # what the first evaluation wrote: its items are not to be trained on
    keep_optimizer_state: bool = False  # a later recovery goes on with the optimizer's state


@dataclass(frozen=True)
class RecoverReport:
    """What a recovery did; `curve` is (tokens seen, training loss) at each log."""

    method: str
    tokens: int
    steps: int
    curve: tuple[tuple[int, float], ...]
    resumed_at: int  # optimizer step that training went on from; 0: from the start
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
