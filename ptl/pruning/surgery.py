"""Prune weights and config together, tensor by tensor, so that memory holds one tensor whatever the model's size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptl.model import axes, checkpoint, safetensors_io
from ptl.model.axes import FUSED_QKV, HIDDEN, KV_HEADS, NEURONS, Axes
from ptl.model.checkpoint import EMBEDDINGS, OUTPUT_LAYER
from ptl.model.families import IN_LAYER, ROTARY, ConfigJson, Family
from ptl.model.pretrained import config_with_defaults
from ptl.model.safetensors_io import Entry, NewTensor, TensorShape
from ptl.model.shapes import LAST_NORM

# lists of config.json with an entry for each layer
PER_LAYER_FIELDS = ("layer_types", "no_rope_layers")
PREFIX_FIELDS = ("max_window_layers", "first_k_dense_replace")  # its counts of leading layers


@dataclass(frozen=True)
class Selection:
    """What stays."""

    layers: tuple[int, ...]  # their numbers in the source, ascending
    # Of each of these layers: int64 [width], ascending, or [experts, width] of a mixture; empty: all neurons stay
    neurons: Mapping[int, Tensor]
    # int64 [experts that stay]; not with neurons
    experts: Mapping[int, Tensor] = dataclass_field(default_factory=dict)
    # dimensions of the residual stream: int64 [width], ascending; None: all stay
    hidden: Tensor | None = None
    # KV heads of each layer: int64 [heads]
    kv_heads: Mapping[int, Tensor] = dataclass_field(default_factory=dict)


@dataclass(frozen=True)
class PrunedTensor:
    """How a tensor of the source gets into the pruned checkpoint."""

    name: str  # in the pruned checkpoint
    kept: Mapping[int, Tensor]  # of an axis what stays: int64 [n], or [E, n] of each expert
    scale: float = 1.0  # of the values, plus `offset`
    offset: float = 0.0

    def shape(self, source_shape: TensorShape) -> TensorShape:
        """The shape of the pruned tensor."""
        return tuple(
            self.kept[axis].shape[-1] if axis in self.kept else size
            for axis, size in enumerate(source_shape)
        )

    def values(self, source: Tensor) -> Tensor:
        """The pruned tensor."""
        for axis, kept in self.kept.items():
            if kept.dim() == 1:
                source = source.index_select(axis, kept)
            else:
                experts = zip(source, kept, strict=True)
                source = torch.stack(
                    [expert.index_select(axis - 1, its) for expert, its in experts]
                )
        if self.scale == 1:
            return source
        # Gains exactly; embeddings are too large for twice as many bits.
        wide = source.double() if source.dim() == 1 else source
        return ((wide + self.offset) * self.scale - self.offset).to(source.dtype)


class Surgery:
    """What becomes of the tensors of a checkpoint and of its optimizer state.

    An RMS norm over fewer dimensions divides by more: with H of them before and H' afterwards, its gain times
    sqrt(H / H') and epsilon times H / H' make it what it is where those that go are zero.
    """

    def __init__(self, src: Path, family: Family, selection: Selection) -> None:
        config = checkpoint.read_config(src)
        self.family, self.selection = family, selection
        self.config = config_with_defaults(config)
        self.tied = self.config.tie_word_embeddings
        self.width = axes.sizes(self.config, family)[NEURONS]
        self.axes = axes.of_config(config, family, checkpoint.contents(src))

    def of(self, name: str, shape: TensorShape) -> PrunedTensor | None:
        """How a tensor is pruned; None where it is removed."""
        match = IN_LAYER.match(name)
        new_name = self._renumbered(match) if match else name
        if new_name is None or ROTARY.match(name):
            return None
        weight = name.removeprefix("exp_avg.").removeprefix("exp_avg_sq.")
        kinds = self.axes.get(weight, ())
        kept = {axis: self._kept(kind, match, shape[axis]) for axis, kind in enumerate(kinds)}
        if match and self.family.experts and self.family.experts.counts_experts(match["part"]):
            kept[0] = self.selection.experts.get(int(match["layer"]))
        return PrunedTensor(
            new_name,
            {axis: indices for axis, indices in kept.items() if indices is not None},
            # Adam's step does not depend on the scale of a parameter.
            scale=self._scale(weight, kinds) if weight == name else 1.0,
            offset=self.family.norm_offset if kinds == (HIDDEN,) else 0.0,
        )

    def _renumbered(self, match: re.Match[str]) -> str | None:
        """The name in the pruned checkpoint: layers and experts that stay are numbered anew, without gaps."""
        layer, part, experts = int(match["layer"]), match["part"], self.family.experts
        if layer not in self.selection.layers:
            return None
        staying = self.selection.experts.get(layer)
        expert = experts.number(part) if experts else None
        if experts and expert is not None and staying is not None:
            if expert not in staying.tolist():
                return None
            part = experts.part(staying.tolist().index(expert), part.rpartition(".")[2])
        kind = f".{match['kind']}" if match["kind"] else ""
        return f"{match['prefix']}{self.selection.layers.index(layer)}.{part}{kind}"

    def _kept(self, kind: str | None, match: re.Match[str] | None, size: int) -> Tensor | None:
        """What stays of an axis of this kind and size: int64 [n], or [E, n] of each expert; None: all."""
        if kind == HIDDEN:
            return self.selection.hidden
        if kind is None or match is None:
            return None
        layer, part = int(match["layer"]), match["part"]
        if kind == KV_HEADS:
            heads = self.selection.kv_heads.get(layer)
            return None if heads is None else self._rows(heads, size, fused=part == FUSED_QKV)
        neurons = self.selection.neurons.get(layer)
        expert = self.family.experts.number(part) if self.family.experts else None
        if neurons is None:
            return None
        kept = neurons if expert is None else neurons[expert]  # [..., n]
        # of the projections that are stacked in the tensor
        starts = self.width * torch.arange(size // self.width)
        return (kept.unsqueeze(-2) + starts[:, None]).flatten(-2)

    def _rows(self, heads: Tensor, rows: int, fused: bool) -> Tensor:
        """Rows of the KV heads that stay and of their query heads: each group's follow each other."""
        kv_heads = axes.kv_heads(self.config)
        size = rows // kv_heads  # of a group in all projections
        per_group = self.config.num_attention_heads // kv_heads
        parts = (
            [size * per_group // (per_group + 2), *[size // (per_group + 2)] * 2]
            if fused
            else [size]
        )
        kept, start = [], 0
        for part in parts:  # queries, keys and values, or one of them
            kept.append((start + heads[:, None] * part + torch.arange(part)).flatten())
            start += part * kv_heads
        return torch.cat(kept)

    def _scale(self, name: str, kinds: Axes) -> float:
        if self.selection.hidden is None:
            return 1.0
        growth = math.sqrt(self.config.hidden_size / len(self.selection.hidden))
        # Gemma multiplies embeddings by the root of the hidden size: a tied output layer does the last norm's part.
        if self.family.scaled_embeddings and (
            name == EMBEDDINGS or (self.tied and name == OUTPUT_LAYER)
        ):
            return growth
        is_last = self.family.scaled_embeddings and self.tied and name == LAST_NORM
        is_norm = kinds == (HIDDEN,) and name.endswith("norm.weight") and not is_last
        return growth if is_norm else 1.0


def prune_config(config: ConfigJson, family: Family, selection: Selection) -> dict[str, Any]:
    """The config of the pruned model, with no field that the family does not have already."""
    pruned = dict(config)
    depth = config["num_hidden_layers"]
    pruned["num_hidden_layers"] = len(selection.layers)
    for field in PER_LAYER_FIELDS:
        entries = config.get(field)
        if entries is None and len(selection.layers) < depth:
            # What transformers would derive from a layer's number must stay with the layer.
            entries = getattr(config_with_defaults(config), field, None)
        if isinstance(entries, list):
            pruned[field] = [entries[layer] for layer in selection.layers]
        else:
            pruned.pop(field, None)
    for field in PREFIX_FIELDS:
        leading = config.get(field)
        if isinstance(leading, int):
            # A count above the depth means all layers, and must stay above it.
            leading_kept = sum(layer < leading for layer in selection.layers)
            pruned[field] = leading_kept + max(0, leading - depth)
    # The extra layers are not copied.
    if config.get(family.extra_layers):
        pruned[family.extra_layers] = 0
    if family.experts is not None and len(selection.layers) < depth:
        pruned |= family.experts.dense_config(config, selection.layers)
    if selection.hidden is not None or selection.kv_heads:
        pruned |= _narrow_config(config, selection)
    # The selection has one width, or one number of experts, for all layers, as config.json does.
    for kept in selection.neurons.values():
        pruned[family.width_field] = kept.shape[-1]
    for kept in selection.experts.values():
        assert family.experts is not None
        names = [name for name in family.experts.counts if name in config] or family.experts.counts[
            :1
        ]
        pruned |= dict.fromkeys(names, len(kept))
    return pruned


def _narrow_config(config: ConfigJson, selection: Selection) -> dict[str, Any]:
    """The fields of a config whose residual stream is narrower, or which has fewer KV heads."""
    full = config_with_defaults(config)
    # What transformers would otherwise derive from the hidden size
    fields: dict[str, Any] = {"head_dim": axes.head_size(full)}
    if selection.hidden is not None:
        hidden = len(selection.hidden)
        fields |= {
            "hidden_size": hidden,
            "rms_norm_eps": full.rms_norm_eps * full.hidden_size / hidden,
        }
    for kept in selection.kv_heads.values():
        per_group = full.num_attention_heads // axes.kv_heads(full)
        fields |= {"num_key_value_heads": len(kept), "num_attention_heads": per_group * len(kept)}
    return fields


def write_pruned(
    src: Path, dst: Path, family: Family, selection: Selection, *, state: bool = True
) -> None:
    """Write the pruned checkpoint to `dst`, tensor by tensor; with `state` also the optimizer's that is next to it."""
    dst.mkdir(parents=True, exist_ok=True)
    surgery = Surgery(src, family, selection)

    def pruned(entry: Entry) -> NewTensor | None:
        tensor = surgery.of(entry.name, entry.shape)
        if tensor is None:
            return None
        spec = (tensor.name, entry.dtype, tensor.shape(entry.shape))
        return spec, lambda: tensor.values(safetensors_io.read_tensor(entry))

    checkpoint.rewrite(src, dst, pruned)
    # Recovery resumes with the optimizer state of what stays.
    moments = src / checkpoint.STATE
    if state and moments.is_file():
        safetensors_io.rewrite(moments, dst / checkpoint.STATE, pruned)
    checkpoint.write_json(
        dst / "config.json", prune_config(checkpoint.read_config(src), family, selection)
    )
    checkpoint.copy_companions(src, dst)
