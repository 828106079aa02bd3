"""Cut weights and config together, tensor by tensor, so that memory holds one tensor whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl import checkpoint
from ptl.families import IN_LAYER, Family

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """What stays. `neurons` maps a kept layer's old index to int64 [width], ascending; empty: all neurons stay."""

    layers: tuple[int, ...]
    neurons: Mapping[int, Tensor]


def cut_tensor(name: str, tensor: Tensor, family: Family, cut: Cut) -> tuple[str, Tensor] | None:
    """The tensor's new name and value, or None when its layer goes. Serves weights and their Adam moments alike."""
    match = IN_LAYER.match(name)
    if match is None:
        return name, tensor
    layer = int(match["layer"])
    if layer not in cut.layers:
        return None
    name = f"{match['prefix']}{cut.layers.index(layer)}.{match['part']}.{match['kind']}"
    kept = cut.neurons.get(layer)
    if kept is None:
        return name, tensor
    if match["part"] in family.rows:
        return name, tensor.index_select(0, kept)
    if match["part"] == family.columns and match["kind"] == "weight":
        return name, tensor.index_select(1, kept).contiguous()
    return name, tensor


def cut_config(config: dict[str, Any], family: Family, cut: Cut) -> dict[str, Any]:
    """The config of the cut model, with no field that the family does not have already."""
    config = dict(config)
    config[family.depth_field] = len(cut.layers)
    for field in family.per_layer_fields:
        if isinstance(config.get(field), list):
            config[field] = [config[field][i] for i in cut.layers]
    if cut.neurons:
        widths = {len(kept) for kept in cut.neurons.values()}
        assert len(widths) == 1, f"widths differ between layers: {sorted(widths)}"
        config[family.width_field] = widths.pop()
    return config


def cut_checkpoint(src: Path, dst: Path, family: Family, cut: Cut) -> None:
    """Write the cut checkpoint to `dst`, shard by shard; the optimizer state beside it is cut with it."""
    dst.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    paths = checkpoint.shards(src)
    for path in paths:
        kept = _cut_file(path, dst / path.name, family, cut)
        weight_map |= dict.fromkeys(kept, path.name)
        total += sum(kept.values())
    if len(paths) > 1 or paths[0].name != checkpoint.WEIGHTS:
        checkpoint.write_index(dst, weight_map, total)
    if (src / checkpoint.STATE).is_file():
        _cut_file(src / checkpoint.STATE, dst / checkpoint.STATE, family, cut)
    config = cut_config(checkpoint.read_config(src), family, cut)
    (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    checkpoint.copy_companions(src, dst)


def _cut_file(src: Path, dst: Path, family: Family, cut: Cut) -> dict[str, int]:
    """Cut one safetensors file; returns the bytes of each tensor written."""
    named = {}
    for name, tensor in checkpoint.tensors(src):
        result = cut_tensor(name, tensor, family, cut)
        if result is not None:
            named[result[0]] = result[1]
    if named:
        checkpoint.write_shard(dst, named)
    return {name: tensor.numel() * tensor.element_size() for name, tensor in named.items()}
