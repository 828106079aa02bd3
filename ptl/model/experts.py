"""Mixtures of experts: how a checkpoint names its router and its experts, in both layouts that there are on disk.

Separate: three tensors for each expert, as on the hub. Fused: all experts of a layer in two tensors, as transformers 5
has them in memory and saves them on request. Shape letters: E experts, F neurons of an expert, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptl.model import safetensors_io
from ptl.model.safetensors_io import Entries, Entry, TensorShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Names in transformers' memory, relative to a layer; the fused layout has the same
ROUTER = "mlp.gate"  # [E, H]
GATE_UP = "mlp.experts.gate_up_proj"  # [E, 2F, H]
DOWN = "mlp.experts.down_proj"  # [E, H, F]
FUSED = (GATE_UP, DOWN)
BIASES = (f"{GATE_UP}_bias", f"{DOWN}_bias")  # [E, 2F] and [E, H], where experts have them


@dataclass(frozen=True)
class Experts:
    """How a family names its experts."""

    counts: tuple[str, ...]  # config fields that hold the number of experts; transformers writes the one or the other
    width: str = "intermediate_size"  # config field that holds the neurons of each expert
    # In the layout of separate tensors: what holds router and experts, and an expert's gate, up and down projection
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router_part: str = ROUTER  # in transformers' memory
    router_vector: str = ""  # the router's tensor [E]: a bias, or what it adds to its scores when it chooses
    # Whether experts have biases and are stored transposed, [E, H, 2F] and [E, F, H]; then all are in the fused layout
    transposed: bool = False
    # Whether config.json may list layers with one MLP in place of experts (mlp_only_layers, decoder_sparse_step)
    lists_dense_layers: bool = False

    def router(self, fused: bool) -> str:
        """The router's part of a layer."""
        return self.router_part if fused else f"{self.block}.gate"

    def part(self, expert: int, projection: str) -> str:
        """An expert's part of a layer, in the layout of separate tensors."""
        return f"{self.block}.experts.{expert}.{projection}"

    def is_fused(self, names: Entries) -> bool:
        """Whether a checkpoint with these tensors has the fused layout."""
        return self.transposed or any(name.endswith(FUSED) for name in names)

    def number(self, part: str) -> int | None:
        """The expert that a part belongs to, where each has tensors of its own."""
        match = re.match(rf"{self.block}\.experts\.(\d+)\.", part)
        return int(match[1]) if match else None

    def is_down_projection(self, part: str) -> bool:
        """Whether a part of an expert, or of all experts, is [hidden, neurons]."""
        return part == DOWN or part.endswith(f".{self.projections[2]}")

    def renumbered(self, part: str, expert: int) -> str:
        """The name of a part once its expert has another number."""
        return self.part(expert, part.rpartition(".")[2])

    def counts_experts(self, part: str) -> bool:
        """Whether the first dimension of a part counts the experts."""
        return self.is_router(part) or part in (*FUSED, *BIASES)

    def is_router(self, part: str) -> bool:
        """Whether a part belongs to the router."""
        return part in (self.router_part, f"{self.block}.gate", self.router_vector)

    def has_router(self, name: str) -> bool:
        """Whether a layer's tensor belongs to the router, by its name in transformers' memory."""
        return name in (f"{self.router_part}.weight", self.router_vector)

    def dense_config(self, config: Mapping[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
        """The fields of Qwen's configs by which `layers` are of the same kind once they are numbered without gaps."""
        listed, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
        if not self.lists_dense_layers or (not listed and step == 1):
            return {}
        dense = [number for number, layer in enumerate(layers) if layer in listed or (layer + 1) % step]
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    def stored_shapes(self, shapes: Mapping[str, TensorShape], fused: bool) -> dict[str, TensorShape]:
        """The shapes of tensors by their names in a checkpoint, from those by their names in transformers' memory."""
        if fused:
            return dict(shapes)
        gate, up, down = self.projections
        stored: dict[str, TensorShape] = {}
        for name, shape in shapes.items():
            layer, _, part = name.partition(".mlp.")
            part = f"mlp.{part}"
            if part == GATE_UP:
                number, both, hidden = shape
                names = [f"{layer}.{self.part(expert, of)}.weight" for expert in range(number) for of in (gate, up)]
                stored |= dict.fromkeys(names, (both // 2, hidden))
            elif part == DOWN:
                names = [f"{layer}.{self.part(expert, down)}.weight" for expert in range(shape[0])]
                stored |= dict.fromkeys(names, shape[1:])
            elif part == f"{ROUTER}.weight":
                stored[f"{layer}.{self.router(fused)}.weight"] = shape
            else:
                stored[name] = shape
        return stored


def read_parameter(entries: Entries, name: str, experts: Experts | None, dtype: torch.dtype) -> Tensor:
    """A parameter by its name in transformers' memory; separate experts are put together one by one."""
    if experts is None or name in entries:
        return safetensors_io.read_tensor(entries[name]).to(dtype)
    layer, _, part = name.partition(".mlp.")
    if f"mlp.{part}" == f"{ROUTER}.weight":
        return safetensors_io.read_tensor(entries[f"{layer}.{experts.router(fused=False)}.weight"]).to(dtype)
    gate, up, down = experts.projections
    projections = (gate, up) if f"mlp.{part}" == GATE_UP else (down,)
    return _stacked(entries, experts, layer, projections, dtype)


def stored_tensor(parameters: Mapping[str, Tensor], name: str, experts: Experts | None) -> Tensor:
    """A tensor by its name in a checkpoint, from the parameters in transformers' memory, of which it is a view."""
    if experts is None or name in parameters:
        return parameters[name]
    layer, _, part = name.partition(f".{experts.block}.")
    expert = experts.number(f"{experts.block}.{part}")
    if expert is None:
        return parameters[f"{layer}.{ROUTER}.weight"]
    gate, up, _ = experts.projections
    projection = part.split(".")[-2]
    if projection not in (gate, up):
        return parameters[f"{layer}.{DOWN}"][expert]
    return parameters[f"{layer}.{GATE_UP}"][expert].chunk(2)[projection == up]


def _stacked(
    entries: Entries,
    experts: Experts,
    layer: str,
    projections: tuple[str, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Some projections of all experts of a layer, the projections one below the other: [E, rows, columns]."""
    import torch

    stored: list[list[Entry]] = []  # of each expert
    while (first := f"{layer}.{experts.part(len(stored), projections[0])}.weight") in entries:
        names = [first, *(f"{layer}.{experts.part(len(stored), other)}.weight" for other in projections[1:])]
        stored.append([entries[name] for name in names])
    rows, columns = stored[0][0].shape
    stacked = torch.empty(len(stored), len(projections), rows, columns, dtype=dtype)
    # Only one expert's tensor is in memory beside the result.
    for expert, tensors in enumerate(stored):
        for position, entry in enumerate(tensors):
            stacked[expert, position] = safetensors_io.read_tensor(entry)
    return stacked.view(len(stored), len(projections) * rows, columns)
