"""How the batches of a recovery are divided among nodes and processes."""

from __future__ import annotations

from collections.abc import Sequence

from ptl.config.cluster import TRAINED, Resources
from ptl.config.recover import RecoverStage
from ptl.errors import InputError


def problem(stages: Sequence[RecoverStage], resources: Resources, gpus: int) -> str:
    """What cannot be divided among nodes with so many GPUs, in a sentence; empty where all can."""
    nodes = resources.nodes_of(TRAINED)
    for stage in stages:
        if nodes > 1 and stage.sharding == "zero2":
            return "recover.sharding=zero2 is for one node: on several take fsdp or hybrid"
        processes = nodes * (stage.processes or max(1, gpus))
        if stage.batch_size % (stage.accumulation * processes):
            return (
                f"recover.batch_size={stage.batch_size} must be a multiple of accumulation={stage.accumulation} times "
                f"the {processes} processes of {nodes} nodes"
            )
    return ""


def check_on_cluster(stages: Sequence[RecoverStage], resources: Resources) -> None:
    """Raise InputError where the accelerators that a run on a cluster requests cannot divide a batch."""
    undivided = problem(stages, resources, resources.accelerators_of(TRAINED))
    if undivided:
        raise InputError(undivided, remedy="change it, or resources.accelerators and resources.steps.recover")
