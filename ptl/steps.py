"""One step each: fetch -> work -> publish -> track. The only module that knows both the work and the store.

Each function of STEPS is the whole body of a pipeline component. Settings arrive as the component's parameters and are
checked again here. A step whose input says that its arm has stopped passes it through.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl import (
    __version__,
    aliases,
    attempts,
    dag,
    decontaminate,
    gate,
    localfs,
    preempt,
    provenance,
    run_page,
    store,
    takeover,
    tracking,
    verdict,
)
from ptl.config import (
    Calibration,
    Config,
    Evaluate,
    Gate,
    Iteration,
    Prune,
    Recovery,
    Schedule,
    TrainingData,
    check,
    plan,
    removal,
)
from ptl.errors import InputError, WorkError
from ptl.execution import (
    Call,
    Metadata,
    Output,
    Step,
    begin,
    execute,
    fetch,
    flat,
    limit_threads,
    noting_errors,
    scratch,
    write,
)
from ptl.log import say
from ptl.revision import revision
from ptl.run_status import StepRun
from ptl.store import Pointer

SCHEDULE = ("iterations", "target", "cuts", "recovery_tokens", "tokens")


def doctor(call: Call) -> None:
    """Try out MLflow, the store and the accelerators before anything expensive."""
    from ptl import doctor as work

    work.task(call.settings["settings"], call.step.experiment)


def import_model(call: Call) -> None:
    """Check the dense model and all that the run will need of it, then publish it."""
    from ptl import importer
    from ptl.import_checkpoint import import_checkpoint

    settings = call.settings
    rule = check(Gate, settings["gate"], "gate")
    gate.check_structure(rule, settings["gated"])
    source = {"model": settings["model"], "revision": settings["revision"]}
    schedule, pruning = _schedule(call), check(Prune, settings["prune"], "prune")
    calibration = check(Calibration, settings["calibration"], "calibration")
    training = check(TrainingData, settings["training"], "training")
    scoring = check(Evaluate, settings["evaluate"], "evaluate")
    folder, body = importer.preflight(
        source["model"], source["revision"] or None, schedule, pruning, calibration, training, scoring
    )

    def work(dst: Path, run: StepRun) -> Metadata:
        model = {"path": source["model"], "revision": source["revision"] or None}
        sections = {"schedule": schedule, "prune": pruning, "calibration": calibration, "training": training}
        sections |= {"evaluate": scoring, "gate": rule}
        written = {"model": model, **{name: section.model_dump(mode="json") for name, section in sections.items()}}
        data = provenance.data_sets(calibration, training, scoring)
        run_page.describe(run, flat(written), revision(), data)
        import_checkpoint(str(folder), None, dst)
        return {**source, "params": body.params, "versions": _versions(), "host": platform.node()}

    title = settings["run_name"] if attempts.on_a_cluster() else None
    record = execute(call.step, None, source, work, title=title)
    write(call.outputs["out"], record["pointer"])


def prune(call: Call) -> None:
    """Remove this iteration's share of neurons or layers."""
    parent = call.inputs["model"]
    if _passes_through(call.step, parent, call.outputs["out"]):
        return
    schedule, settings = _schedule(call), check(Prune, call.settings["prune"], "prune")
    scoring, seed = check(Calibration, call.settings["calibration"], "calibration"), call.settings["seed"]
    this = _iteration(schedule, settings, call.step.iteration)
    total = removal(parent.original_params, schedule.target)
    goal = gate.goal(parent.params, parent.original_params - int(this.progress * total), parent.gate)

    def work(dst: Path, _run: StepRun) -> Metadata:
        from ptl.prune import prune_checkpoint

        src = fetch(parent)
        limit_threads(parent.params)
        report = prune_checkpoint(src, dst, settings, scoring, unit=this.unit, goal=goal, seed=seed)
        return dataclasses.asdict(report)

    given = {"goal": goal, "unit": this.unit, "prune": settings, "calibration": scoring, "seed": seed}
    record = execute(call.step, parent, given, takeover.or_taken(work, takeover.key(parent.digest, given)))
    write(call.outputs["out"], record["pointer"])


