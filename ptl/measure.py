"""The loss of many cuts of one model, measured in one pass over its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptl.stream import LayerwiseModel


@dataclass(frozen=True)
class Variant:
    """The model without some layers, and with only some neurons (kept indices, by layer; others are masked)."""

    skipped: frozenset[int] = frozenset()
    neurons: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass
class _Group:
    """Variants that are the same up to here share their hidden states."""

    states: list[Tensor]
    members: list[int]


def losses(stream: LayerwiseModel, variants: Sequence[Variant], progress: bool = True) -> Tensor:
    """Mean loss of every sequence's answer tokens under every variant: float64 [variants, sequences].

    Each layer is loaded once. Variants part where they differ; memory grows with those that have parted.
    """
    groups = [_Group(stream.embed(), list(range(len(variants))))]
    for i in tqdm(range(len(stream.layers)), desc=f"loss of {len(variants)} cuts, by layer", disable=not progress):
        with torch.no_grad(), stream.layer(i) as layer:
            groups = [part for group in groups for part in _advance(stream, layer, i, group, variants)]
    found = torch.zeros(len(variants), sum(len(batch["input_ids"]) for batch in stream.batches), dtype=torch.float64)
    with torch.no_grad(), stream.head():
        for group in groups:
            found[group.members] = torch.tensor(list(_sequence_losses(stream, group.states)), dtype=torch.float64)
    return found


def _advance(
    stream: LayerwiseModel, layer: nn.Module, i: int, group: _Group, variants: Sequence[Variant]
) -> Iterator[_Group]:
    """The group after layer i, parted by what its members do there."""
    parts: dict[tuple[int, ...] | None, list[int]] = {}
    for member in group.members:
        kept = variants[member].neurons.get(i)
        action = None if i in variants[member].skipped else () if kept is None else tuple(kept.tolist())
        parts.setdefault(action, []).append(member)
    for action, members in parts.items():
        if action is None:
            yield _Group(group.states, members)
            continue
        with masked(layer, stream.family.columns, variants[members[0]].neurons.get(i)):
            yield _Group([stream.run(i, b, hidden) for b, hidden in enumerate(group.states)], members)


@contextmanager
def masked(layer: nn.Module, columns: str, kept: Tensor | None) -> Iterator[None]:
    """Neurons outside `kept` are zero while the block lasts."""
    if kept is None:
        yield
        return

    def mask(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        keep = torch.zeros(inputs[0].shape[-1], dtype=inputs[0].dtype, device=inputs[0].device)
        keep[kept.to(keep.device)] = 1
        return (inputs[0] * keep,)

    handle = layer.get_submodule(columns).register_forward_pre_hook(mask)
    try:
        yield
    finally:
        handle.remove()


def _sequence_losses(stream: LayerwiseModel, states: list[Tensor]) -> Iterator[float]:
    for b, hidden in enumerate(states):
        for row, count in enumerate(stream.predicted(b).tolist()):
            yield float(stream.loss(b, row, hidden[row : row + 1])) / max(1, count)
