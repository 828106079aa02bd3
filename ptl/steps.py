"""One step each: fetch -> work -> publish -> track. The only module that knows both the work and the store.

Each public function is the whole body of a pipeline component. Settings arrive as the component's parameters and are
checked again here. A step whose input says that the loop has stopped passes it through.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from ptl import __version__, aliases, gate, store, tracking, verdict
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
from ptl.errors import InputError
from ptl.execution import Facts, Step, artifact_root, execute, fetch, limit_threads, read, say, scratch, write
from ptl.store import Pointer


def import_model(
    name: str,
    experiment: str,
    out: Any,
    *,
    model: str,
    revision: str,
    schedule: Facts,
    prune: Facts,
    calibration: Facts,
    training: Facts,
    evaluate: Facts,
) -> None:
    """Check the dense model and all that the run will need of it, then publish it."""
    from ptl import importer

    folder, params = importer.preflight(
        model,
        revision or None,
        check(Schedule, schedule, "schedule"),
        check(Prune, prune, "prune"),
        check(Calibration, calibration, "calibration"),
        check(TrainingData, training, "training"),
        check(Evaluate, evaluate, "evaluate"),
    )

    def work(dst: Path, _run: tracking.StepRun) -> Facts:
        importer.import_checkpoint(str(folder), None, dst)
        return {
            "model": model,
            "revision": revision,
            "params": params,
            "versions": _versions(),
            "host": platform.node(),
        }

    step = Step(name, "loop", 0, experiment)
    record = execute(step, None, {"model": model, "revision": revision}, work)
    write(out, record["pointer"])


def prune(
    name: str,
    arm: str,
    iteration: int,
    experiment: str,
    model: Any,
    out: Any,
    *,
    schedule: Facts,
    prune: Facts,
    calibration: Facts,
    seed: int,
) -> None:
    """Remove this iteration's share of neurons or layers."""
    parent = read(model)
    if _passes_through(name, parent, out):
        return
    cuts, settings = check(Schedule, schedule, "schedule"), check(Prune, prune, "prune")
    scoring = check(Calibration, calibration, "calibration")
    this = _iteration(cuts, settings, iteration)
    total = removal(parent.original_params, cuts.target)
    goal = gate.goal(parent.params, parent.original_params - int(this.progress * total), parent.gate)

    def work(dst: Path, _run: tracking.StepRun) -> Facts:
        from ptl.prune import prune_checkpoint

        src = fetch(parent)
        limit_threads(parent.params)
        report = prune_checkpoint(src, dst, settings, scoring, unit=this.unit, goal=goal, seed=seed)
        return dataclasses.asdict(report)

    given = {"goal": goal, "unit": this.unit, "prune": settings, "calibration": scoring, "seed": seed}
    record = execute(Step(name, arm, iteration, experiment), parent, given, work)
    write(out, record["pointer"])


def recover(
    name: str,
    arm: str,
    iteration: int,
    experiment: str,
    model: Any,
    out: Any,
    *,
    schedule: Facts,
    recover: list[Facts],
    training: Facts,
    seed: int,
) -> None:
    """Train the cut model on this iteration's tokens."""
    parent = read(model)
    if _passes_through(name, parent, out):
        return
    cuts = check(Schedule, schedule, "schedule")
    rounds = [it.tokens for it in plan(cuts, Prune())][:iteration]
    this = _iteration(cuts, Prune(), iteration)
    recovery = check(Recovery, {"stages": recover}, "recover")
    data = check(TrainingData, training, "training")
    weights = tuple(1 if cuts.tokens == "uniform" else 2**i for i in range(cuts.iterations))
    given = {
        "tokens": this.tokens,
        "weights": list(weights),
        "skip": this.tokens_before,
        "recover": list(recovery.stages),
        "training": data,
        "seed": seed,
    }
    step = Step(name, arm, iteration, experiment)
    vault = _vault(step, parent, given, recovery)

    def work(dst: Path, run: tracking.StepRun) -> Facts:
        from ptl.job import Job, Round
        from ptl.recover import recover_checkpoint

        src = fetch(parent)
        limit_threads(parent.params)

        def on_log(metrics: dict[str, float], step: int) -> None:
            tracking.log_metrics(run, {f"train/{key}": value for key, value in metrics.items()}, step)
            if line := _progress(metrics, this.tokens):
                say(name, line)

        here = Round(this.tokens, (), iteration, this.last, seed, weights)
        teacher = _original(run) if any(stage.method == "distil" for stage in recovery.stages) else None
        scored = _scored(run) if data.decontaminate.tasks else None
        job = Job(data, here, scratch(name) / "training", on_log, teacher, vault, scored)
        report = recover_checkpoint(src, dst, recovery, rounds, job)
        return {"params": parent.params} | dataclasses.asdict(report) | _dropped(name, report)

    record = execute(step, parent, given, work)
    if vault is not None:
        from ptl import preempt

        preempt.clear(vault, len(recovery.stages))
    write(out, record["pointer"])


