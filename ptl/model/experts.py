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
from ptl.model.safetensors_io import Entries, Entry

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
    router_loss: bool = True  # whether transformers has the routers' auxiliary loss
    grouped: bool = False  # whether the router chooses groups of experts first (n_group, topk_group)
    # What every token meets besides the experts that it is sent to, and what says how wide that is: it stays whole
    shared: tuple[str, ...] = ()
    shared_width: str = ""
    # Config fields that say which layers have one MLP in place of experts
    dense_fields: tuple[str, ...] = ()

    def count_field(self, config: Mapping[str, Any]) -> str:
        """The field of this config that holds the number of experts."""
        return next((field for field in self.counts if field in config), self.counts[0])

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

    def dense_config(self, layers: tuple[int, ...], dense_layers: tuple[int, ...]) -> dict[str, Any]:
        """The fields of Qwen's configs by which layers are of the same kind once they are numbered without gaps."""
        if "mlp_only_layers" not in self.dense_fields or not dense_layers:
            return {}
        kept_dense = [number for number, layer in enumerate(layers) if layer in dense_layers]
        return {"mlp_only_layers": kept_dense, "decoder_sparse_step": 1}

    def are_in(self, layer: int, config: Mapping[str, Any]) -> bool:
        """Whether a layer has experts, by a config without gaps; else it has one MLP in their place."""
        fields = {field: config.get(field) for field in self.dense_fields}
        is_leading = layer < (fields.get("first_k_dense_replace") or 0)
        is_listed = layer in (fields.get("mlp_only_layers") or ())
        is_between = bool((layer + 1) % (fields.get("decoder_sparse_step") or 1))
        return not (is_leading or is_listed or is_between)


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
