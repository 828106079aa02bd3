"""Sizes of a checkpoint and what a goal in parameters means for it: torch-free, so that bad targets fail early."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptl import checkpoint, shapes
from ptl.errors import InputError
from ptl.families import IN_LAYER, ROTARY, Family
from ptl.safefile import FLOATS, Entry

MULTIPLES = (128, 64, 8, 1)  # FFN widths that matrix units and quantized formats like, best first
MIN_STEPS = 8  # a multiple is taken by default where the width holds at least as many of it


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a checkpoint, read from the headers of its shards and its config."""

    params: int
    layers: int
    width: int
    params_per_neuron: int  # of one channel in every layer together
    params_per_layer: int  # of the smallest layer


def model_dimensions(folder: Path, family: Family) -> ModelDimensions:
    """Measure a checkpoint without loading it.

    Raises InputError that names a field of config.json that cannot be, a missing, extra or misshapen tensor, or dtypes
    that cannot be pruned.
    """
    config = checkpoint.read_config(folder)
    sizes = shapes.sizes(config, family, folder / "config.json")
    checkpoint.check_no_adapter(folder)
    found = {name: entry for name, entry in checkpoint.contents(folder).items() if not ROTARY.match(name)}
    _check_names(folder, family, config, found)
    _check_shapes(family, sizes, found)
    _check_dtypes(folder, found)
    tied = family.is_tied(config)
    if tied:
        checkpoint.check_tied(found)
    per_layer: dict[int, int] = {}
    per_neuron = 0
    for name, entry in found.items():
        size = math.prod(entry.shape)
        match = IN_LAYER.match(name)
        if match is None:
            continue
        per_layer[int(match["layer"])] = per_layer.get(int(match["layer"]), 0) + size
        if match["part"] in family.rows or (match["part"] == family.columns and match["kind"] == "weight"):
            per_neuron += size // sizes.width
    params = checkpoint.count(found, tied)
    return ModelDimensions(params, sizes.layers, sizes.width, per_neuron, min(per_layer.values()))


def resolve_multiple(width: int, multiple: int | Literal["auto"], tensor_parallel: int = 1) -> int:
    """What the FFN width is rounded down to: `auto` takes 128, 64, 8 or 1 for each of the tensor-parallel ranks.

    Raises InputError when the ranks do not divide the width.
    """
    if width % tensor_parallel:
        raise InputError(
            f"prune.tensor_parallel={tensor_parallel} does not divide the FFN width {width}; "
            "give the number of GPUs that the model is really split over"
        )
    if multiple != "auto":
        return math.lcm(multiple, tensor_parallel)
    fitting = (m * tensor_parallel for m in MULTIPLES if width % (m * tensor_parallel) == 0)
    return next((m for m in fitting if width // m >= MIN_STEPS), tensor_parallel)


def width_for(body: ModelDimensions, goal: int, multiple: int | Literal["auto"], tensor_parallel: int = 1) -> int:
    """The largest uniform FFN width with at most `goal` parameters, rounded down to the multiple, never above today's.

    Raises InputError when fewer neurons than one multiple would be left.
    """
    if goal >= body.params:
        return body.width
    step = resolve_multiple(body.width, multiple, tensor_parallel)
    width = body.width - math.ceil((body.params - goal) / body.params_per_neuron)
    width -= width % step
    if width < step:
        rest = body.params - body.width * body.params_per_neuron
        raise InputError(
            f"schedule.target: {goal:,} parameters cannot be reached by neurons: all but the FFNs are {rest:,}, and "
            f"prune.width_multiple={step} needs at least {rest + step * body.params_per_neuron:,}; "
            "lower schedule.target or prune.width_multiple"
        )
    return width


def smallest_cuts(body: ModelDimensions, multiple: int | Literal["auto"], tensor_parallel: int = 1) -> dict[str, int]:
    """Parameters that the smallest cut of `neurons` or `layers` removes; what cannot go any more is left out."""
    found: dict[str, int] = {}
    with contextlib.suppress(InputError):  # fewer neurons than one multiple would be left
        width = width_for(body, body.params - 1, multiple, tensor_parallel)
        found["neurons"] = (body.width - width) * body.params_per_neuron
    if body.layers > 1:
        found["layers"] = body.params_per_layer
    return found


def layers_for(body: ModelDimensions, goal: int) -> int:
    """How many layers must go to reach the goal. Raises InputError when none would be left."""
    count = max(0, math.ceil((body.params - goal) / body.params_per_layer))
    if count >= body.layers:
        raise InputError(
            f"schedule.target: {goal:,} parameters would remove {count} of {body.layers} layers; "
            "lower schedule.target or prune neurons"
        )
    return count


def _check_names(folder: Path, family: Family, config: Mapping[str, Any], found: Mapping[str, Entry]) -> None:
    """Every tensor that the family has is there, and no other: transformers would make it up, or leave it out."""
    named = [f"{part}.weight" for part in family.parts] + [f"{part}.bias" for part in family.biased(config)]
    wanted = {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= {f"model.layers.{i}.{name}" for i in range(config[family.depth_field]) for name in named}
    allowed = {"lm_head.weight"}  # a tied one may be stored
    if not family.is_tied(config):
        wanted |= allowed
    for problem, names in (("lacks", wanted - found.keys()), ("has an unknown", found.keys() - wanted - allowed)):
        if names:
            raise InputError(
                f"model.path: {folder} {problem} tensor {min(names)}{_more(names)}, for model_type {family.model_type} "
                f"with {config[family.depth_field]} layers; use a complete checkpoint of this architecture"
            )


def _check_shapes(family: Family, sizes: shapes.Sizes, found: Mapping[str, Entry]) -> None:
    """Every tensor has the shape that config.json gives it."""
    named = vars(sizes) | {family.width_field: sizes.width}
    for name, entry in found.items():
        match = IN_LAYER.match(name)
        part, kind = (match["part"], match["kind"]) if match else name.removeprefix("model.").rsplit(".", 1)
        shape, fields = shapes.expected(part, family, sizes)
        shape = shape[:1] if kind == "bias" else shape
        if entry.shape != shape:
            raise InputError(
                f"model.path: tensor {name} in {entry.path} has shape {list(entry.shape)}, and config.json gives it "
                f"{list(shape)} by {', '.join(f'{field}={named[field]}' for field in fields)}; correct config.json, or "
                "use a checkpoint with the same shapes in every layer"
            )


def _check_dtypes(folder: Path, found: Mapping[str, Entry]) -> None:
    """All tensors have one floating-point dtype."""
    dtypes = sorted({entry.dtype for entry in found.values()})
    if len(dtypes) > 1 or dtypes[0] not in FLOATS:
        raise InputError(
            f"model.path: {folder} holds {' and '.join(dtypes)} tensors; one of {', '.join(FLOATS)} for all of them is "
            "needed: load it with from_pretrained(..., dtype=...), save it, and give that folder"
        )


def _more(names: set[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