def recover(call: Call) -> None:
    """Train the pruned model on this iteration's tokens."""
    step, parent, scored = call.step, call.inputs["model"], call.inputs["scored"]
    if _passes_through(step, parent, call.outputs["out"]):
        return
    schedule, seed = _schedule(call), call.settings["seed"]
    rounds = [it.tokens for it in plan(schedule, Prune())][: step.iteration]
    this = _iteration(schedule, Prune(), step.iteration)
    recovery = check(Recovery, {"stages": call.settings["recover"]}, "recover")
    data = check(TrainingData, call.settings["training"], "training")
    weights = tuple(1 if schedule.tokens == "uniform" else 2**i for i in range(schedule.iterations))
    given = {
        "tokens": this.tokens,
        "weights": list(weights),
        "skip": this.tokens_before,
        "recover": list(recovery.stages),
        "training": data,
        "seed": seed,
    }
    key = preempt.key_of(parent.digest, given)
    checkpoints = _training_checkpoints(step, key, recovery)

    def work(dst: Path, run: StepRun) -> Metadata:
        from ptl.job import RecoveryJob, StageBudget
        from ptl.recover import recover_checkpoint

        tracking.tag(run, {"tokens": this.tokens})
        src = fetch(parent)
        limit_threads(parent.params)

        def on_log(metrics: dict[str, float], step_number: int) -> None:
            tracking.log_metrics(run, {f"train/{key}": value for key, value in metrics.items()}, step_number)
            if line := _progress(metrics, this.tokens):
                say(step.name, line)

        here = StageBudget(this.tokens, (), step.iteration, this.last, seed, weights)
        teacher = _original(run) if any(stage.method == "distil" for stage in recovery.stages) else None
        items = fetch(scored) if data.decontaminate.tasks else None
        training = scratch(step.name) / f"training-{key[:12]}"
        job = RecoveryJob(data, here, training, on_log, teacher=teacher, scored=items)
        report = recover_checkpoint(src, dst, recovery, rounds, job, checkpoints)
        return {"params": parent.params} | dataclasses.asdict(report) | _dropped(step.name, report)

    record = execute(step, parent, given, takeover.or_taken(work, takeover.key(parent.digest, given)))
    for stage_checkpoints in checkpoints:
        stage_checkpoints.clear()
    write(call.outputs["out"], record["pointer"])


def _training_checkpoints(step: Step, key: str, recovery: Recovery) -> list[preempt.TrainingCheckpoints]:
    """Where the training checkpoints of each stage outlive the machine; empty where no stage wants that."""
    minutes = [stage.store_minutes for stage in recovery.stages if stage.store_minutes is not None]
    if not minutes:
        return []
    run = step.start()
    names = [f"{step.name}.{i}" for i in range(len(recovery.stages))]
    return [preempt.TrainingCheckpoints(run.root, run.run, name, key, min(minutes)) for name in names]


def _original(run: StepRun) -> Path:
    """The imported dense model, which distillation learns from."""
    record = store.committed(run.root, run.run, "import-model")
    if record is None:
        raise WorkError(
            f"run {run.run}: the record of import-model is gone, and distil needs its model; start a new run"
        )
    return fetch(Pointer(**record["pointer"]))


def _dropped(name: str, report: Any) -> Metadata:
    """Training rows that were left out because a benchmark has them; said, and numbers among the step's metrics."""
    stages = report.details.get("stages", [{"details": report.details}])
    found = [stage["details"]["decontaminated"] for stage in stages if "decontaminated" in stage["details"]]
    for counts in found:
        say(name, decontaminate.sentence(counts))
    if not found:
        return {}
    most = decontaminate.most(found)
    return {
        "rows_compared": most["rows"],
        "rows_dropped": most["dropped"],
        "benchmark_items": max(counts["items"] for counts in found),  # the same ones in every stage
        "benchmark_items_short": max(counts["short"] for counts in found),
        "not_compared": sorted({benchmark for counts in found for benchmark in counts["not_compared"]}),
    }


