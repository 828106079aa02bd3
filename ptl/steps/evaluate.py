"""The evaluate step: a checkpoint is scored, and the gate decides which one the loop continues with."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from ptl.config.chat import Chat
from ptl.config.run import Evaluate, Gate
from ptl.config.schedule import Prune, plan, removal
from ptl.evaluation import gate, paired, retention, tasks
from ptl.evaluation.generation import MANY_TRUNCATED
from ptl.evaluation.retention import TextLosses
from ptl.lineage import mlflow_objects, tracking
from ptl.log import say
from ptl.model import checkpoint, widths
from ptl.model.dimensions import ModelDimensions, model_dimensions, smallest_cuts
from ptl.model.families import family_of
from ptl.steps.call import Call, Metadata, key_of, schedule_of
from ptl.steps.records import kubeflow_metrics, score_tags
from ptl.steps.step import Step
from ptl.storage import store
from ptl.storage.store import Pointer, Record


def evaluate(call: Call) -> None:
    """Score the checkpoint, and decide which one continues: it, or the `fallback` that its iteration began with.

    The step that ends the loop also measures the final model's speed beside the dense one's. With the gate off there is
    no fallback, and the next iteration does not wait for the scores.
    """
    if call.stopped:
        return call.pass_through()
    fallback = call.inputs.get("fallback")
    gate_settings = call.section(Gate, "gate")
    key = {
        "evaluate": call.section(Evaluate, "evaluate"),
        "chat": call.section(Chat, "chat"),
        "gate": gate_settings,
        "prune": call.section(Prune, "prune"),
        "iterations": call.settings["iterations"],
        "target": schedule_of(call).target,
        "seed": call.settings["seed"],
        "fallback": fallback and fallback.digest,
        "state": fallback and fallback.gate,
    }
    with Step(call, key=key) as step:
        record = step.record or step.publish(_evaluated(step, step.fetch_model()))
        # Kubeflow shows them in its table of runs.
        call.outputs["metrics"].metadata.update(kubeflow_metrics(record.metadata, step.run))
    return None


def _evaluated(step: Step, source: Path) -> Metadata:
    """Scores, verdict and what the loop continues with."""
    call, settings = step.call, step.settings
    candidate = call.inputs["model"]
    # The scores depend on less than the verdict: another gate can take them over.
    scores_key = key_of(
        candidate.digest, {name: settings[name] for name in ("evaluate", "chat", "seed")}
    ).digest
    scores = _scores(step, source, scores_key)
    if call.step == "evaluate-0":
        _warn_of_truncated_answers(scores)
    # The folder has the outcome of every item, which the gate compares.
    verdict, accepted = decide(step, source, scores)
    speed = {}
    if ends_the_loop(call, settings["iterations"], accepted):
        _withdraw_later(step, settings["iterations"])
        speed = speed_beside_dense(step, accepted, settings["evaluate"], settings["chat"])
    return {
        "scores": scores,
        "checkpoint": dataclasses.asdict(candidate),
        "smallest_cuts": smallest_cuts(_dimensions(source), settings["prune"].width_multiple),
        "verdict": verdict,
        "accepted": dataclasses.asdict(accepted),
        "speed": speed,
        "seconds": scores["seconds"] + speed.get("seconds", 0.0),
        "scores_key": scores_key,
    }


def _dimensions(folder: Path) -> ModelDimensions:
    return model_dimensions(folder, family_of(checkpoint.read_config(folder)))


def _scores(step: Step, source: Path, key: str) -> Metadata:
    """The scores of a checkpoint: those of an earlier run, or new ones. Their files are in the step's folder."""
    settings: Evaluate = step.settings["evaluate"]
    earlier = step.take_over(key)
    scores = dict(earlier["scores"]) if earlier else _scored(step, source, key)
    if step.settings["gate"].enabled and scores["tasks"][0]["low"] is None:
        # The task's YAML did not say that it has no accuracy.
        raise tasks.no_accuracy(settings.tasks[0])
    if step.call.step == "evaluate-0":
        retention.check_gate(step.settings["gate"], TextLosses(**scores["retention"]))
    return scores


def _scored(step: Step, source: Path, key: str) -> Metadata:
    """New scores, or those of an attempt that MLflow or the store did not answer afterwards."""
    from ptl.evaluation.evaluate import evaluate_checkpoint

    settings = step.settings
    arguments = (settings["evaluate"], settings["chat"])
    return step.once(
        key, lambda folder: evaluate_checkpoint(source, folder, *arguments, seed=settings["seed"])
    )


def _warn_of_truncated_answers(scores: Metadata) -> None:
    """Say that the dense model's answers are too long for a task: everything after it is compared with its accuracy."""
    for task in scores["tasks"]:
        if task["truncated"] > MANY_TRUNCATED:
            say(
                "evaluate-0",
                f"warning: {task['truncated']:.0%} of the dense model's answers on {task['task']} hit the token limit, "
                "so its accuracy says little; raise the task's max_new_tokens and start again, unless this is a "
                "rehearsal, which lowers it",
            )


def decide(step: Step, source: Path, scores: Metadata) -> tuple[Metadata, Pointer]:
    """The verdict on the checkpoint whose items are in the step's folder, and what the loop continues with."""
    call = step.call
    if call.iteration == 0:
        return {"decision": "baseline", "reason": ""}, call.inputs["model"]
    if call.arm == "control":
        return {"decision": "control", "reason": ""}, _register(step, scores)
    decision = _gate_decision(step, source, scores)
    state = decision.state
    if state.stopped:
        # The steps that follow say this when they pass their input through.
        state = dataclasses.replace(
            state, reason=f"the loop ended in iteration {call.iteration}: {state.reason}"
        )
    accepted = _register(step, scores) if decision.keep == "candidate" else call.inputs["fallback"]
    verdict = {
        "decision": decision.decision,
        "reason": decision.reason,
        "numbers": decision.numbers,  # what the decision rests on, for the report
    }
    return verdict, dataclasses.replace(accepted, gate=dataclasses.asdict(state))


