"""What GPUs send each other in training, and the seconds of it that they must wait for.

Bytes: each GPU of a ring of n passes on (n - 1)/n of what is gathered or reduced; an all-reduce is both (Rajbhandari et
al. 2020, 1910.02054, section 7). A ring through several nodes is as fast as its slowest part: a GPU's link in the node,
or the network adapters of a node, which NCCL uses all at once. What is sent while the GPU computes costs no time:
FSDP gathers a layer, and reduces its gradients, during the compute of another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ptl.config.recover import NextToken, RecoverStage
from ptl.preflight.forecast_model import GpuGroup, Shape, itemsize_of
from ptl.preflight.gpus import Gpu

# Share of the data sheet's bandwidth. NCCL reaches 0.92 to 0.96 of an adapter's with large messages (NVIDIA/nccl-tests,
# issue 290); those of one layer are smaller, and each of them starts anew.
LINK_SHARE = 0.8


@dataclass(frozen=True)
class Exchange:
    """Seconds in which a GPU sends and receives, by the work that can go on meanwhile."""

    forward: float  # during each forward pass
    backward: float  # during each backward pass
    update: float  # once for each optimizer step, during its last backward pass

    def total(self, passes: int) -> float:
        """Of an optimizer step."""
        return passes * (self.forward + self.backward) + self.update


def exchange(shape: Shape, stage: RecoverStage, group: GpuGroup, card: Gpu) -> Exchange:
    """What the GPUs of a group send each other for a stage, by its sharding."""
    if isinstance(stage, NextToken) and stage.lora is not None:  # whose gradients are too small to count
        sharded = stage.sharding != "none"
        within = group if stage.sharding == "fsdp" else replace(group, nodes=1)
        gathered = ring_seconds(float(itemsize_of(stage) * shape.params), within, card) if sharded else 0.0
        return Exchange(forward=gathered, backward=gathered, update=0.0)
    if stage.sharding == "none":
        # Gradients are as the weights are, float32, and reduced once.
        gradients = 4.0 * shape.params
        return Exchange(forward=0.0, backward=0.0, update=2 * ring_seconds(gradients, group, card))

    # Sharded weights are gathered, and their gradients reduced, in the precision of the pass: accelerate sets
    # param_dtype and reduce_dtype alike.
    weights = float(itemsize_of(stage) * shape.params)
    # Twice in a backward pass: weights are gathered, and gradients reduced.
    gathered = ring_seconds(weights, group, card)
    return Exchange(forward=gathered, backward=2 * gathered, update=0.0)


def ring_seconds(size: float, group: GpuGroup, card: Gpu) -> float:
    """Seconds to gather, or to reduce and scatter, `size` bytes among the GPUs of a group."""
    bandwidth = card.link if group.nodes == 1 else min(card.link, group.per_node * card.network)
    passed_on = (group.count - 1) / group.count * size
    return passed_on / (bandwidth * LINK_SHARE)


def waiting_seconds(sent: Exchange, forward: float, backward: float, passes: int) -> float:
    """Seconds of an optimizer step in which the GPUs wait for each other.

    `forward` and `backward`: seconds of compute of one of the step's `passes`.
    """
    each = max(0.0, sent.forward - forward)
    before_last = max(0.0, sent.backward - backward)
    last = max(0.0, sent.backward + sent.update - backward)
    return passes * each + (passes - 1) * before_last + last
