"""Prune weights and config together, tensor by tensor, so that memory holds one tensor whatever the model's size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.model import axes, checkpoint, safetensors_io
from ptl.model.axes import FUSED_QKV, GROUPS, HIDDEN, Axes
from ptl.model.experts import FUSED, GATE_UP, Experts
from ptl.model.families import IN_LAYER, ROTARY, ConfigJson, Family
from ptl.model.pretrained import config_with_defaults
from ptl.model.safetensors_io import Entry, NewTensor, TensorShape
from ptl.model.shapes import EMBEDDINGS, LAST_NORM

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What stays."""

    layers: tuple[int, ...]  # their numbers in the source, ascending
    # Of each of these layers: int64 [width], ascending, or [experts, width] of a mixture; empty: all neurons stay
    neurons: Mapping[int, Tensor]
    experts: Mapping[int, Tensor] = dataclass_field(default_factory=dict)  # int64 [experts that stay]; not with neurons
    hidden: Tensor | None = None  # dimensions of the residual stream: int64 [width], ascending; None: all stay
    groups: Mapping[int, Tensor] = dataclass_field(default_factory=dict)  # KV heads of each layer: int64 [heads]


@dataclass(frozen=True)
class PrunedTensor:
    """How a tensor of the source gets into the pruned checkpoint."""

    name: str  # in the pruned checkpoint
    axis: int = 0  # along which it is pruned
    kept: Tensor | None = None  # int64 [n], indices that stay along the axis, or [E, n] of each expert; None: all
    narrowed: Mapping[int, Tensor] = dataclass_field(default_factory=dict)  # int64 [n], of other axes
    scale: float = 1.0  # of the values, plus `offset`
    offset: float = 0.0

    def shape(self, source_shape: TensorShape) -> TensorShape:
        """The shape of the pruned tensor."""
        shape = list(source_shape)
        if self.kept is not None:
            shape[self.axis] = self.kept.shape[-1]
        for axis, kept in self.narrowed.items():
            shape[axis] = len(kept)
        return tuple(shape)

    def values(self, source: Tensor) -> Tensor:
        """The pruned tensor."""
        import torch

        for axis, kept in self.narrowed.items():
            source = source.index_select(axis, kept)
        if self.scale != 1:
            source = ((source.double() + self.offset) * self.scale - self.offset).to(source.dtype)
        if self.kept is None:
            return source
        if self.kept.dim() == 1:
            return source.index_select(self.axis, self.kept)
        experts = zip(source, self.kept, strict=True)
        return torch.stack([expert.index_select(self.axis - 1, kept) for expert, kept in experts])


def pruned_tensor(
    name: str,
    shape: TensorShape,
    family: Family,
    selection: Selection,
) -> PrunedTensor | None:
    """What becomes of a tensor; None where it is removed. The same for weights and their optimizer state."""
    if ROTARY.match(name):
        return None
    # Embeddings, the last norm and the output layer stay as they are.
    match = IN_LAYER.match(name)
    if match is None:
        return PrunedTensor(name)
    layer = int(match["layer"])
    if layer not in selection.layers:
        return None
    # The layers that stay are numbered anew, without gaps.
    number = selection.layers.index(layer)
    part, kind = match["part"], match["kind"]
    prefix = f"{match['prefix']}{number}."
    new_name = f"{prefix}{part}.{kind}" if kind else f"{prefix}{part}"
    kept_experts = selection.experts.get(layer)
    if kept_experts is not None and family.experts is not None:
        return _pruned_expert_tensor(new_name, prefix, part, family.experts, kept_experts)
    kept = selection.neurons.get(layer)
    if kept is not None and family.experts is not None:
        return _narrowed_expert_tensor(new_name, part, shape, family.experts, kept)
    if kept is None or not family.has_neurons(part, kind):
        return PrunedTensor(new_name)
    if part == family.down_projection:  # [hidden, intermediate]
        return PrunedTensor(new_name, axis=1, kept=kept)
    return PrunedTensor(new_name, kept=_neuron_rows(kept, shape[0], family.fused_projections))


