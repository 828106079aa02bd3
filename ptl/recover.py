"""Give a cut model its reasoning back by light training. RECOVERIES is where a user extends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptl import launch, localfs, setting_checks
from ptl.config import MIN_TOKENS, Cpt, RecoverStage, Recovery
from ptl.distil import distil
from ptl.errors import InputError
from ptl.grpo import grpo
from ptl.importer import check_chats, check_rewards
from ptl.job import RecoverReport, RecoveryJob, StageBudget

__all__ = ["RECOVERIES", "RecoverReport", "RecoveryJob", "StageBudget", "budgets_before", "recover_checkpoint"]


def cpt(src: Path, dst: Path, settings: Cpt, job: RecoveryJob) -> RecoverReport:
    """Continual pre-training: next-token loss on the training data, through trl's SFTTrainer."""
    from ptl.nexttoken import sft_trainer, train

    return train(src, dst, settings, job, sft_trainer(), {})


RECOVERIES: dict[str, Callable[[Path, Path, Any, RecoveryJob], RecoverReport]] = {
    "cpt": cpt,
    "distil": distil,
    "grpo": grpo,
}


def recover_checkpoint(
    src: Path, dst: Path, recovery: Recovery, rounds: Sequence[int], job: RecoveryJob
) -> RecoverReport:
    """Run the stages one after another, on the tokens of this round in all, and write the result to `dst`.

    `rounds` are the tokens of the iterations up to this one. An earlier try in `job.scratch` is continued: finished
    stages are taken as they are, and the stage in which it died goes on from its last training checkpoint.
    """
    stages, budgets = recovery.stages, recovery.budgets(rounds[-1])
    for stage, budget in zip(stages, budgets, strict=True):
        launch.check(stage)
        if budget is not None and budget < MIN_TOKENS:
            raise InputError(
                f"schedule.recovery_tokens: {rounds[-1]} tokens for iteration {job.this.index} leave "
                f"{budget or 'none'} for {stage.method}, which needs {MIN_TOKENS}; raise it, or set "
                "schedule.tokens=uniform"
            )
    check_rewards(stages, job.data)  # of later stages too, before the first one trains
    check_chats(stages, job.data)
    setting_checks.check_stages(src, stages, job.teacher)
    dst.mkdir(parents=True, exist_ok=True)
    reports: list[RecoverReport] = []
    for i, stage in enumerate(stages):
        final = i == len(stages) - 1
        alone = len(stages) == 1
        scratch = job.scratch if alone else job.scratch / f"{i}-{stage.method}"
        out = dst if final else job.scratch / f"{i}-{stage.method}-out"
        this = dataclasses.replace(job.this, tokens=budgets[i], earlier=budgets_before(recovery, rounds, i))
        offset = sum(report.tokens for report in reports)
        here = dataclasses.replace(
            job,
            this=this,
            scratch=scratch,
            on_log=_shifted(job, offset, sum(report.steps for report in reports)),
            keep_optimizer_state=not (final and this.last),
            vault=job.vault and dataclasses.replace(job.vault, name=f"{job.vault.name}.{i}"),
        )
        reports.append(_stage(src, out, stage, here, final))
        src = out
    return reports[0] if len(reports) == 1 else _joined(reports)


def budgets_before(recovery: Recovery, rounds: Sequence[int], stage: int) -> tuple[int, ...]:
    """The token budgets that were taken from the data before a stage of the last of `rounds`."""
    earlier = [budget for tokens in rounds[:-1] for budget in recovery.budgets(tokens)]
    return tuple(budget for budget in (*earlier, *recovery.budgets(rounds[-1])[:stage]) if budget)


def _stage(src: Path, out: Path, stage: RecoverStage, job: RecoveryJob, final: bool) -> RecoverReport:
    """One stage; what a chain's earlier stage has finished is not done again."""
    done = out.with_name(f"{out.name}.json")  # beside the checkpoint: the next stage copies all files of its source
    if not final and done.is_file():
        report = json.loads(done.read_text())
        return RecoverReport(**report | {"curve": tuple(map(tuple, report["curve"]))})
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    processes = launch.processes_for(stage)
    if processes > 1 and launch.world_size() == 1:
        report = launch.run(src, out, stage, job, processes)
    else:
        report = RECOVERIES[stage.method](src, out, stage, job)
    if not final:
        localfs.replace(done, json.dumps(dataclasses.asdict(report)).encode())
    return report


def _shifted(job: RecoveryJob, tokens: int, steps: int) -> Callable[[dict[str, float], int], None]:
    """Metrics of a later stage, at steps and tokens after those of the stages before it."""

    def on_log(metrics: dict[str, float], step: int) -> None:
        if "num_input_tokens_seen" in metrics:
            metrics = metrics | {"num_input_tokens_seen": metrics["num_input_tokens_seen"] + tokens}
        job.on_log(metrics, step + steps)

    return on_log


def _joined(reports: Sequence[RecoverReport]) -> RecoverReport:
    """The report of a chain: tokens and steps add up; the stages' own reports are among the details."""
    curve: list[tuple[int, float]] = []
    for i, report in enumerate(reports):
        before = sum(earlier.tokens for earlier in reports[:i])
        curve += [(before + tokens, loss) for tokens, loss in report.curve]
    return RecoverReport(
        method="+".join(report.method for report in reports),
        tokens=sum(report.tokens for report in reports),
        steps=sum(report.steps for report in reports),
        curve=tuple(curve),
        resumed_at=next((report.resumed_at for report in reports if report.resumed_at), 0),
        seconds=sum(report.seconds for report in reports),
        details={"stages": [dataclasses.asdict(report) for report in reports]},
    )
