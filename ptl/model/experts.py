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
from ptl.model.safetensors_io import Entries

if TYPE_CHECKING:
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

    # config fields that hold the number of experts; transformers writes the one or the other
    counts: tuple[str, ...]
    width: str = "intermediate_size"  # config field that holds the neurons of each expert
    # In the layout of separate tensors: what holds router and experts, and an expert's gate, up and down projection
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router_part: str = ROUTER  # in transformers' memory
    # the router's tensor [E]: a bias, or what it adds to its scores when it chooses
    router_vector: str = ""
    # Whether experts have biases and are stored transposed, [E, H, 2F] and [E, F, H]; then all are in the fused layout
    transposed: bool = False
    # Whether config.json may list layers with one MLP in place of experts (mlp_only_layers, decoder_sparse_step)
    lists_dense_layers: bool = False

    def part(self, expert: int, projection: str) -> str:
        """An expert's part of a layer, in the layout of separate tensors."""
        return f"{self.block}.experts.{expert}.{projection}"

    def number(self, part: str) -> int | None:
        """The expert that a part belongs to, where each has tensors of its own."""
        match = re.match(rf"{self.block}\.experts\.(\d+)\.", part)
        return int(match[1]) if match else None

    def counts_experts(self, part: str) -> bool:
        """Whether the first dimension of a part counts the experts."""
        return self.is_router(part) or part in (*FUSED, *BIASES)

    def is_router(self, part: str) -> bool:
        """Whether a part belongs to the router."""
        return part in (self.router_part, f"{self.block}.gate", self.router_vector)

    def dense_config(self, config: Mapping[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
        """The fields of Qwen's configs by which `layers` are of the same kind once they are numbered without gaps."""
        listed = config.get("mlp_only_layers") or ()
        step = config.get("decoder_sparse_step") or 1
        dense = [
            number for number, layer in enumerate(layers) if layer in listed or (layer + 1) % step
        ]
        if not self.lists_dense_layers or (not listed and step == 1):
            return {}
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    def views(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of transformers' memory as the separate ones that a checkpoint has in its place, by their names."""
        layer, _, part = name.partition(".mlp.")
        part = f"mlp.{part}"
        if part == f"{ROUTER}.weight":
            return {f"{layer}.{self.block}.gate.weight": tensor}
        if part not in FUSED:
            return {name: tensor}
        gate, up, down = self.projections
        projections = (gate, up) if part == GATE_UP else (down,)
        views: dict[str, Tensor] = {}
        for expert, rows in enumerate(tensor):  # [2F, H] or [H, F]
            for projection, view in zip(projections, rows.chunk(len(projections)), strict=True):
                views[f"{layer}.{self.part(expert, projection)}.weight"] = view
        return views


def stored_tensors(
    parameters: Mapping[str, Tensor], experts: Experts | None, names: Entries
) -> dict[str, Tensor]:
    """A model's tensors by the names that they have in a checkpoint with these names, as views where these differ."""
    if experts is None or experts.transposed or any(name.endswith(FUSED) for name in names):
        return dict(parameters)
    stored: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        stored |= experts.views(name, tensor)
    return stored


def read_parameter(entries: Entries, name: str, experts: Experts | None, like: Tensor) -> Tensor:
    """A parameter by its name in transformers' memory, in shape and dtype of `like`.

    Separate experts are put together one by one: only one of their tensors is in memory besides.
    """
    import torch

    if experts is None or name in entries:
        return safetensors_io.read_tensor(entries[name]).to(like.dtype)
    parameter = torch.empty(like.shape, dtype=like.dtype)
    for stored_name, view in experts.views(name, parameter).items():
        view.copy_(safetensors_io.read_tensor(entries[stored_name]))
    return parameter
