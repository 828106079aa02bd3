"""The evaluate step: a checkpoint is scored, and the gate decides which one the loop continues with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl.config.goal import MemoryGoal
from ptl.config.run import Evaluate, Gate
from ptl.config.schedule import Prune, Schedule, plan, removal
from ptl.evaluation import gate, paired, speed_rows, tasks
from ptl.lineage import registry, tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions, smallest_cuts
from ptl.model.families import family_of
from ptl.steps.call import Call, Metadata, schedule_of
from ptl.steps.key import key_of
from ptl.steps.reporting import kubeflow_metrics, score_tags
from ptl.steps.step import Step, limit_threads
from ptl.storage import store
from ptl.storage.store import Pointer, Record

MANY_TRUNCATED = 0.2  # share of a task's answers


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What an evaluate step knows of the whole run."""

    iterations: int
    target: float | MemoryGoal  # of the schedule: a share to remove, or the parameters to end with
    prune: Prune
    gate: Gate
    registered_model: str  # in MLflow: where accepted checkpoints become versions

    def next_unit(self, iteration: int) -> str:
        """What the iteration after this one removes (the last one: what it removed): neurons, layers or auto."""
        # The units of a plan do not depend on its tokens.
        schedule = Schedule(iterations=self.iterations, target=self.target, recovery_tokens=0)
        # After the last iteration none follows: the gate still asks what a smaller step could be.
        following = min(iteration, self.iterations - 1)
        return plan(schedule, self.prune)[following].unit


def evaluate(call: Call) -> None:
    """Score the checkpoint, and decide which one continues: it, or the `fallback` that its iteration began with.

    The step that ends the loop also measures the final model's speed beside the dense one's. With the gate off there is
    no fallback, and the next iteration does not wait for the scores.
    """
    if call.stopped:
        return call.pass_through()
    settings = call.section(Evaluate, "evaluate")
    loop = _loop_settings(call)
    if call.arm == "loop" and call.iteration:
        # The pipeline was compiled with a fallback for each iteration, or with none.
        gate.check_structure(loop.gate, compiled="fallback" in call.inputs)
    with Step(call, key=_key(call, settings, loop)) as step:
        if step.record is None:
            limit_threads(call.inputs["model"].params)
            source = step.fetch(call.inputs["model"])
            step.publish(_evaluated(step, source, settings, loop))
        # Kubeflow shows them in its table of runs.
        assert step.record is not None
        call.outputs["metrics"].metadata.update(kubeflow_metrics(step.record.metadata, step.run))
    return None


def _loop_settings(call: Call) -> LoopSettings:
    """What the verdict needs to know of the whole run, checked."""
    return LoopSettings(
        call.settings["iterations"],
        schedule_of(call).target,
        call.section(Prune, "prune"),
        call.section(Gate, "gate"),
        call.settings["registered_model"],
    )


def _key(call: Call, settings: Evaluate, loop: LoopSettings) -> Metadata:
    """All that the verdict depends on, beside the candidate."""
    fallback = call.inputs.get("fallback")
    return {
        "evaluate": settings,
        "gate": loop.gate,
        "prune": loop.prune,
        "iterations": loop.iterations,
        "seed": call.settings["seed"],
        "target": loop.target,
        "fallback": fallback and fallback.digest,
        "state": fallback and fallback.gate,
    }


def _evaluated(step: Step, source: Path, settings: Evaluate, loop: LoopSettings) -> Metadata:
    """Scores, verdict and what the loop continues with."""
    call = step.call
    candidate = call.inputs["model"]
    # The scores depend on less than the verdict: another gate can take them over.
    scores_key = key_of(candidate.digest, {"evaluate": settings, "seed": call.settings["seed"]}).digest
    scores = _scores(step, source, scores_key, settings, loop.gate)
    if call.step == "evaluate-0":
        _warn_of_truncated_answers(call.step, scores)
    # The folder has the outcome of every item, which the gate compares.
    verdict, accepted = decide(step, loop, scores)
    speed = {}
    if ends_the_loop(call, loop, accepted):
        _withdraw_later(step.run, call.iteration, loop.iterations)
        speed = speed_beside_dense(step, accepted, settings)
    return {
        "scores": scores,
        "checkpoint": dataclasses.asdict(candidate),
        "smallest_cuts": cuts_of(source, loop.prune),
        "verdict": verdict,
        "accepted": dataclasses.asdict(accepted),
        "speed": speed,
        "seconds": scores["seconds"] + speed.get("seconds", 0.0),
        "scores_key": scores_key,
    }


