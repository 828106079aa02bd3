"""Restore a pruned model's reasoning by light training. RECOVERIES is where a user extends."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptl.config.recover import MIN_TOKENS, RecoverStage, Recovery
from ptl.data.stages import check_stages
from ptl.errors import InputError
from ptl.recovery import launch
from ptl.recovery.distillation import distil
from ptl.recovery.grpo import grpo
from ptl.recovery.job import REPORT, CheckpointStore, Log, RecoverReport, RecoveryJob
from ptl.recovery.sft import cpt
from ptl.storage import local_files

POLL = 2  # seconds between two looks into the store

# Each takes source, destination, its settings and the job
RECOVERIES: dict[str, Callable[[Path, Path, Any, RecoveryJob], RecoverReport]] = {
    "cpt": cpt,
    "distil": distil,
    "grpo": grpo,
}


def recover_checkpoint(
    src: Path,
    dst: Path,
    recovery: Recovery,
    iteration_tokens: Sequence[int],  # of the iterations up to this one
    job: RecoveryJob,
    stores: Sequence[CheckpointStore] = (),  # one for each stage; none: they stay on this machine
) -> RecoverReport:
    """Run the stages one after another, on the tokens of this iteration in all, and write the result to `dst`.

    An earlier attempt in `job.scratch` is resumed: finished stages are not repeated, and the stage in which it died
    continues from its last training checkpoint. Raises InputError before any work.
    """
    stages = recovery.stages
    budgets = recovery.budgets(iteration_tokens[-1])
    launch.check_batches(stages, job.machines)
    for stage, tokens in zip(stages, budgets, strict=True):
        if tokens is not None and tokens < MIN_TOKENS:
            raise InputError(
                f"{iteration_tokens[-1]} tokens for iteration {job.budget.iteration} leave {tokens or 'none'} "
                f"for {stage.method}, which needs {MIN_TOKENS}",
                field="schedule.recovery_tokens",
                remedy="raise it, or set schedule.tokens=uniform",
            )
    # of later stages too, before the first one trains
    check_stages(src, stages, job.teacher)
    dst.mkdir(parents=True, exist_ok=True)
    reports: list[RecoverReport] = []
    for i, stage in enumerate(stages):
        is_last_stage = i == len(stages) - 1
        earlier = budgets_before(recovery, iteration_tokens, i)
        folder = job.scratch / f"{i}-{stage.method}"
        # each stage has its own tokens, and its logs continue those of the stages before it
        stage_job = dataclasses.replace(
            job,
            budget=dataclasses.replace(job.budget, tokens=budgets[i], earlier=earlier),
            on_log=_after(reports, job.on_log),
            # no stage may resume from the training checkpoints of another
            scratch=folder if len(stages) > 1 else job.scratch,
            # after the run's last training nothing continues from it
            keep_optimizer_state=not (is_last_stage and job.budget.last),
            store=stores[i] if stores else None,
        )
        out = dst if is_last_stage else folder.with_name(f"{folder.name}-out")
        train = _train if is_last_stage else _train_once
        reports.append(train(src, out, stage, stage_job))
        src = out  # the next stage trains what this one writes
    return reports[0] if len(reports) == 1 else _joined(reports)


def budgets_before(
    recovery: Recovery, iteration_tokens: Sequence[int], stage: int
) -> tuple[int, ...]:
    """The token budgets that were taken from the data before a stage of the last of the iterations."""
    budgets = [recovery.budgets(tokens) for tokens in iteration_tokens]
    budgets[-1] = budgets[-1][:stage]
    # cpt and distil read the same data, one budget after another; grpo reads prompts of its own.
    return tuple(
        budget
        for of_iteration in budgets
        for settings, budget in zip(recovery.stages, of_iteration, strict=False)
        if budget and settings.method != "grpo"
    )


def _train_once(src: Path, out: Path, stage: RecoverStage, job: RecoveryJob) -> RecoverReport:
    """A chain's earlier stage, which an attempt that died later may have finished, here or on another machine."""
    # not in the checkpoint: the next stage copies all files of its source
    report_file = out.with_name(f"{out.name}.json")
    if not report_file.is_file():
        report = job.store.fetch_result(out) if job.store else None
        if report is None:
            report = REPORT.dump_json(_train(src, out, stage, job)).decode()
            if job.store:
                report = _handed_on(out, report, job.machines.first, job.store)
        local_files.replace(report_file, report.encode())
    return REPORT.validate_json(report_file.read_bytes())


def _handed_on(out: Path, report: str, is_first: bool, store: CheckpointStore) -> str:
    """What the first machine has written reaches the others by the store; its report."""
    if is_first:
        store.save_result(out, report)
        return report
    # the training has ended, so the first machine is storing it; if it dies, this one is ended too
    while (stored := store.fetch_result(out)) is None:
        time.sleep(POLL)
    return stored


def _train(src: Path, out: Path, stage: RecoverStage, job: RecoveryJob) -> RecoverReport:
    """One stage in as many processes as it asks for."""
    started = time.monotonic()
    # left by an attempt that died, whose training checkpoints are in job.scratch
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if job.store is not None:
        job.store.restore(job.scratch)
    for name in launch.FOREIGN:
        os.environ.pop(name, None)
    in_processes = launch.processes_of_all(stage, job.machines) > 1
    method = launch.run if in_processes else RECOVERIES[stage.method]
    report = method(src, out, stage, job)
    return dataclasses.replace(report, seconds=time.monotonic() - started)


def _after(reports: Sequence[RecoverReport], on_log: Log) -> Log:
    """The same log, with steps and tokens counted on from the stages that these reports are of."""
    tokens = sum(report.tokens for report in reports)
    steps = sum(report.steps for report in reports)

    def on_stage_log(metrics: dict[str, float], step: int) -> None:
        if "num_input_tokens_seen" in metrics:
            metrics = metrics | {"num_input_tokens_seen": metrics["num_input_tokens_seen"] + tokens}
        on_log(metrics, steps + step)

    return on_stage_log


def _joined(reports: Sequence[RecoverReport]) -> RecoverReport:
    """The report of a chain: tokens and steps add up; the stages' own reports are among the details."""
    # the earlier stages of a resumed chain are finished, and report their own attempts
    return RecoverReport(
        method="+".join(report.method for report in reports),
        tokens=sum(report.tokens for report in reports),
        steps=sum(report.steps for report in reports),
        resumed_at=next((report.resumed_at for report in reports if report.resumed_at), 0),
        details={"stages": [dataclasses.asdict(report) for report in reports]},
        seconds=sum(report.seconds for report in reports),
    )
