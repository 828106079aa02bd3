"""The recover step: the pruned model is trained on one iteration's tokens."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import TYPE_CHECKING

from ptl.config.chat import Chat
from ptl.config.data import TrainingData
from ptl.config.recover import Recovery
from ptl.config.run import check
from ptl.config.schedule import Iteration, Prune, token_weights
from ptl.data import decontamination
from ptl.errors import PtlError
from ptl.lineage import mlflow_client, tracking
from ptl.log import say
from ptl.model import checkpoint
from ptl.recovery.job import Log, RecoveryJob, StageBudget, is_node, machines, progress
from ptl.steps import answers, coordinator, records
from ptl.steps.call import BENCHMARK_ITEMS, Call, Metadata, iterations_until, schedule_of
from ptl.steps.step import Step, is_coordinator, scratch
from ptl.storage.training_checkpoints import TrainingCheckpoints

if TYPE_CHECKING:
    from ptl.recovery.job import RecoverReport

COUNTED = ("sequences", "cut_sequences", "passed_over")  # of a stage's data
# between training checkpoints in the store, unless PTL_STORE_MINUTES says otherwise
STORE_MINUTES = 15.0


def recover(call: Call) -> None:
    """Train the pruned model on this iteration's tokens."""
    if call.stopped:
        return call.pass_through()
    schedule = schedule_of(call)
    # what is pruned does not matter for the tokens
    iterations = iterations_until(call.iteration, schedule, Prune())
    recovery = check(Recovery, {"stages": call.settings["recover"]}, "recover")
    data = call.section(TrainingData, "training")
    key = {
        "tokens": iterations[-1].tokens,
        "weights": token_weights(schedule),
        "skip": iterations[-1].tokens_before,
        "recover": recovery.stages,
        "training": data,
        "chat": call.section(Chat, "chat"),
        "seed": call.settings["seed"],
    }
    # The items by the run's records: an edge from import-model to each recovery would say nothing to anybody.
    reads = [*([BENCHMARK_ITEMS] if data.decontaminate.tasks else []), *answers.reads(data)]
    with Step(call, key=key, reads=reads) as step:
        stores = _training_checkpoints(step, recovery)
        if step.record is None and is_coordinator():
            begin, note = partial(records.begin, step.run), partial(records.note_nodes, step.run)
            coordinator.train(call.step, call.dump(), begin, note)
            step.take_result_of_nodes()
        elif step.record is None:
            from ptl.recovery.recover import recover_checkpoint

            source = step.fetch_model()
            tokens = [iteration.tokens for iteration in iterations]
            job = _job(step, recovery, iterations[-1])
            stages = recovery if data.answers == "given" else with_prompts(recovery, data)
            report = recover_checkpoint(source, step.folder, stages, tokens, job, stores)
            # Of several nodes the first one has the files.
            if job.machines.first:
                checkpoint.write_mlflow_model(step.folder)
                step.publish(_metadata(call, report))
        # Committed: nothing resumes this training any more.
        if step.record is not None and machines().first:
            for stage_store in stores:
                stage_store.clear()
    return None


def with_prompts(recovery: Recovery, data: TrainingData) -> Recovery:
    """The stages with the rows' prompts for reinforcement learning: own answers have nothing to compare with."""
    first = data.prompted[0]
    return Recovery(
        stages=tuple(
            stage.model_copy(update={"prompts": stage.prompts or first})
            if stage.method == "grpo"
            else stage
            for stage in recovery.stages
        )
    )


def _training_checkpoints(step: Step, recovery: Recovery) -> list[TrainingCheckpoints]:
    """Where the training checkpoints of each stage outlive the machine; none for a store on this machine's own disk.

    Nodes always have them: when one of them dies, new ones start from there, and a chain's stages are handed on there.
    """
    minutes = float(os.environ.get("PTL_STORE_MINUTES") or STORE_MINUTES)
    run = step.run
    if run.root.startswith("file:") and not is_node():
        return []
    return [
        TrainingCheckpoints(run.root, run.run, f"{run.step}.{i}", step.key.digest, minutes)
        for i in range(len(recovery.stages))
    ]