def cuts_of(folder: Path, prune: Prune) -> dict[str, int]:
    """The least number of parameters that can be removed from a checkpoint, for each unit."""
    dimensions = model_dimensions(folder, family_of(checkpoint.read_config(folder)))
    return smallest_cuts(dimensions, prune.width_multiple)


def _scores(step: Step, source: Path, key: str, settings: Evaluate, gate_settings: Gate) -> Metadata:
    """The scores of a checkpoint: those of an earlier run, or new ones. Their files are in the step's folder."""
    from ptl.evaluation.evaluate import evaluate_checkpoint

    earlier = step.take_over(key)
    if earlier:
        scores = dict(earlier["scores"])
    else:
        seed = step.call.settings["seed"]
        scores = dataclasses.asdict(evaluate_checkpoint(source, step.folder, settings, seed=seed, speed=False))
    if gate_settings.enabled and scores["tasks"][0]["low"] is None:
        # The task's YAML did not say that it has no accuracy.
        raise tasks.no_accuracy(settings.tasks[0])
    return scores


def _warn_of_truncated_answers(step: str, scores: Metadata) -> None:
    """Say that the dense model's answers are too long for a task: everything after it is compared with its accuracy."""
    for task in scores["tasks"]:
        if task["truncated"] > MANY_TRUNCATED:
            say(
                step,
                f"warning: {task['truncated']:.0%} of the dense model's answers on {task['task']} hit the token limit, "
                "so its accuracy says little; raise the task's max_new_tokens and start again",
            )


def decide(step: Step, loop: LoopSettings, scores: Metadata) -> tuple[Metadata, Pointer]:
    """The verdict on the checkpoint whose items are in the step's folder, and what the loop continues with."""
    call = step.call
    if call.iteration == 0:
        return {"decision": "baseline", "reason": ""}, call.inputs["model"]
    if call.arm == "control":
        return {"decision": "control", "reason": ""}, _register(step, loop, scores)
    decision = _gate_decision(step, loop)
    state = decision.state
    if state.stopped:
        # The steps that follow say this when they pass their input through.
        state = dataclasses.replace(state, reason=f"the loop ended in iteration {call.iteration}: {state.reason}")
    accepted = call.inputs.get("fallback") or call.inputs["model"]
    if decision.keep == "candidate":
        accepted = _register(step, loop, scores)
    verdict = {
        "decision": decision.decision,
        "reason": decision.reason,
        "numbers": decision.numbers,  # what the decision rests on, for the report
    }
    return verdict, dataclasses.replace(accepted, gate=state.dump())


def _register(step: Step, loop: LoopSettings, scores: Metadata) -> Pointer:
    """The candidate with the version that it has in MLflow's registry, whose tags say what it scored."""
    call = step.call
    candidate = call.inputs["model"]
    tags = {
        "step": call.step,
        "arm": call.arm,
        "criterion": loop.prune.criterion,
        **score_tags(scores, candidate),
    }
    version = registry.register(step.run, loop.registered_model, candidate, tags)
    return dataclasses.replace(candidate, model_version=version)