def _progress(metrics: dict[str, float], tokens: int) -> str:
    """The line of progress for one log of a training; empty where there is nothing to say."""
    if "reward" in metrics:
        return f"reward {metrics['reward']:.3f}, answers of {metrics['completions/mean_length']:.0f} tokens"
    if "loss" in metrics and "num_input_tokens_seen" in metrics:
        return f"{metrics['num_input_tokens_seen']:,.0f} of {tokens:,} tokens, loss {metrics['loss']:.4f}"
    return ""


def evaluate(call: Call) -> None:
    """Score the checkpoint, and decide which one continues: it, or the `fallback` that its iteration began with.

    The step that ends the loop also measures the final model's speed beside the dense one's. With the gate off there is
    no fallback, and the next iteration does not wait for the scores.
    """
    step, candidate, before = call.step, call.inputs["model"], call.inputs.get("fallback")
    outputs = call.outputs
    if _passes_through(step, candidate, outputs["scores"], outputs["accepted"]):
        return
    settings = check(Evaluate, call.settings["evaluate"], "evaluate")
    rule, seed = check(Gate, call.settings["gate"], "gate"), call.settings["seed"]
    if step.arm == "loop" and step.iteration:
        gate.check_structure(rule, compiled=before is not None)
    whole = verdict.Plan(
        call.settings["iterations"], call.settings["target"], check(Prune, call.settings["prune"], "prune")
    )

    content_key = takeover.key(candidate.digest, {"evaluate": settings, "seed": seed})

    def work(dst: Path, run: StepRun) -> Metadata:
        from ptl import tasks
        from ptl.evaluate import evaluate_checkpoint

        tasks.check_gate(settings, rule)
        src = fetch(candidate)
        limit_threads(candidate.params)
        # Of an earlier run's evaluation only the scores are taken: the verdict depends on more than the model.
        earlier = takeover.take(run, content_key, dst)
        if earlier is None:
            scores = dataclasses.asdict(evaluate_checkpoint(src, dst, settings, seed=seed, speed=False))
        else:
            scores = earlier["scores"]
        if rule.enabled and scores["tasks"][0]["low"] is None:  # the task's YAML did not tell
            raise tasks.no_accuracy(settings.tasks[0])
        registered = call.settings["registered_model"]
        decided, onward = verdict.decide(step, run, rule, whole, candidate, before, dst, registered)
        ends = verdict.ends_the_loop(step, whole, onward)
        speed = verdict.beside_dense(step, run, onward, settings, seed) if ends else {}
        return {
            "scores": scores,
            "checkpoint": dataclasses.asdict(candidate),
            "smallest_cuts": whole.smallest_cuts(src),
            "verdict": decided,
            "accepted": dataclasses.asdict(onward),
            "speed": speed,
            "seconds": scores["seconds"] + speed.get("seconds", 0.0),
            takeover.KEY: content_key,
        }

    given = {"evaluate": settings, "gate": rule, "prune": whole.prune, "iterations": whole.iterations, "seed": seed}
    given |= {"target": whole.target, "fallback": before and before.digest, "state": before and before.gate}
    record = execute(step, candidate, given, work)
    write(outputs["scores"], record["pointer"])
    write(outputs["accepted"], record["metadata"]["accepted"])
    outputs["metrics"].metadata.update(_shown(record["metadata"]))


def _shown(metadata: Metadata) -> Metadata:
    """What Kubeflow's table of a run's metrics has of an evaluation."""
    first = metadata["scores"]["tasks"][0]
    numbers = {key: first[key] for key in ("accuracy", "low", "high", "items") if first[key] is not None}
    return {**numbers, "params": metadata["scores"]["params"], "verdict": metadata["verdict"]["decision"]}


def report(call: Call) -> None:
    """Write the run's pages and result.json from the records of its steps; name the best and smallest version."""
    run = call.step.start()
    with noting_errors(run):
        begin(run)
        _report(call, run)


