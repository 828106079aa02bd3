"""The machines that train together: this one alone, nodes of a TrainJob, or groups of processes that stand for them."""

from __future__ import annotations

import os
import socket
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
    rank: int | None = None  # of this machine; None: all of them are groups of processes on it
    address: str = LOOPBACK
    port: int = 0  # of the first one, there; 0: any free one

    @property
    def ranks_here(self) -> tuple[int, ...]:
        """The ranks of those that are this machine."""
        return tuple(range(self.count)) if self.rank is None else (self.rank,)

    @property
    def first(self) -> bool:
        """Whether this machine has the first process, which logs, saves and reports."""
        return 0 in self.ranks_here


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


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])