def _register(step: Step, scores: Metadata) -> Pointer:
    """The candidate with the version that it has in MLflow's registry, whose tags say what it scored.

    It has none where `registered_model` is empty, as in a rehearsal.
    """
    call = step.call
    candidate, registered_model = call.inputs["model"], call.settings["registered_model"]
    if not registered_model:
        return candidate
    tags = {
        "step": call.step,
        "arm": call.arm,
        "criterion": step.settings["prune"].criterion,
        **score_tags(scores, candidate),
    }
    version = mlflow_objects.register(step.run, registered_model, candidate, tags)
    return dataclasses.replace(candidate, model_version=version)


def _gate_decision(step: Step, source: Path, scores: Metadata) -> gate.Decision:
    """The gate's decision; with the gate off there is no fallback, and nothing is compared."""
    call, settings = step.call, step.settings
    candidate, fallback = call.inputs["model"], call.inputs.get("fallback")
    decide = partial(
        gate.decide,
        settings["gate"],
        params=candidate.params,
        target_params=candidate.original_params
        - removal(candidate.original_params, settings["target"]),
    )
    if fallback is None:
        # The next iteration has begun already, so that no verdict could change what it starts from.
        return decide(gate.State(**candidate.gate))
    dense = step.committed("evaluate-0")
    # The first iteration's parent is the dense model itself.
    parent = step.evaluation_of(fallback, call.iteration - 1)
    before, after = (
        TextLosses(**of_model["retention"]) for of_model in (dense.metadata["scores"], scores)
    )
    # After the last iteration none follows: the gate still asks what a smaller step could be.
    iterations = plan(schedule_of(call), settings["prune"])
    following = iterations[min(call.iteration, len(iterations) - 1)]
    return decide(
        gate.State(**fallback.gate),
        parent_params=fallback.params,
        baseline=_compare(step, dense),
        parent=_compare(step, parent),
        retained=retention.compare(before, after, settings["gate"].alpha),
        smallest_cut=_smallest_cut(
            candidate, source, settings["prune"], parent.metadata, following.unit
        ),
    )


def _smallest_cut(
    candidate: Pointer, source: Path, prune: Prune, parent: Metadata, unit: str
) -> int | None:
    """The least that the next iteration can remove from the candidate's parent; None where nothing can go."""
    smallest: int | None = parent["smallest_cuts"].get(unit)
    if unit != "width" or not candidate.chosen:
        return smallest
    scores = parent["scores"]
    before = dataclasses.replace(
        _dimensions(source),
        hidden=scores["hidden_size"],
        width=scores["widths"][-1],
        kv_heads=scores["kv_heads"],
        experts=scores["experts"],
    )
    chosen: Metadata = candidate.chosen
    end = dataclasses.replace(before, **chosen)
    removed = before.params - candidate.params
    following = (
        before.params
        - widths.towards(before, end, before.params - removed // 2, prune.width_multiple).params
    )
    # A size that falls by large steps may take half of a cut for the whole of it.
    return following if following >= removed else smallest


def _compare(step: Step, reference: Record) -> paired.Paired:
    """The candidate's items against those of an earlier evaluation, on the run's first benchmark."""
    from ptl.evaluation.evaluate import read_items

    settings: Gate = step.settings["gate"]
    items = read_items(step.folder)
    # The first benchmark is the run's accuracy.
    outcomes = paired.match(step.fetch_items(reference), items, items[0]["task"])
    return paired.paired(outcomes, settings.margin, settings.alpha)


def ends_the_loop(call: Call, iterations: int, accepted: Pointer) -> bool:
    """Whether the checkpoint that this verdict continues with is the run's final one."""
    if call.arm == "control" or call.iteration == 0:
        return False
    return gate.State(**accepted.gate).stopped or call.iteration == iterations


def _withdraw_later(step: Step, iterations: int) -> None:
    """Steps that are not needed have no result: one may be of an attempt that got further, before data changed."""
    for later in range(step.call.iteration + 1, iterations + 1):
        for stage in ("prune", "recover", "evaluate"):
            store.withdraw(step.run.root, step.run.run, f"{stage}-{later}")


def speed_beside_dense(step: Step, final: Pointer, settings: Evaluate, chat: Chat) -> Metadata:
    """Speed of the run's final model and of the dense one, in turns; {"reason": ...} where it is not measured.

    Both are in memory at once. Where a GPU does not hold both, the scores are kept and the report says so.
    """
    import torch

    from ptl.evaluation.speed import metrics, side_by_side

    run = step.run
    dense = step.committed("import-model").pointer
    if not settings.speed.repeats:
        return {"reason": "evaluate.speed.repeats is 0"}
    if final.digest == dense.digest:
        return {"reason": "the run ends with the dense model"}
    # In turns: what slows the machine down for a while slows both down.
    say(run.step, "measuring speed, the dense and the final model in turns")
    folders = {"dense": step.fetch(dense), "final": step.fetch(final)}
    try:
        speed = side_by_side(folders, settings, chat, seed=step.call.settings["seed"])
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        return {
            "reason": f"the GPU does not hold the dense and the final model at once ({first_line})"
        }
    tracking.log_metrics(run, metrics(speed["models"]), step.call.iteration)
    return speed