def _report(call: Call, run: StepRun) -> None:
    from ptl import report as pages
    from ptl.evaluate import read_items

    step, final, control = call.step, call.inputs["final"], call.inputs.get("control")
    config = check(Config, _whole(call.settings), "settings")
    names = [node.name for node in dag.nodes(config) if dag.stage_of(node.name) not in ("doctor", "report")]
    found = {name: store.committed(run.root, run.run, name) for name in names}
    records = {name: record for name, record in found.items() if record is not None}
    folder = scratch(step.name) / "report"
    for record in records.values():
        if record["metadata"]["stage"] == "evaluate":
            record["metadata"]["items"] = read_items(fetch(Pointer(**record["pointer"])))
    stopped = gate.State.load(control.gate) if control else gate.State()
    settings = {**config.model_dump(mode="json"), **tracking.links(run), "control_failed": stopped.reason}
    result = pages.write_report(records, settings, folder)
    tracking.log_report(run, sorted(folder.iterdir()))
    run_page.describe(run, flat(config.model_dump(mode="json")))  # what import-model was not given
    run_page.log_result(run, run_page.result_metrics(result))
    for sentence in aliases.set_aliases(run, records, call.settings["registered_model"], config.gate):
        say(step.name, sentence)
    for name, page in (("html", "report.html"), ("markdown", "report.md")):
        shutil.copyfile(folder / page, call.outputs[name].path)
    shared = os.environ.get("PTL_RUN_DIR")
    if shared:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "result.json"):  # it says that all is there
            localfs.replace(Path(shared, path.name), path.read_bytes())
    # What it has written may differ after a retry; that all steps had ended, which the record says, does not.
    ended = {"key": "report", "pointer": dataclasses.asdict(final), "metadata": {"stage": "report"}}
    store.commit(run.root, run.run, step.name, ended)
    metrics = {"share_removed": result["final"]["share_removed"], "params": result["final"]["params"]}
    tracking.finish(run, params={}, metrics=metrics, inputs=[final.model_id], output=None, step=0)


def _whole(settings: Metadata) -> Metadata:
    """The config of the run: the compiled one, with the run's own parameters."""
    compiled = settings["settings"]
    schedule = {name: settings[name] for name in SCHEDULE if name in settings}
    sections = ("seed", "prune", "calibration", "recover", "training", "evaluate", "gate")
    return {
        **compiled,
        "model": {"path": settings["model"], "revision": settings["revision"] or None},
        "schedule": {**compiled["schedule"], **schedule},
        **{name: settings[name] for name in sections},
    }


STEPS: dict[str, Callable[[Call], None]] = {
    "doctor": doctor,
    "import": import_model,
    "prune": prune,
    "recover": recover,
    "evaluate": evaluate,
    "report": report,
}


def _passes_through(step: Step, pointer: Pointer, *outputs: Output) -> bool:
    """Whether the arm has stopped: then the input is the output, at once."""
    state = gate.State.load(pointer.gate)
    if state.stopped:
        say(step.name, f"not needed, its input is passed through: {state.reason}")
        for output in outputs:
            write(output, dataclasses.asdict(pointer))
    return state.stopped


def _schedule(call: Call) -> Schedule:
    """The part of the schedule that a step is given: prune the sizes, recover the tokens, import all of it."""
    unused = {"target": 0.5, "recovery_tokens": 0}  # fields that have no default
    return check(
        Schedule, unused | {name: call.settings[name] for name in SCHEDULE if name in call.settings}, "schedule"
    )


def _iteration(schedule: Schedule, pruning: Prune, index: int) -> Iteration:
    rounds = plan(schedule, pruning)
    if not 1 <= index <= len(rounds):
        raise InputError(f"iteration: {index} is outside 1..{len(rounds)}, the rounds of this schedule")
    return rounds[index - 1]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors")
    return {"ptl": __version__, "python": platform.python_version()} | {name: version(name) for name in names}
