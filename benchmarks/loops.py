"""A loop without its evaluations: what the benchmarks that compare schedules have in common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from ptl.config.chat import NO_CHAT, Chat
from ptl.config.data import TrainingData
from ptl.config.recover import Recovery
from ptl.config.run import Calibration
from ptl.config.schedule import Prune, Schedule, Unit, plan, removal, token_weights
from ptl.data.sequences import calibration_batches
from ptl.model import dimensions
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
    chat: Chat = NO_CHAT
    benchmark_items: Path | None = None  # what training rows are compared with


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
    scoring_flops: int  # of all prune steps: 2 for each parameter and token forward, 4 backward


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; none where nothing is measured yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def study(
    path: Path, cells: Iterable[dict[str, Any]], measure: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Measure the cells that a file of results lacks, and append a line for each: the cell and what was measured."""
    for cell in cells:
        if not any(row | cell == row for row in json_rows(path)):
            row = cell | measure(cell)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*(value for value in row.values() if not isinstance(value, list)), flush=True)


def work_quietly() -> None:
    """One thread, and no bars or warnings of transformers: for processes that measure side by side."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


# Source, destination, what to remove, parameters to end with now and after all of its iterations -> FLOPs of scoring
Cut = Callable[[Path, Path, Unit, int, int], int]


def scored_anew(subject: Subject, prune: Prune, seed: int) -> Cut:
    """The prune step's own way."""
    tokenizer = AutoTokenizer.from_pretrained(subject.model)
    batches = calibration_batches(subject.calibration, tokenizer, seed, subject.chat)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    chosen: dict[str, int] = {}  # widths to end with

    def cut(src: Path, dst: Path, unit: Unit, goal: int, end: int) -> int:
        settings = {"goal": goal, "end": end, "chosen": chosen, "seed": seed, "chat": subject.chat}
        report = prune_checkpoint(src, dst, prune, subject.calibration, unit=unit, **settings)
        chosen.update(report.chosen)
        # By `taylor` two passes forward and one back; each candidate one forward, and a repair as much as four.
        passes = 8 if prune.criterion == "taylor" and unit != "layers" else 2
        repaired = (
            tokens * prune.repair / subject.calibration.num_sequences if unit != "layers" else 0
        )
        work = (passes * tokens + 8 * repaired) * report.params_before
        return round(work + 2 * tokens * end * len(report.candidates))

    return cut


def run(
    subject: Subject,
    schedule: Schedule,
    prune: Prune,
    stages: Sequence[dict[str, Any]],  # of each recovery; none: it is only pruned
    seed: int,
    folder: Path,  # with what an earlier call has left there, which is continued
    cut: Cut | None = None,  # default: as the prune step does, scored anew in each iteration
    layers_last: bool = False,  # the last iteration removes layers
) -> Trained:
    """Prune and recover by a schedule."""
    cut = cut or scored_anew(subject, prune, seed)
    dense = dimensions.static_cost(subject.model).params
    iterations = plan(schedule, prune)
    if layers_last:
        iterations[-1] = replace(iterations[-1], unit="layers")
    goals = [
        dense - int(iteration.progress * removal(dense, schedule.target))
        for iteration in iterations
    ]
    ends = {iteration.unit: goal for iteration, goal in zip(iterations, goals, strict=True)}
    at = subject.model
    tokens = flops = scoring = 0
    for iteration, goal in zip(iterations, goals, strict=True):
        pruned = folder / f"pruned-{iteration.index}"
        recovered = folder / f"recovered-{iteration.index}"
        done = folder / f"done-{iteration.index}"
        if not pruned.exists():
            partial = pruned.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            scoring += cut(at, partial, iteration.unit, goal, ends[iteration.unit])
            partial.rename(pruned)
        at = pruned
        if stages:
            budget = StageBudget(
                iteration.tokens, (), iteration.index, iteration.last, seed, token_weights(schedule)
            )
            training = folder / f"training-{iteration.index}"
            job = RecoveryJob(
                subject.data,
                budget,
                training,
                lambda metrics, step: None,
                teacher=subject.model,
                benchmark_items=subject.benchmark_items,
                chat=subject.chat,
            )
            if not done.exists():
                budgets = [planned.tokens for planned in iterations[: iteration.index]]
                recover_checkpoint(pruned, recovered, Recovery(stages=stages), budgets, job)
            at = recovered
            tokens += iteration.tokens
            flops += 6 * dimensions.static_cost(at).params * iteration.tokens
        done.touch()
        # gigabytes of optimizer state
        shutil.rmtree(folder / f"training-{iteration.index}", ignore_errors=True)
    return Trained(at, dimensions.static_cost(at).params, tokens, flops, scoring)
