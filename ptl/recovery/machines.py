"""The machines that train together: this one alone, standing for all of them, or one of the nodes of a TrainJob."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

NODES = "PTL_NODES"  # how many machines the compiled pipeline asks for
LOOPBACK = "127.0.0.1"
# Kubeflow Trainer sets these in the pod of each node.
NODE_RANK = "PET_NODE_RANK"
NODE_COUNT = "PET_NNODES"
FIRST_ADDRESS = "PET_MASTER_ADDR"
FIRST_PORT = "PET_MASTER_PORT"


@dataclass(frozen=True)
class Machines:
    """How many they are, which one this is, and where the first one is reached."""

    count: int = 1
    rank: int | None = None  # of this machine; None: it stands for all of them, with the processes of all
    address: str = LOOPBACK
    port: int = 0  # of the first one, there; 0: any free one

    @property
    def first(self) -> bool:
        """Whether this machine has the first process, which logs, saves and reports."""
        return not self.rank


ALONE = Machines()


def is_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the pod of a node of a TrainJob."""
    return NODE_RANK in environment


def machines(environment: Mapping[str, str] = os.environ) -> Machines:
    """As the environment says it: that of a node's pod, or of a step that stands for all nodes."""
    if is_node(environment):
        return Machines(
            int(environment[NODE_COUNT]),
            int(environment[NODE_RANK]),
            environment[FIRST_ADDRESS],
            int(environment[FIRST_PORT]),
        )
    return Machines(int(environment.get(NODES, "1")))