def _vault(step: Step, parent: Pointer, given: Facts, recovery: Recovery) -> Any:
    """Where training checkpoints outlive the machine, when a stage wants that."""
    minutes = [stage.store_minutes for stage in recovery.stages if stage.store_minutes is not None]
    if not minutes:
        return None
    from ptl import preempt

    run = tracking.start(
        step.experiment, step.name, arm=step.arm, iteration=step.iteration, artifact_location=artifact_root()
    )
    return preempt.Vault(run.root, run.run, step.name, preempt.key_of(parent.digest, given), min(minutes))


def _original(run: tracking.StepRun) -> Path | None:
    """The imported dense model, which distillation learns from."""
    record = store.committed(run.root, run.run, "import-model")
    return fetch(Pointer(**record["pointer"])) if record is not None else None


def _scored(run: tracking.StepRun) -> Path | None:
    """What the run's first evaluation wrote: its items are those that must not be trained on."""
    record = store.committed(run.root, run.run, "evaluate-0")
    return fetch(Pointer(**record["pointer"])) if record is not None else None


def _dropped(name: str, report: Any) -> Facts:
    """Training rows that were left out because a benchmark has them; said, and numbers among the step's metrics."""
    stages = report.details.get("stages", [{"details": report.details}])
    found = [stage["details"]["decontaminated"] for stage in stages if "decontaminated" in stage["details"]]
    for told in found:
        say(name, f"{told['dropped']} of {told['rows']} training rows left out: they share text with a benchmark")
        if told["not_compared"]:
            say(name, f"training data not compared with {', '.join(told['not_compared'])}: its items are not known")
    if not found:
        return {}
    return {
        "rows_compared": sum(told["rows"] for told in found),
        "rows_dropped": sum(told["dropped"] for told in found),
        "not_compared": sorted({benchmark for told in found for benchmark in told["not_compared"]}),
    }


def _progress(metrics: dict[str, float], tokens: int) -> str:
    """The line of progress for one log of a training; empty where there is nothing to say."""
    if "reward" in metrics:
        return f"reward {metrics['reward']:.3f}, answers of {metrics['completions/mean_length']:.0f} tokens"
    if "loss" in metrics and "num_input_tokens_seen" in metrics:
        return f"{metrics['num_input_tokens_seen']:,.0f} of {tokens:,} tokens, loss {metrics['loss']:.4f}"
    return ""