def _gate_decision(step: Step, loop: LoopSettings) -> gate.Decision:
    """The gate's decision; with the gate off there is no fallback, and nothing is compared."""
    candidate = step.call.inputs["model"]
    fallback = step.call.inputs.get("fallback")
    target_params = candidate.original_params - removal(candidate.original_params, loop.target)
    if fallback is None:
        # The next iteration has begun already, so that no verdict could change what it starts from.
        return gate.decide(
            loop.gate,
            gate.State.load(candidate.gate),
            params=candidate.params,
            target_params=target_params,
        )
    dense_record, parent_record = _references(step, fallback)
    return gate.decide(
        loop.gate,
        gate.State.load(fallback.gate),
        params=candidate.params,
        parent_params=fallback.params,
        target_params=target_params,
        baseline=_compare(step, dense_record, loop.gate),
        parent=_compare(step, parent_record, loop.gate),
        smallest_cut=_smallest_cut(parent_record, loop.next_unit(step.call.iteration)),
    )


def _references(step: Step, fallback: Pointer) -> tuple[Record, Record]:
    """The records of the evaluations to compare with: that of the dense model, and that of the candidate's parent."""
    records = [step.find(f"evaluate-{iteration}") for iteration in range(step.call.iteration)]
    # One that passed its input through has none.
    existing = [record for record in records if record]
    # The first iteration's parent is the dense model itself.
    parent = next(record for record in existing if record.metadata["checkpoint"]["digest"] == fallback.digest)
    return existing[0], parent


def _compare(step: Step, reference: Record, settings: Gate) -> paired.Paired:
    """The candidate's items against those of an earlier evaluation, on the run's first benchmark."""
    from ptl.evaluation.evaluate import read_items

    items = read_items(step.folder)
    task = items[0]["task"]  # the first benchmark is the run's accuracy
    outcomes = paired.match(step.fetch_items(reference), items, task)
    return paired.paired(*outcomes, settings.margin, settings.alpha)


def _smallest_cut(record: Record, unit: str) -> int | None:
    """The least that the next iteration can remove from an evaluated checkpoint; None where nothing can go."""
    by_unit: dict[str, int] = record.metadata["smallest_cuts"]
    return by_unit.get(unit)


def ends_the_loop(call: Call, loop: LoopSettings, accepted: Pointer) -> bool:
    """Whether the checkpoint that this verdict continues with is the run's final one."""
    if call.arm == "control" or call.iteration == 0:
        return False
    return gate.State.load(accepted.gate).stopped or call.iteration == loop.iterations


def _withdraw_later(run: StepRun, iteration: int, iterations: int) -> None:
    """Steps that are not needed have no result: one may be of an attempt that got further, before data changed."""
    for later in range(iteration + 1, iterations + 1):
        for stage in ("prune", "recover", "evaluate"):
            store.withdraw(run.root, run.run, f"{stage}-{later}")


def speed_beside_dense(step: Step, final: Pointer, settings: Evaluate) -> Metadata:
    """Speed of the run's final model and of the dense one, in turns; {"reason": ...} where it is not measured.

    Both are in memory at once. Where a GPU does not hold both, the scores are kept and the report says so.
    """
    import torch

    from ptl.evaluation.speed import side_by_side

    # Speed is no reason to fail: the scores are there, and the report says why it is not.
    run = step.run
    dense = step.find("import-model")
    if dense is None:
        return {"reason": "the record of import-model is missing"}
    if not settings.speed.repeats:
        return {"reason": "evaluate.speed.repeats is 0"}
    if final.digest == dense.pointer.digest:
        return {"reason": "the run ends with the dense model"}
    # In turns: what slows the machine down for a while slows both down.
    say(run.step, "measuring speed, the dense and the final model in turns")
    folders = {"dense": step.fetch(dense.pointer), "final": step.fetch(final)}
    # Other steps on this machine slow both models down; the report names them.
    beside = set(tracking.computing_beside(run))
    try:
        speed = side_by_side(folders, settings, seed=step.call.settings["seed"])
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        return {"reason": f"the GPU does not hold the dense and the final model at once ({first_line})"}
    tracking.log_metrics(run, speed_rows.metrics(speed["models"]), step.call.iteration)
    # What began or ended in between took its share as well.
    beside.update(tracking.computing_beside(run))
    return {**speed, "beside": sorted(beside)}
