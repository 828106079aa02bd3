"""Cut weights and config together, tensor by tensor, so that memory holds one tensor whatever the model's size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl import checkpoint, safefile
from ptl.families import IN_LAYER, ROTARY, Family

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What stays. `neurons` maps a kept layer's old index to int64 [width], ascending; empty: all neurons stay."""

    layers: tuple[int, ...]
    neurons: Mapping[int, Tensor]


def cut_tensor(name: str, tensor: Tensor, family: Family, cut: Selection) -> tuple[str, Tensor] | None:
    """The tensor's new name and value, or None when its layer goes. Serves weights and their Adam moments alike."""
    placed = _place(name, tensor.shape[0] if tensor.dim() else 0, family, cut)
    if placed is None:
        return None
    return placed.name, tensor if placed.kept is None else tensor.index_select(placed.axis, placed.kept).contiguous()


@dataclass(frozen=True)
class _Placed:
    """Where a tensor goes: its new name, and the indices that stay along one axis (None: all)."""

    name: str
    axis: int = 0
    kept: Tensor | None = None


def _place(name: str, rows: int, family: Family, cut: Selection) -> _Placed | None:
    if ROTARY.match(name):
        return None
    match = IN_LAYER.match(name)
    if match is None:
        return _Placed(name)
    layer = int(match["layer"])
    if layer not in cut.layers:
        return None
    name = f"{match['prefix']}{cut.layers.index(layer)}.{match['part']}.{match['kind']}"
    kept = cut.neurons.get(layer)
    if kept is not None and match["part"] in family.rows:
        width = rows // family.blocks
        return _Placed(name, 0, (kept + width * block_index(family)[:, None]).flatten())
    if kept is not None and match["part"] == family.columns and match["kind"] == "weight":
        return _Placed(name, 1, kept)
    return _Placed(name)


def block_index(family: Family) -> Tensor:
    """0, 1, ... for the blocks of a fused `rows` tensor: int64 [blocks]."""
    import torch

    return torch.arange(family.blocks)


def cut_config(config: dict[str, Any], family: Family, cut: Selection) -> dict[str, Any]:
    """The config of the cut model, with no field that the family does not have already."""
    config = dict(config)
    for field in family.per_layer_fields:
        if config.get(field) is None and len(cut.layers) < config[family.depth_field]:
            config[field] = _default(config, field)  # what follows from a layer's number must stay with the layer
        if isinstance(config.get(field), list):
            config[field] = [config[field][i] for i in cut.layers]
        else:
            config.pop(field, None)
    for field in family.prefix_fields:
        if isinstance(config.get(field), int):
            beyond = max(0, config[field] - config[family.depth_field])
            config[field] = sum(i < config[field] for i in cut.layers) + beyond
    config[family.depth_field] = len(cut.layers)
    if cut.neurons:
        widths = {len(kept) for kept in cut.neurons.values()}
        assert len(widths) == 1, f"widths differ between layers: {sorted(widths)}"
        config[family.width_field] = widths.pop()
    return config


def _default(config: Mapping[str, Any], field: str) -> Any:
    """The value that transformers gives a field that config.json leaves out."""
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name != "model_type"}
    return getattr(AutoConfig.for_model(config["model_type"], **fields), field, None)


def cut_checkpoint(
    src: Path, dst: Path, family: Family, cut: Selection, repaired: Mapping[str, Path] | None = None
) -> None:
    """Write the cut checkpoint to `dst`, tensor by tensor; the optimizer state beside it is cut with it.

    `repaired` names tensors of the source whose new value, already cut, stands in a file of its own (ptl/repair.py).
    """
    dst.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    paths = checkpoint.shards(src)
    for path in paths:
        sizes = _cut_file(path, dst / path.name, family, cut, repaired or {})
        weight_map |= dict.fromkeys(sizes, path.name)
        total += sum(sizes.values())
    if len(paths) > 1 or paths[0].name != checkpoint.WEIGHTS:
        checkpoint.write_index(dst, weight_map, total)
    if (src / checkpoint.STATE).is_file():
        _cut_file(src / checkpoint.STATE, dst / checkpoint.STATE, family, cut, {})
    config = cut_config(checkpoint.read_config(src), family, cut)
    (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    checkpoint.copy_companions(src, dst)


def _cut_file(src: Path, dst: Path, family: Family, cut: Selection, repaired: Mapping[str, Path]) -> dict[str, int]:
    """Cut one safetensors file; returns the bytes of each tensor written. A file of which nothing stays is left out."""
    found = safefile.entries(src)
    placed = [(entry, _place(entry.name, entry.shape[0] if entry.shape else 0, family, cut)) for entry in found]
    kept = [(entry, place) for entry, place in placed if place is not None]
    specs = [(place.name, entry.dtype, _shape(entry.shape, place)) for entry, place in kept]

    def produce() -> Iterator[Tensor]:
        for entry, place in kept:
            if entry.name in repaired:
                yield safefile.read(safefile.entries(repaired[entry.name])[0])
                continue
            tensor = safefile.read(entry)
            yield tensor if place.kept is None else tensor.index_select(place.axis, place.kept)

    if kept:
        safefile.write(dst, specs, produce())
        dst.chmod(0o644)
    return {name: math.prod(shape) * safefile.ITEM_BYTES[dtype] for name, dtype, shape in specs}


def _shape(shape: tuple[int, ...], place: _Placed) -> tuple[int, ...]:
    if place.kept is None:
        return shape
    return (*shape[: place.axis], len(place.kept), *shape[place.axis + 1 :])
