"""The end of an evaluate step: which checkpoint goes on, and, where the loop ends, how fast it is beside the dense one.

Of the same room as steps.py: it knows both the work and the store.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl import checkpoint, gate, paired, speed_rows, store, tracking
from ptl.anatomy import model_dimensions, smallest_cuts
from ptl.config import Evaluate, Gate, Prune, Schedule, plan, removal
from ptl.execution import Metadata, Record, Step, fetch
from ptl.families import family_of
from ptl.log import say
from ptl.run_status import StepRun
from ptl.store import Pointer


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an evaluate step knows of the whole run."""

    iterations: int
    target: float
    prune: Prune

    def cuts_next(self, iteration: int) -> str:
        """What the iteration after this one cuts (the last one: what it cut itself): neurons, layers or auto."""
        rounds = plan(Schedule(iterations=self.iterations, target=self.target, recovery_tokens=0), self.prune)
        return rounds[min(iteration, self.iterations - 1)].unit

    def smallest_cuts(self, folder: Path) -> dict[str, int]:
        """Parameters that the smallest cut of this checkpoint would remove, by what goes."""
        body = model_dimensions(folder, family_of(checkpoint.read_config(folder)))
        return smallest_cuts(body, self.prune.width_multiple, self.prune.tensor_parallel)


def decide(
    step: Step,
    run: StepRun,
    rule: Gate,
    whole: Plan,
    candidate: Pointer,
    before: Pointer | None,
    scored: Path,
    registered_model: str,
) -> tuple[Metadata, Pointer]:
    """The gate's verdict on the checkpoint whose scores are in `scored`, and the pointer that the loop continues with.

    `before` is the checkpoint that the iteration started from; only the gate needs it.
    """
    if step.iteration == 0:
        return {"decision": "baseline", "reason": ""}, candidate
    if (
        step.arm == "control"
    ):  # it may have won, and whether it takes an alias is decided by its score, as of the loop's
        tags = {"step": step.name, "params": candidate.params, "arm": "control"}
        version = tracking.register(run, registered_model, candidate, tags)
        return {"decision": "control", "reason": ""}, dataclasses.replace(candidate, model_version=version)
    # With the gate off nothing is compared, and the next iteration has begun already.
    pairs, smallest = _compared(step, run, rule, whole, before, scored) if before else ([], 1)
    start = before or candidate
    decided = gate.decide(
        rule,
        gate.State.load(start.gate),
        params=candidate.params,
        parent_params=before.params if before else None,
        target_params=candidate.original_params - removal(candidate.original_params, whole.target),
        baseline=pairs[0] if pairs else None,
        parent=pairs[-1] if pairs else None,
        smallest_cut=smallest,
    )
    state = decided.state
    if state.stopped:
        state = dataclasses.replace(state, reason=f"the loop ended in iteration {step.iteration}: {state.reason}")
    onward = candidate if decided.keep == "candidate" else start
    onward = dataclasses.replace(onward, gate=state.dump())
    if decided.keep == "candidate":
        version = tracking.register(run, registered_model, candidate, {"step": step.name, "params": candidate.params})
        onward = dataclasses.replace(onward, model_version=version)
    return {"decision": decided.decision, "reason": decided.reason, "numbers": decided.numbers}, onward


def _compared(
    step: Step, run: StepRun, rule: Gate, whole: Plan, before: Pointer, scored: Path
) -> tuple[list[paired.Paired], int | None]:
    """The scored checkpoint against the dense model and against its parent, and the parent's smallest next cut."""
    from ptl.evaluate import read_items

    earlier = [store.committed(run.root, run.run, f"evaluate-{i}") for i in range(step.iteration)]
    found = [record for record in earlier if record is not None]
    parent = next(record for record in found if record["metadata"]["checkpoint"]["digest"] == before.digest)
    mine = read_items(scored)
    folders = [fetch(Pointer(**record["pointer"])) for record in (found[0], parent)]
    task = str(mine[0]["task"])  # the first benchmark is the run's accuracy
    pairs = [
        paired.paired(*paired.match(read_items(folder), mine, task), rule.margin, rule.alpha) for folder in folders
    ]
    return pairs, _smallest(parent, whole.cuts_next(step.iteration))


def _smallest(parent: Record, unit: str) -> int | None:
    cuts: dict[str, int] = parent["metadata"]["smallest_cuts"]
    return min(cuts.values(), default=None) if unit == "auto" else cuts.get(unit)


def ends_the_loop(step: Step, whole: Plan, onward: Pointer) -> bool:
    """Whether this step's verdict is the loop's last: the model that goes on is the run's final one."""
    if step.arm == "control" or step.iteration == 0:
        return False
    return step.iteration == whole.iterations or gate.State.load(onward.gate).stopped


def beside_dense(step: Step, run: StepRun, final: Pointer, settings: Evaluate, seed: int) -> Metadata:
    """Speed of the run's final model beside the dense one, taking turns; {"reason": ...} where it is not measured.

    Both are in memory at once. Where a GPU does not hold both, the scores are kept and the report says so.
    """
    import torch

    from ptl.speed import side_by_side

    imported = store.committed(run.root, run.run, "import-model")
    if imported is None:
        return {"reason": "the record of import-model is missing"}
    dense = Pointer(**imported["pointer"])
    if not settings.speed.repeats:
        return {"reason": "evaluate.speed.repeats is 0"}
    if final.digest == dense.digest:
        return {"reason": "the run ends with the dense model"}
    say(step.name, "measuring speed, the dense and the final model in turns")
    folders = {"dense": fetch(dense), "final": fetch(final)}
    beside = tracking.computing_beside(run)
    try:
        found = side_by_side(folders, settings, seed=seed)
    except torch.OutOfMemoryError as error:
        return {"reason": f"the GPU does not hold the dense and the final model at once ({str(error).splitlines()[0]})"}
    tracking.log_metrics(run, speed_rows.metrics(found["models"]), step.iteration)
    # What began or ended in between took its share as well.
    return found | {"beside": sorted({*beside, *tracking.computing_beside(run)})}