def _job(step: Step, recovery: Recovery, iteration: Iteration) -> RecoveryJob:
    """What a training is given beside the model and its stages."""
    call, settings = step.call, step.settings
    data: TrainingData = settings["training"]
    if data.answers == "self":
        from ptl.recovery.answers import in_place_of

        own = in_place_of(data.sources, answers.folder(step), settings["chat"])
        data = data.model_copy(update={"sources": own})
    tracking.tag(step.run, {"tokens": iteration.tokens})
    # Distillation learns from the model as it was before any pruning, or from a teacher of its own.
    distils = any(stage.method == "distil" and not stage.teacher for stage in recovery.stages)
    budget = StageBudget(
        iteration.tokens, (), call.iteration, iteration.last, settings["seed"], settings["weights"]
    )
    return RecoveryJob(
        data,
        budget,
        # with other settings it starts anew
        scratch(call.step) / f"training-{step.key.digest[:12]}",
        _reporter(step, iteration.tokens),
        teacher=step.fetch(step.committed("import-model").pointer) if distils else None,
        benchmark_items=step.fetch(step.committed(BENCHMARK_ITEMS).pointer)
        if data.decontaminate.tasks
        else None,
        machines=machines(),
        chat=settings["chat"],
    )


def _reporter(step: Step, tokens: int) -> Log:
    """What a training calls with each log of its metrics: MLflow gets the numbers, the step's log a bar."""
    show = progress(partial(say, step.run.step), tokens)

    def on_log(metrics: dict[str, float], optimizer_step: int) -> None:
        # A group of their own beside the metrics of the step's result.
        train_metrics = {f"train/{name}": value for name, value in metrics.items()}
        try:
            with mlflow_client.briefly():
                tracking.log_metrics(step.run, train_metrics, optimizer_step)
        except PtlError as error:
            say(
                step.run.step,
                f"warning: MLflow has no metrics of optimizer step {optimizer_step}: {error}",
            )
        show(metrics, optimizer_step)

    return on_log


def _metadata(call: Call, report: RecoverReport) -> Metadata:
    """The report for the step's record, with what its stages counted of their data."""
    # A chain has a report for each of its stages.
    stages = report.details.get("stages", [{"details": report.details}])
    details = [stage["details"] for stage in stages]
    return {
        "params": call.inputs["model"].params,
        **dataclasses.asdict(report),
        **sequence_counts(call.step, details),
        **_decontaminated(call.step, details),
    }


def sequence_counts(step: str, stages: list[Metadata]) -> Metadata:
    """Sequences that were trained on, those that max_length cut, and passes so far: for metrics and log of the step."""
    # GRPO trains on prompts.
    trained = [details for details in stages if "sequences" in details]
    if not trained:
        return {}
    counts = {name: sum(details[name] for details in trained) for name in COUNTED}
    if counts["cut_sequences"]:
        say(
            step,
            "{cut_sequences:,} of {sequences:,} sequences were cut at recover.max_length".format(
                **counts
            ),
        )
    if counts["passed_over"]:
        say(
            step,
            f"{counts['passed_over']:,} rows were passed over: blank, also in a benchmark, or with a prompt that fills "
            "recover.max_length",
        )
    return counts | {"passes": max(details["passes"] for details in trained)}


def _decontaminated(step: str, stages: list[Metadata]) -> Metadata:
    """Training rows that were left out because a benchmark has them, for the step's metrics; a line each in its log."""
    counts = [details["decontaminated"] for details in stages if "decontaminated" in details]
    for stage_counts in counts:
        say(step, decontamination.sentence(stage_counts))
    # Without benchmarks to compare with there is nothing to say.
    if not counts:
        return {}
    # Every stage compares its rows with the same items.
    most = decontamination.most(counts)
    return {name: value for name, value in most.items() if name != "examples"}