class Narrowing:
    """What becomes of the tensors of a checkpoint where dimensions of the residual stream and KV heads go.

    An RMS norm over fewer dimensions divides by more: with H of them before and H' afterwards, its gain times
    sqrt(H / H') and epsilon times H / H' make it what it is where those that go are zero.
    """

    def __init__(self, src: Path, family: Family, selection: Selection) -> None:
        config = checkpoint.read_config(src)
        self.family, self.selection = family, selection
        self.tied = family.is_tied(config)
        self.config = config_with_defaults(config)
        self.axes = axes.of_config(config, family, checkpoint.contents(src))

    def of(self, pruned: PrunedTensor, name: str, shape: TensorShape) -> PrunedTensor:
        """A tensor of the source, or of its optimizer state, narrowed besides."""
        weight = name.removeprefix("exp_avg.").removeprefix("exp_avg_sq.")
        kinds = self.axes.get(weight, ())
        match = IN_LAYER.match(name)
        heads = self.selection.groups.get(int(match["layer"])) if match else None
        narrowed = {}
        for axis, kind in enumerate(kinds):
            if kind == HIDDEN and self.selection.hidden is not None:
                narrowed[axis] = self.selection.hidden
            elif kind == GROUPS and heads is not None:
                narrowed[axis] = self._rows(heads, shape[axis], fused=weight.endswith(FUSED_QKV))
        # Adam's step does not depend on the scale of a parameter.
        scale = self._scale(weight, kinds) if weight == name else 1.0
        offset = self.family.norm_offset if kinds == (HIDDEN,) else 0.0
        return replace(pruned, narrowed=narrowed, scale=scale, offset=offset)

    def _rows(self, heads: Tensor, rows: int, fused: bool) -> Tensor:
        """Rows of the KV heads that stay and of their query heads: each group's follow each other."""
        import torch

        groups = axes.kv_heads(self.config)
        size = rows // groups  # of a group in all projections
        per_group = self.config.num_attention_heads // groups
        parts = [size * per_group // (per_group + 2), *[size // (per_group + 2)] * 2] if fused else [size]
        kept, start = [], 0
        for part in parts:  # queries, keys and values, or one of them
            kept.append((start + heads[:, None] * part + torch.arange(part)).flatten())
            start += part * groups
        return torch.cat(kept)

    def _scale(self, name: str, kinds: Axes) -> float:
        if self.selection.hidden is None:
            return 1.0
        growth = math.sqrt(self.config.hidden_size / len(self.selection.hidden))
        # Gemma multiplies embeddings by the root of the hidden size: a tied output layer does the last norm's part.
        if self.family.scaled_embeddings and name == EMBEDDINGS:
            return growth
        is_last = self.family.scaled_embeddings and self.tied and name == LAST_NORM
        is_norm = kinds == (HIDDEN,) and name.endswith("norm.weight") and not is_last
        return growth if is_norm else 1.0


def _pruned_expert_tensor(
    new_name: str,
    prefix: str,  # of the layer, in the pruned checkpoint
    part: str,
    experts: Experts,
    kept: Tensor,  # int64 [experts that stay], ascending
) -> PrunedTensor | None:
    """What becomes of a layer's tensor where whole experts go; None where it belongs to one of those."""
    if experts.counts_experts(part):  # the router's rows, and fused experts
        return PrunedTensor(new_name, kept=kept)
    expert = experts.number(part)
    if expert is None:
        return PrunedTensor(new_name)
    staying = kept.tolist()
    if expert not in staying:
        return None
    # The experts that stay are numbered anew, as the router's rows are.
    return PrunedTensor(f"{prefix}{experts.renumbered(part, staying.index(expert))}.weight")


def _narrowed_expert_tensor(
    new_name: str,
    part: str,
    shape: TensorShape,
    experts: Experts,
    kept: Tensor,  # int64 [experts, neurons that stay], ascending
) -> PrunedTensor:
    """What becomes of a layer's tensor where every expert keeps some of its neurons."""
    expert = experts.number(part)
    if expert is not None:
        kept = kept[expert]
    elif part not in FUSED:  # the router, and what is outside of the experts
        return PrunedTensor(new_name)
    if experts.is_down_projection(part):  # [..., hidden, intermediate]
        return PrunedTensor(new_name, axis=len(shape) - 1, kept=kept)
    axis = len(shape) - 2
    rows = _neuron_rows(kept, shape[axis], fused_projections=2) if part == GATE_UP else kept
    return PrunedTensor(new_name, axis, rows)


def _neuron_rows(kept: Tensor, rows: int, fused_projections: int) -> Tensor:
    """Rows of the kept neurons [..., n] in a weight of so many rows: the same in each of the stacked projections."""
    import torch

    starts = rows // fused_projections * torch.arange(fused_projections)  # [projections]
    return (kept.unsqueeze(-2) + starts[:, None]).flatten(-2)


def prune_config(config: ConfigJson, family: Family, selection: Selection) -> dict[str, Any]:
    """The config of the pruned model, with no field that the family does not have already."""
    pruned = dict(config)
    depth = config["num_hidden_layers"]
    pruned["num_hidden_layers"] = len(selection.layers)
    # Lists with an entry for each layer
    for field in family.per_layer_fields:
        entries = config.get(field)
        if entries is None and len(selection.layers) < depth:
            # What transformers would derive from a layer's number must stay with the layer.
            entries = getattr(config_with_defaults(config), field, None)
        if isinstance(entries, list):
            pruned[field] = [entries[layer] for layer in selection.layers]
        else:
            pruned.pop(field, None)
    # Counts of leading layers
    for field in family.prefix_fields:
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
    if selection.hidden is not None or selection.groups:
        pruned |= _narrow_config(config, selection)
    # The selection has one width, or one number of experts, for all layers, as config.json does.
    for kept in selection.neurons.values():
        pruned[family.width_field] = kept.shape[-1]
    for kept in selection.experts.values():
        assert family.experts is not None
        names = [name for name in family.experts.counts if name in config] or family.experts.counts[:1]
        pruned |= dict.fromkeys(names, len(kept))
    return pruned


def _narrow_config(config: ConfigJson, selection: Selection) -> dict[str, Any]:
    """The fields of a config whose residual stream is narrower, or which has fewer KV heads."""
    full = config_with_defaults(config)
    # What transformers would otherwise derive from the hidden size
    fields: dict[str, Any] = {"head_dim": axes.head_size(full)}
    if selection.hidden is not None:
        hidden = len(selection.hidden)
        fields |= {"hidden_size": hidden, "rms_norm_eps": full.rms_norm_eps * full.hidden_size / hidden}
    for kept in selection.groups.values():
        per_group = full.num_attention_heads // axes.kv_heads(full)
        fields |= {"num_key_value_heads": len(kept), "num_attention_heads": per_group * len(kept)}
    return fields


def write_pruned(src: Path, dst: Path, family: Family, selection: Selection, *, state: bool = True) -> None:
    """Write the pruned checkpoint to `dst`, tensor by tensor; with `state` also the optimizer's that is next to it."""
    dst.mkdir(parents=True, exist_ok=True)
    narrowing = Narrowing(src, family, selection) if selection.hidden is not None or selection.groups else None

    def pruned(entry: Entry) -> NewTensor | None:
        tensor = pruned_tensor(entry.name, entry.shape, family, selection)
        if tensor is None:
            return None
        if narrowing is not None:
            tensor = narrowing.of(tensor, entry.name, entry.shape)
        spec = (tensor.name, entry.dtype, tensor.shape(entry.shape))
        return spec, lambda: tensor.values(safetensors_io.read_tensor(entry))

    checkpoint.rewrite(src, dst, pruned)
    # Recovery resumes with the optimizer state of what stays.
    moments = src / checkpoint.STATE
    if state and moments.is_file():
        safetensors_io.rewrite(moments, dst / checkpoint.STATE, pruned)
    checkpoint.write_json(dst / "config.json", prune_config(checkpoint.read_config(src), family, selection))
    checkpoint.copy_companions(src, dst)