def evaluate(
    name: str,
    arm: str,
    iteration: int,
    experiment: str,
    model: Any,
    fallback: Any,
    out: Any,
    accepted: Any,
    metrics: Any,
    *,
    iterations: int,
    target: float,
    prune: Facts,
    evaluate: Facts,
    gate_settings: Facts,
    seed: int,
    registered_model: str,
) -> None:
    """Score the checkpoint, and decide which one goes on: it, or the `fallback` that its iteration began with.

    The step that ends the loop also measures the final model's speed beside the dense one's.
    """
    candidate, before = read(model), read(fallback)
    if _passes_through(name, candidate, out, accepted):
        return
    settings, rule = check(Evaluate, evaluate, "evaluate"), check(Gate, gate_settings, "gate")
    whole = verdict.Plan(iterations, target, check(Prune, prune, "prune"))
    step = Step(name, arm, iteration, experiment)

    def work(dst: Path, run: tracking.StepRun) -> Facts:
        from ptl import tasks
        from ptl.evaluate import evaluate_checkpoint

        tasks.check_gate(settings, rule)
        src = fetch(candidate)
        limit_threads(candidate.params)
        scores = evaluate_checkpoint(src, dst, settings, seed=seed, speed=False)
        if rule.enabled and scores.tasks[0].low is None:  # the task's YAML did not tell
            raise tasks.no_accuracy(settings.tasks[0])
        decided, onward = verdict.decide(step, run, rule, whole, candidate, before, dst, registered_model)
        ends = verdict.ends_the_loop(step, whole, onward)
        speed = verdict.beside_dense(step, run, onward, settings, seed) if ends else {}
        return {
            "scores": dataclasses.asdict(scores),
            "checkpoint": dataclasses.asdict(candidate),
            "smallest_cuts": whole.smallest_cuts(src),
            "verdict": decided,
            "accepted": dataclasses.asdict(onward),
            "speed": speed,
            "seconds": scores.seconds + speed.get("seconds", 0.0),
        }

    given = {"evaluate": settings, "gate": rule, "prune": whole.prune, "iterations": iterations, "seed": seed}
    record = execute(step, candidate, given, work)
    facts = record["facts"]
    write(out, record["pointer"])
    write(accepted, facts["accepted"])
    first = facts["scores"]["tasks"][0]
    for key in ("accuracy", "low", "high", "items"):
        metrics.log_metric(key, first[key])
    metrics.log_metric("params", facts["scores"]["params"])
    metrics.metadata["verdict"] = facts["verdict"]["decision"]


def report(
    name: str,
    experiment: str,
    names: list[str],
    final: Any,
    html: Any,
    markdown: Any,
    *,
    settings: Facts,
    registered_model: str,
) -> None:
    """Write the run's pages and result.json from the records of its steps; name the best and smallest version."""
    from ptl import report as pages
    from ptl.evaluate import read_items

    last = read(final)
    config = check(Config, settings, "settings").model_dump(mode="json")
    run = tracking.start(experiment, name, arm="loop", iteration=0, artifact_location=artifact_root())
    found = {other: store.committed(run.root, run.run, other) for other in names}
    records = {other: record for other, record in found.items() if record is not None}
    folder = scratch(name) / "report"
    for record in records.values():
        if record["facts"]["stage"] == "evaluate":
            record["facts"]["items"] = read_items(fetch(Pointer(**record["pointer"])))
    result = pages.write_report(records, {**config, **tracking.links(run)}, folder)
    tracking.log_report(run, sorted(folder.iterdir()))
    for sentence in aliases.set_aliases(run, records, registered_model, check(Gate, config["gate"], "gate")):
        say(name, sentence)
    Path(html.path).write_text((folder / "report.html").read_text())
    Path(markdown.path).write_text((folder / "report.md").read_text())
    shared = os.environ.get("PTL_RUN_DIR")
    if shared:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "result.json"):  # it says that all is there
            shutil.copyfile(path, Path(shared, path.name))
    metrics = {"share_removed": result["final"]["share_removed"], "params": result["final"]["params"]}
    tracking.finish(run, params={}, metrics=metrics, inputs=[last.model_id], output=None, step=0)


def _passes_through(name: str, pointer: Pointer, *outs: Any) -> bool:
    """Whether the loop has stopped: then the input is the output, at once."""
    state = gate.State.load(pointer.gate)
    if state.stopped:
        say(name, f"not needed, its input is passed through: {state.reason}")
    for out in outs if state.stopped else ():
        write(out, dataclasses.asdict(pointer))
    return state.stopped


def _iteration(schedule: Schedule, pruning: Prune, index: int) -> Iteration:
    rounds = plan(schedule, pruning)
    if not 1 <= index <= len(rounds):
        raise InputError(f"iteration: {index} is outside 1..{len(rounds)}, the rounds of this schedule")
    return rounds[index - 1]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors")
    return {"ptl": __version__, "python": platform.python_version()} | {name: version(name) for name in names}
