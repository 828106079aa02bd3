"""What an evaluate step does with the scores: it decides which checkpoint the loop continues with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl.config.goal import MemoryGoal
from ptl.config.run import Gate
from ptl.config.schedule import Prune, Schedule, plan, removal
from ptl.evaluation import gate, paired
from ptl.lineage import registry
from ptl.lineage.run_status import StepRun
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions, smallest_cuts
from ptl.model.families import family_of
from ptl.steps import versions
from ptl.steps.call import Metadata, Step
from ptl.steps.inputs import Items, fetch_items
from ptl.storage import store
from ptl.storage.store import Pointer, Record


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What an evaluate step knows of the whole run."""

    iterations: int
    target: (
        float | MemoryGoal
    )  # of the schedule: a share to remove, or the parameters to end with; a goal only at import
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

    def smallest_cuts(self, folder: Path) -> dict[str, int]:
        """The least number of parameters that can be removed from this checkpoint, for each unit."""
        dimensions = model_dimensions(folder, family_of(checkpoint.read_config(folder)))
        return smallest_cuts(dimensions, self.prune.width_multiple)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A checkpoint that was evaluated, and what decides beside its scores."""

    step: Step
    run: StepRun
    loop: LoopSettings
    candidate: Pointer
    fallback: Pointer | None  # what the iteration started from; only the gate needs it
    scores: Metadata

    def ends_the_loop(self, accepted: Pointer) -> bool:
        """Whether the checkpoint that this verdict continues with is the run's final one."""
        iteration = self.step.iteration
        if self.step.arm == "control" or iteration == 0:
            return False
        state = gate.State.load(accepted.gate)
        return state.stopped or iteration == self.loop.iterations


def decide(trial: Trial, scored: Path) -> tuple[Metadata, Pointer]:
    """The verdict on the checkpoint whose scores are in `scored`, and the pointer that the loop continues with."""
    if trial.step.iteration == 0:
        return {"decision": "baseline", "reason": ""}, trial.candidate
    if trial.step.arm == "control":
        # Registered as the loop's are: whether it takes an alias is decided by its score.
        accepted = _register(trial, {"arm": "control"})
        return {"decision": "control", "reason": ""}, accepted
    decision = _gate_decision(trial, scored)
    state = decision.state
    if state.stopped:
        # The steps that follow say this when they pass their input through.
        reason = f"the loop ended in iteration {trial.step.iteration}: {state.reason}"
        state = dataclasses.replace(state, reason=reason)
    accepted = trial.fallback or trial.candidate
    if decision.keep == "candidate":
        accepted = _register(trial, {})
    verdict = {
        "decision": decision.decision,
        "reason": decision.reason,
        "numbers": decision.numbers,  # what the decision rests on, for the report
    }
    return verdict, dataclasses.replace(accepted, gate=state.dump())


def _register(trial: Trial, tags: Metadata) -> Pointer:
    """The candidate with the version that it has in MLflow's registry."""
    candidate = trial.candidate
    # By these tags an alias finds the score of a version.
    tags = {"step": trial.step.name, **versions.score_tags(trial.scores, candidate), **tags}
    version = registry.register(trial.run, trial.loop.registered_model, candidate, tags)
    return dataclasses.replace(candidate, model_version=version)


def _gate_decision(trial: Trial, scored: Path) -> gate.Decision:
    """The gate's decision; with the gate off there is no fallback, and nothing is compared."""
    loop = trial.loop
    candidate = trial.candidate
    fallback = trial.fallback
    original_params = candidate.original_params
    target_params = original_params - removal(original_params, loop.target)
    if fallback is None:
        # The next iteration has begun already, so that no verdict could change what it starts from.
        return gate.decide(
            loop.gate,
            gate.State.load(candidate.gate),
            params=candidate.params,
            target_params=target_params,
        )
    from ptl.evaluation.evaluate import read_items

    items = read_items(scored)
    dense_record, parent_record = _references(trial, fallback)
    return gate.decide(
        loop.gate,
        gate.State.load(fallback.gate),
        params=candidate.params,
        parent_params=fallback.params,
        target_params=target_params,
        baseline=_compare(dense_record, items, loop.gate),
        parent=_compare(parent_record, items, loop.gate),
        smallest_cut=_smallest_cut(parent_record, loop.next_unit(trial.step.iteration)),
    )


def _references(trial: Trial, fallback: Pointer) -> tuple[Record, Record]:
    """The records of the evaluations to compare with: that of the dense model, and that of the candidate's parent."""
    run = trial.run
    names = [f"evaluate-{iteration}" for iteration in range(trial.step.iteration)]
    records = [record for name in names if (record := store.committed(run.root, run.run, name))]
    # The first iteration's parent is the dense model itself.
    parent = next(record for record in records if record["metadata"]["checkpoint"]["digest"] == fallback.digest)
    return records[0], parent


def _compare(reference: Record, items: Items, settings: Gate) -> paired.Paired:
    """The candidate's items against those of an earlier evaluation, on the run's first benchmark."""
    task = items[0]["task"]  # the first benchmark is the run's accuracy
    outcomes = paired.match(fetch_items(reference), items, task)
    return paired.paired(*outcomes, settings.margin, settings.alpha)


def _smallest_cut(record: Record, unit: str) -> int | None:
    """The least that the next iteration can remove from an evaluated checkpoint; None where nothing can go."""
    by_unit: dict[str, int] = record["metadata"]["smallest_cuts"]
    return by_unit.get(unit)
