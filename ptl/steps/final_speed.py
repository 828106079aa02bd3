"""How fast the run's final model is beside the dense one, measured by the evaluation that ends the loop."""

from __future__ import annotations

from ptl.config.run import Evaluate
from ptl.evaluation import speed_rows
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.steps.call import Metadata, Step
from ptl.steps.inputs import dense_model, fetch
from ptl.storage.store import Pointer


def beside_dense(
    step: Step,
    run: StepRun,
    final: Pointer,
    settings: Evaluate,
    seed: int,
) -> Metadata:
    """Speed of the run's final model and of the dense one, in turns; {"reason": ...} where it is not measured.

    Both are in memory at once. Where a GPU does not hold both, the scores are kept and the report says so.
    """
    import torch

    from ptl.evaluation.speed import side_by_side

    # Speed is no reason to fail: the scores are there, and the report says why it is not.
    dense = dense_model(run)
    if dense is None:
        return {"reason": "the record of import-model is missing"}
    if not settings.speed.repeats:
        return {"reason": "evaluate.speed.repeats is 0"}
    if final.digest == dense.digest:
        return {"reason": "the run ends with the dense model"}
    # In turns: what slows the machine down for a while slows both down.
    say(step.name, "measuring speed, the dense and the final model in turns")
    folders = {"dense": fetch(dense), "final": fetch(final)}
    # Other steps on this machine slow both models down; the report names them.
    beside = set(tracking.computing_beside(run))
    try:
        speed = side_by_side(folders, settings, seed=seed)
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        return {"reason": f"the GPU does not hold the dense and the final model at once ({first_line})"}
    tracking.log_metrics(run, speed_rows.metrics(speed["models"]), step.iteration)
    # What began or ended in between took its share as well.
    beside.update(tracking.computing_beside(run))
    return {**speed, "beside": sorted(beside)}
