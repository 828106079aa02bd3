"""A loop without its evaluations: what the benchmarks that compare schedules have in common."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.config.recover import Recovery, TrainingData
from ptl.config.run import Calibration
from ptl.config.schedule import Prune, Schedule, plan, removal, token_weights
from ptl.model import checkpoint
from ptl.pruning.prune import prune_checkpoint
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.recover import recover_checkpoint

ROOT = Path(__file__).parents[1]
TRAIN = {
    "source": str(ROOT / "examples/tiny_reasoner/train.jsonl.gz"),
    "prompt": "{question}\n",
    "completion": "{answer}",
}


@dataclass(frozen=True)
class Subject:
    """A model, and the texts that it is scored and trained on."""

    model: Path
    data: TrainingData
    calibration: Calibration


TINY_DATA = TrainingData(sources=[TRAIN])
TINY = Subject(
    ROOT / "examples/tiny_reasoner/checkpoint",
    TINY_DATA,
    Calibration(data=TINY_DATA.sources[0], num_sequences=128, max_length=256),
)


@dataclass(frozen=True)
class Trained:
    """What a schedule led to."""

    checkpoint: Path
    params: int
    tokens: int  # of recovery
    flops: int  # of recovery: 6 for each parameter and token


def run(
    subject: Subject,
    schedule: Schedule,
    prune: Prune,
    stages: Sequence[dict[str, Any]],  # of each recovery; none: it is only pruned
    seed: int,
    folder: Path,  # with what an earlier call has left there, which is continued
) -> Trained:
    """Prune neurons and recover by a schedule."""
    dense = checkpoint.num_params(subject.model)
    iterations = plan(schedule, prune)
    at = subject.model
    tokens = flops = 0
    for iteration in iterations:
        pruned = folder / f"pruned-{iteration.index}"
        recovered = folder / f"recovered-{iteration.index}"
        done = folder / f"done-{iteration.index}"
        if not done.exists():
            shutil.rmtree(pruned, ignore_errors=True)
            pruned.mkdir(parents=True)
            goal = dense - int(iteration.progress * removal(dense, schedule.target))
            prune_checkpoint(at, pruned, prune, subject.calibration, unit="neurons", goal=goal, seed=seed)
        at = pruned
        if stages:
            budget = StageBudget(iteration.tokens, (), iteration.index, iteration.last, seed, token_weights(schedule))
            training = folder / f"training-{iteration.index}"
            job = RecoveryJob(subject.data, budget, training, lambda metrics, step: None, teacher=subject.model)
            if not done.exists():
                budgets = [planned.tokens for planned in iterations[: iteration.index]]
                recover_checkpoint(pruned, recovered, Recovery(stages=stages), budgets, job)
            at = recovered
            tokens += iteration.tokens
            flops += 6 * checkpoint.num_params(at) * iteration.tokens
        done.touch()
    return Trained(at, checkpoint.num_params(at), tokens, flops)
