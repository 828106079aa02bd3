"""Sizes of a checkpoint and what a goal in parameters means for it: torch-free, so that bad targets fail early."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ptl import checkpoint
from ptl.errors import InputError
from ptl.families import IN_LAYER, Family


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a checkpoint, read from the headers of its shards and its config."""

    params: int
    layers: int
    width: int
    params_per_neuron: int  # of one channel in every layer together
    params_per_layer: int  # of the smallest layer


def anatomy(folder: Path, family: Family) -> Anatomy:
    """Measure a checkpoint without loading it."""
    config = checkpoint.read_config(folder)
    per_layer: dict[int, int] = {}
    per_neuron = params = 0
    for name, shape in checkpoint.shapes(folder).items():
        size = math.prod(shape)
        params += size
        match = IN_LAYER.match(name)
        if match is None:
            continue
        per_layer[int(match["layer"])] = per_layer.get(int(match["layer"]), 0) + size
        if match["part"] in family.rows or (match["part"] == family.columns and match["kind"] == "weight"):
            per_neuron += size // config[family.width_field]
    return Anatomy(
        params, config[family.depth_field], config[family.width_field], per_neuron, min(per_layer.values(), default=0)
    )


def width_for(body: Anatomy, goal: int, multiple: int) -> int:
    """The largest uniform FFN width with at most `goal` parameters, rounded down to the multiple, never above today's.

    Raises InputError when fewer neurons than one multiple would be left.
    """
    if goal >= body.params:
        return body.width
    width = body.width - math.ceil((body.params - goal) / body.params_per_neuron)
    width -= width % multiple
    if width < multiple:
        rest = body.params - body.width * body.params_per_neuron
        raise InputError(
            f"schedule.target: {goal:,} parameters cannot be reached by neurons: all but the FFNs are {rest:,}, and "
            f"prune.width_multiple={multiple} needs at least {rest + multiple * body.params_per_neuron:,}; "
            "lower schedule.target or prune.width_multiple"
        )
    return width


def layers_for(body: Anatomy, goal: int) -> int:
    """How many layers must go to reach the goal. Raises InputError when none would be left."""
    count = max(0, math.ceil((body.params - goal) / body.params_per_layer))
    if count >= body.layers:
        raise InputError(
            f"schedule.target: {goal:,} parameters would remove {count} of {body.layers} layers; "
            "lower schedule.target or prune neurons"
        )
    return count
