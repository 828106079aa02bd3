"""The loss of many pruned variants of one model, measured in one pass over its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptl.model.families import Family
from ptl.pruning.layerwise import LayerwiseModel, States, layers_in_turn
from ptl.pruning.routing import Routed, activations, outputs, running_experts


@dataclass(frozen=True)
class PrunedVariant:
    """The model without some layers, and with only some neurons in others."""

    skipped: frozenset[int] = frozenset()  # layers that the hidden states pass by
    # Kept indices by layer, of a mixture those of each expert; all others are masked
    neurons: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass
class _Group:
    """Variants that are the same up to this layer share their hidden states."""

    states: States
    members: list[int]  # their positions among the variants


@torch.no_grad()
def losses(model: LayerwiseModel, variants: Sequence[PrunedVariant]) -> Tensor:
    """Mean loss of every sequence's answer tokens under every variant: float64 [variants, sequences].

    Each layer is loaded once. Variants share their hidden states until they differ, so that memory grows with the
    number of different ones.
    """
    # At first all variants are the same.
    count = len(variants)
    groups = [_Group(model.embed(), list(range(count)))]
    for i, layer in layers_in_turn(model, f"loss of {count} variants, by layer"):
        # A group is divided where its members begin to differ.
        groups = [part for group in groups for part in _advance(model, layer, i, group, variants)]
    measured = torch.zeros(count, model.num_sequences, dtype=torch.float64)
    with model.head():
        for group in groups:
            measured[group.members] = _sequence_losses(model, group.states)  # the same for all members
    return measured


def _advance(
    model: LayerwiseModel,
    layer: nn.Module,
    i: int,
    group: _Group,
    variants: Sequence[PrunedVariant],
) -> Iterator[_Group]:
    """The group after layer i, divided by what its members do in that layer."""
    members_by_change: dict[Hashable, list[int]] = defaultdict(list)
    for member in group.members:
        members_by_change[_layer_change(variants[member], i)].append(member)
    for members in members_by_change.values():
        variant = variants[members[0]]  # all of them are the same up to here
        states = group.states
        if i not in variant.skipped:
            with _masked(layer, model.family, variant.neurons.get(i)):
                states = model.run_batches(i, states)
        yield _Group(states, members)


def _layer_change(variant: PrunedVariant, i: int) -> Hashable:
    """What a variant does in layer i, in a form that compares: skip it, mask neurons (the others are kept), nothing."""
    if i in variant.skipped:
        return "skipped"
    kept = variant.neurons.get(i)
    return None if kept is None else tuple(kept.flatten().tolist())


def _masked(
    layer: nn.Module,
    family: Family,
    kept: Tensor | None,  # int64 [kept], or [E, kept] of each expert; None: all
) -> AbstractContextManager[None]:
    """Neurons outside `kept` are zero while the block lasts."""
    if kept is None:
        return nullcontext()
    if family.experts is None:
        return _masked_inputs(layer.get_submodule(family.down_projection), kept)

    def run(experts: Any, routed: Routed) -> Tensor:
        values = activations(experts, routed)  # [n, F]
        keep = torch.zeros_like(values[0])  # [F]
        keep[kept[routed.expert].to(keep.device)] = 1
        return outputs(experts, routed, values * keep)

    return running_experts(layer, run)


@contextmanager
def _masked_inputs(down_projection: nn.Module, kept: Tensor) -> Iterator[None]:
    """Inputs outside `kept` are zero while the block lasts."""

    def mask(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (activations,) = inputs  # [B, T, F]
        keep = torch.zeros_like(activations[0, 0])  # [F]
        keep[kept.to(keep.device)] = 1
        return (activations * keep,)

    with down_projection.register_forward_pre_hook(mask):
        yield


def _sequence_losses(model: LayerwiseModel, states: States) -> Tensor:
    """Mean loss of every sequence of all batches, from the last hidden states: float64 [sequences]."""
    means = []
    for b, hidden in enumerate(states):
        # One sequence at a time: logits are as large as the vocabulary.
        for row, count in enumerate(model.predicted(b).tolist()):
            loss = model.loss(b, row, hidden[row : row + 1])
            means.append(float(loss) / max(1, count))
    return torch.tensor(means, dtype=torch.float64)
