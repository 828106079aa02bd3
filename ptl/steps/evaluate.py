"""The evaluate step: a checkpoint is scored, and the gate decides which one the loop continues with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl.config.run import Evaluate, Gate
from ptl.config.schedule import Prune
from ptl.evaluation import gate, tasks
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.steps import takeover
from ptl.steps.call import Call, Metadata, passes_through, write_pointer
from ptl.steps.execution import execute
from ptl.steps.final_speed import beside_dense
from ptl.steps.iterations import schedule_of
from ptl.steps.machine import limit_threads
from ptl.steps.metrics import kubeflow_metrics
from ptl.steps.verdict import LoopSettings, Trial, decide
from ptl.storage import store
from ptl.storage.store import Pointer

MANY_TRUNCATED = 0.2  # share of a task's answers


def evaluate(call: Call) -> None:
    """Score the checkpoint, and decide which one continues: it, or the `fallback` that its iteration began with.

    The step that ends the loop also measures the final model's speed beside the dense one's. With the gate off there is
    no fallback, and the next iteration does not wait for the scores.
    """
    if passes_through(call, "accepted"):
        return
    step = call.step
    seed = call.settings["seed"]
    candidate = call.inputs["model"]
    fallback = call.inputs.get("fallback")
    settings = call.section(Evaluate, "evaluate")
    loop = _loop_settings(call)
    if step.arm == "loop" and step.iteration:
        # The pipeline was compiled with a fallback for each iteration, or with none.
        gate.check_structure(loop.gate, compiled=fallback is not None)
    # The scores depend on less than the verdict: another gate can take them over.
    scores_key = takeover.key(candidate.digest, {"evaluate": settings, "seed": seed}).digest

    def work(src: Path, dst: Path, run: StepRun) -> Metadata:
        limit_threads(candidate.params)
        scores = _scores(src, dst, run, scores_key, settings, seed, loop.gate)
        if step.name == "evaluate-0":
            _warn_of_truncated_answers(step.name, scores)
        # `dst` has the outcome of every item, which the gate compares.
        trial = Trial(step, run, loop, candidate, fallback, scores)
        verdict, accepted = decide(trial, dst)
        speed = {}
        if trial.ends_the_loop(accepted):
            _withdraw_later(run, step.iteration, loop.iterations)
            speed = beside_dense(step, run, accepted, settings, seed)
        return {
            "scores": scores,
            "checkpoint": dataclasses.asdict(candidate),
            "smallest_cuts": loop.smallest_cuts(src),
            "verdict": verdict,
            "accepted": dataclasses.asdict(accepted),
            "speed": speed,
            "seconds": scores["seconds"] + speed.get("seconds", 0.0),
            takeover.SCORES: scores_key,
        }

    run = step.start()  # before it ends: a run that has ended would be opened again
    record = execute(step, candidate, _key_settings(settings, loop, fallback, seed), work)
    write_pointer(call.outputs["accepted"], record["metadata"]["accepted"])
    # Kubeflow shows them in its table of runs.
    call.outputs["metrics"].metadata.update(kubeflow_metrics(record["metadata"], run))


def _withdraw_later(run: StepRun, iteration: int, iterations: int) -> None:
    """Steps that are not needed have no result: one may be of an attempt that got further, before data changed."""
    for later in range(iteration + 1, iterations + 1):
        for stage in ("prune", "recover", "evaluate"):
            store.withdraw(run.root, run.run, f"{stage}-{later}")


def _warn_of_truncated_answers(step: str, scores: Metadata) -> None:
    """Say that the dense model's answers are too long for a task: everything after it is compared with its accuracy."""
    for task in scores["tasks"]:
        if task["truncated"] > MANY_TRUNCATED:
            say(
                step,
                f"warning: {task['truncated']:.0%} of the dense model's answers on {task['task']} hit the token limit, "
                "so its accuracy says little; raise the task's max_new_tokens and start again",
            )


def _loop_settings(call: Call) -> LoopSettings:
    """What the verdict needs to know of the whole run, checked."""
    settings = call.settings
    return LoopSettings(
        settings["iterations"],
        schedule_of(call).target,
        call.section(Prune, "prune"),
        call.section(Gate, "gate"),
        settings["registered_model"],
    )


def _key_settings(settings: Evaluate, loop: LoopSettings, fallback: Pointer | None, seed: int) -> Metadata:
    """All that the verdict depends on, beside the candidate."""
    return {
        "evaluate": settings,
        "gate": loop.gate,
        "prune": loop.prune,
        "iterations": loop.iterations,
        "seed": seed,
        "target": loop.target,
        "fallback": fallback and fallback.digest,
        "state": fallback and fallback.gate,
    }


def _scores(
    src: Path,
    dst: Path,
    run: StepRun,
    scores_key: str,
    settings: Evaluate,
    seed: int,
    gate_settings: Gate,
) -> Metadata:
    """The scores of a checkpoint, whose files are written to `dst`: those of an earlier run, or new ones."""
    from ptl.evaluation.evaluate import evaluate_checkpoint

    # Of an earlier run's evaluation only the scores are taken: the verdict depends on more than the model.
    earlier = takeover.take(run, scores_key, dst)
    if earlier:
        scores = dict(earlier["scores"])
    else:
        scores = dataclasses.asdict(evaluate_checkpoint(src, dst, settings, seed=seed, speed=False))
    if gate_settings.enabled and scores["tasks"][0]["low"] is None:
        # The task's YAML did not say that it has no accuracy.
        raise tasks.no_accuracy(settings.tasks[0])
    return scores
