"""A recovery method's task and its report, where training checkpoints may go, and the machines that train together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from ptl import log
from ptl.config.chat import NO_CHAT, Chat
from ptl.config.data import TrainingData

NODES = "PTL_NODES"  # how many machines the compiled pipeline asks for
LOOPBACK = "127.0.0.1"
# Kubeflow Trainer sets these in the pod of each node.
NODE_RANK = "PET_NODE_RANK"
NODE_COUNT = "PET_NNODES"
FIRST_ADDRESS = "PET_MASTER_ADDR"
FIRST_PORT = "PET_MASTER_PORT"
Log = Callable[[dict[str, float], int], None]  # of metrics and their optimizer step


@dataclass(frozen=True)
class Machines:
    """How many they are, which one this is, and where the first one is reached."""

    count: int = 1
    rank: int = 0  # of this machine
    address: str = LOOPBACK
    port: int = 0  # of the first one, there; 0: any free one

    @property
    def first(self) -> bool:
        """Whether this machine has the first process, which logs, saves and reports."""
        return not self.rank


ALONE = Machines()


def is_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the pod of a node of a TrainJob."""
    return NODE_RANK in environment


def machines(environment: Mapping[str, str] = os.environ) -> Machines:
    """As the environment of a node's pod says it; elsewhere there is one."""
    if is_node(environment):
        return Machines(
            int(environment[NODE_COUNT]),
            int(environment[NODE_RANK]),
            environment[FIRST_ADDRESS],
            int(environment[FIRST_PORT]),
        )
    return ALONE


class CheckpointStore(Protocol):
    """Where the training checkpoints of one stage outlive the machine; it goes to the training processes by pickle."""

    def save_if_due(self, folder: Path) -> None:
        """Store a complete training checkpoint, if the last one was stored long enough ago."""

    def restore(self, scratch: Path) -> None:
        """Put the newest stored training checkpoint into `scratch`, unless a newer one is there."""

    def save_result(self, folder: Path, report: str) -> None:
        """Store what the finished stage has written, and its report, for the stage after it on other machines."""

    def fetch_result(self, folder: Path) -> str | None:
        """Put a finished stage's files into `folder`; returns its report, or None where none has been stored."""


@dataclass(frozen=True)
class StageBudget:
    """What one stage of a recovery may use, and its position in the run."""

    tokens: int | None  # None: only its steps limit it
    earlier: tuple[int, ...]  # budgets that took their tokens from the data before this one
    iteration: int  # from 1
    last: bool  # no later iteration trains
    seed: int
    # of all iterations, to divide a total among them; 1:2:4 for example
    weights: tuple[int, ...] = (1,)

    @property
    def interval(self) -> tuple[float, float]:
        """The shares of the run's recovery that are done before and after this iteration."""
        total = sum(self.weights)
        return sum(self.weights[: self.iteration - 1]) / total, sum(
            self.weights[: self.iteration]
        ) / total

    def part(self, total: int) -> tuple[int, int]:
        """Of `total` for the run, how much earlier iterations had and how much this one has."""
        # rounding the sums, not each part, keeps the total exact
        begin = total * sum(self.weights[: self.iteration - 1]) // sum(self.weights)
        end = total * sum(self.weights[: self.iteration]) // sum(self.weights)
        return begin, end - begin


@dataclass(frozen=True)
class RecoveryJob:
    """All that a method needs besides its settings and the two folders."""

    data: TrainingData
    budget: StageBudget
    scratch: Path  # training checkpoints
    on_log: Log
    teacher: Path | None = None  # the original model, for distillation
    # where training checkpoints outlive the machine; None: nowhere
    store: CheckpointStore | None = None
    # folder of ptl.evaluation.evaluate.write_items: what is not to be trained on
    benchmark_items: Path | None = None
    keep_optimizer_state: bool = False  # a later recovery continues with it
    machines: Machines = ALONE  # that train together
    chat: Chat = NO_CHAT


@dataclass(frozen=True)
class RecoverReport:
    """What a recovery did."""

    method: str  # cpt, distil or grpo; of a chain joined by +
    tokens: int  # trained on
    steps: int  # of the optimizer
    resumed_at: int  # optimizer step of the training checkpoint that was resumed; 0: from the start
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # wall clock, without those of an attempt that died


REPORT = TypeAdapter(RecoverReport)


def progress(show: log.Show, tokens: int) -> Log:
    """What shows a training's progress as a bar, from its metrics; `tokens` is what all its stages have."""
    update = log.progress_bar(show)
    note = ""  # of the newest log that has a loss or a reward

    def on_log(metrics: dict[str, float], step: int) -> None:
        nonlocal note
        seen = metrics.get("num_input_tokens_seen")
        if "loss" in metrics:
            note = f", loss {metrics['loss']:.3f}"
        if "reward" in metrics:
            note = f", reward {metrics['reward']:.3f}, answers of {metrics['completions/mean_length']:.0f} tokens"
        if seen is not None:
            update(min(seen / tokens, 1.0), f" {seen:,.0f} of {tokens:,} tokens{note}")
        # Reinforcement learning reads prompts: its steps are counted.
        elif "progress" in metrics:
            update(metrics["progress"], f" step {step}{note}")

    return on_log
