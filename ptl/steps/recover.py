"""The recover step: the pruned model is trained on one iteration's tokens."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.config.recover import Recovery, TrainingData
from ptl.config.run import check
from ptl.config.schedule import Prune, token_weights
from ptl.data import decontamination
from ptl.errors import WorkError
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.model import mlflow_flavor
from ptl.recovery import machines
from ptl.recovery.job import Log, progress
from ptl.steps import coordinator, takeover
from ptl.steps.call import Call, Metadata, Step, passes_through, write_pointer
from ptl.steps.execution import execute, take_part
from ptl.steps.inputs import benchmark_items, dense_model, fetch
from ptl.steps.iterations import iterations_until, schedule_of
from ptl.steps.machine import limit_threads, scratch
from ptl.storage.training_checkpoints import TrainingCheckpoints

if TYPE_CHECKING:
    from ptl.recovery.job import RecoverReport

STORE_MINUTES = 15.0  # between training checkpoints in the store, unless PTL_STORE_MINUTES says otherwise


def recover(call: Call) -> None:
    """Train the pruned model on this iteration's tokens."""
    if passes_through(call, "out"):
        return
    step = call.step
    parent = call.inputs["model"]
    iterations = iterations_until(call, Prune())  # what is pruned does not matter for the tokens
    iteration = iterations[-1]
    weights = token_weights(schedule_of(call))
    recovery = check(Recovery, {"stages": call.settings["recover"]}, "recover")
    data = call.section(TrainingData, "training")
    # By the run's id: an edge from import-model to each recovery would tell nobody anything.
    items = benchmark_items(step.start()) if data.decontaminate.tasks else None
    # All that the result depends on, beside the pruned model.
    settings = {
        "tokens": iteration.tokens,
        "weights": weights,
        "skip": iteration.tokens_before,
        "recover": recovery.stages,
        "training": data,
        "items": items and items.digest,
        "seed": call.settings["seed"],
    }
    training_key = takeover.key(parent.digest, settings).digest
    group = machines.machines()
    stores = _training_checkpoints(step, training_key, recovery)

    def work(src: Path, dst: Path, run: StepRun) -> Metadata:
        from ptl.recovery.job import RecoveryJob, StageBudget
        from ptl.recovery.recover import recover_checkpoint

        tracking.tag(run, {"tokens": iteration.tokens})
        limit_threads(parent.params)
        job = RecoveryJob(
            data,
            StageBudget(iteration.tokens, (), step.iteration, iteration.last, settings["seed"], weights),
            scratch(step.name) / f"training-{training_key[:12]}",  # with other settings it starts anew
            _reporter(run, iteration.tokens),
            teacher=_teacher(run, recovery),
            benchmark_items=fetch(items) if items else None,
            machines=group,
        )
        report = recover_checkpoint(src, dst, recovery, [planned.tokens for planned in iterations], job, stores)
        if not group.first:
            return {}  # the first one has the files
        mlflow_flavor.write(dst)
        counts = {**sequence_counts(step.name, report), **_decontaminated(step.name, report)}
        return {"params": parent.params, **dataclasses.asdict(report), **counts}

    if not group.first:
        take_part(step, parent, settings, work)
        return
    by_nodes = partial(coordinator.train, call) if coordinator.is_coordinator() else None
    record = execute(step, parent, settings, work, by_nodes=by_nodes)
    # Committed: nothing resumes this training any more.
    for stage_store in stores:
        stage_store.clear()
    write_pointer(call.outputs["out"], record["pointer"])


def _training_checkpoints(step: Step, key: str, recovery: Recovery) -> list[TrainingCheckpoints]:
    """Where the training checkpoints of each stage outlive the machine; none for a store on this machine's own disk.

    Nodes always have them: when one of them dies, new ones start from there, and a chain's stages are handed on there.
    """
    minutes = float(os.environ.get("PTL_STORE_MINUTES") or STORE_MINUTES)
    run = step.start()
    if run.root.startswith("file:") and not machines.is_node():
        return []
    return [
        TrainingCheckpoints(run.root, run.run, f"{step.name}.{i}", key, minutes) for i in range(len(recovery.stages))
    ]


def _reporter(run: StepRun, tokens: int) -> Log:
    """What a training calls with each log of its metrics: MLflow gets the numbers, the step's log a bar."""
    show = progress(partial(say, run.step), tokens)

    def on_log(metrics: dict[str, float], optimizer_step: int) -> None:
        # A group of their own beside the metrics of the step's result.
        train_metrics = {f"train/{name}": value for name, value in metrics.items()}
        tracking.log_metrics(run, train_metrics, optimizer_step)
        show(metrics, optimizer_step)

    return on_log


def _teacher(run: StepRun, recovery: Recovery) -> Path | None:
    """The imported dense model, where a stage distils from it. Raises WorkError where its record is gone."""
    if all(stage.method != "distil" for stage in recovery.stages):
        return None
    # Distillation learns from the model as it was before any pruning.
    dense = dense_model(run)
    if dense is None:
        raise WorkError(
            "the record of import-model is gone, and distil needs its model",
            field=f"run {run.run}",
            remedy="start a new run",
        )
    return fetch(dense)


def _stage_details(report: RecoverReport, name: str) -> list[Any]:
    """An entry of the details of each stage that has it."""
    # A chain has a report for each of its stages.
    stages = report.details.get("stages", [{"details": report.details}])
    return [stage["details"][name] for stage in stages if name in stage["details"]]


def sequence_counts(step: str, report: RecoverReport) -> Metadata:
    """Sequences that were trained on, those that max_length cut, and passes so far: for metrics and log of the step."""
    # GRPO trains on prompts.
    counts = {name: _stage_details(report, name) for name in ("sequences", "cut_sequences")}
    if not counts["cut_sequences"]:
        return {}
    totals = {name: sum(numbers) for name, numbers in counts.items()}
    if totals["cut_sequences"]:
        say(step, f"{totals['cut_sequences']:,} of {totals['sequences']:,} sequences were cut at recover.max_length")
    return {**totals, "passes": max(_stage_details(report, "passes"))}


def _decontaminated(step: str, report: RecoverReport) -> Metadata:
    """Training rows that were left out because a benchmark has them, for the step's metrics; a line each in its log."""
    counts = _stage_details(report, "decontaminated")
    # Without benchmarks to compare with there is nothing to say.
    if not counts:
        return {}
    for stage_counts in counts:
        say(step, decontamination.sentence(stage_counts))
    # Every stage compares its rows with the same items.
    most = decontamination.most(counts)
    return {
        "rows_compared": most["rows"],
        "rows_dropped": most["dropped"],
        "benchmark_items": most["items"],
        "benchmark_items_short": most["short"],
        "not_compared": sorted(set(most["not_compared"])),
    }
