"""Scores for the neurons inside the experts of a mixture: importance.py's criteria on the tokens sent to each expert.

An expert's output is multiplied by its router's weight, so a neuron with activation a and column w adds (weight x a) w
at the tokens that are sent to its expert, and nothing at all others. Shape letters: experts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptl.pruning.experts import EXPERTS, Routed, RunExpert, activations, outputs, running_experts
from ptl.pruning.layerwise import LayerwiseModel, layers_in_turn
from ptl.pruning.scoring import NeuronScores, column_norms, first_order_scores

# Neurons that never change anything keep the order of their weights' norms, with scores below every threshold.
BELOW_THRESHOLDS = 1e-30


def _max(total: Tensor, changes: Tensor, _shares: Tensor) -> Tensor:
    """The largest change over all tokens."""
    return torch.maximum(total, changes.amax(dim=0))


def _mean(total: Tensor, changes: Tensor, shares: Tensor) -> Tensor:
    """The mean change over a sequence's tokens, those that are sent elsewhere included, and over the sequences."""
    return total + shares @ changes


@torch.no_grad()
def _by_output_change(
    model: LayerwiseModel,
    _seed: int,
    *,
    join: Callable[[Tensor, Tensor, Tensor], Tensor],  # total [F], changes [n, F] and shares [n] of tokens -> [F]
) -> NeuronScores:
    """Score by how far the layer's output moves when one neuron is removed, one layer after the other."""
    scores = []
    states = model.embed()  # [B, T, H] of each batch
    for i, layer in layers_in_turn(model, "scoring neurons of experts, by layer"):
        norms = _of_experts(layer, lambda _gate_up, down: column_norms(down))  # [E, F]
        total = torch.zeros_like(norms)
        for b, hidden in enumerate(states):
            with running_experts(layer, _observing(_shares(model, b), total, join)):
                states[b] = model.run(i, b, hidden)
        scores.append((total * norms).cpu())
    return scores


def _shares(model: LayerwiseModel, b: int) -> Tensor:
    """What each token of a batch counts in a mean over sequences of means over tokens: [B * T]; 0 for padding."""
    mask = model.batches[b]["attention_mask"]  # [B, T]
    lengths = model.tokens(b)[:, None]
    return (mask / lengths / model.num_sequences).flatten()


def _observing(shares: Tensor, total: Tensor, join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> RunExpert:
    """Runs an expert, and joins to its row of `total` [E, F] how far each neuron moves the layer's output."""

    def run(experts: Any, routed: Routed) -> Tensor:
        values = activations(experts, routed)  # [n, F]
        share = shares[routed.rows]  # [n]
        real = share > 0
        if real.any():
            weighted = values[real].float() * routed.weights[real, None].float()
            total[routed.expert] = join(total[routed.expert], weighted.abs(), share[real])
        return outputs(experts, routed, values)

    return run


def _changes_by_gradient(
    model: LayerwiseModel,
    i: int,
    b: int,
    hidden: Tensor,  # [B, T, H]
    gradient: Tensor,  # of the loss by the layer's output: [B, T, H]
) -> tuple[Tensor, Tensor]:
    """The gradient by the layer's input [B, T, H], and each sequence's first-order change of the loss [B, E, F].

    The router's weight is part of the gradient.
    Memory: the batch's activations in all experts of the layer, which the backward pass needs.
    """
    visits: list[tuple[Routed, Tensor]] = []

    def record(experts: Any, routed: Routed) -> Tensor:
        values = activations(experts, routed)  # [n, F]
        visits.append((routed, values))
        return outputs(experts, routed, values)

    layer = model.layers[i]
    with running_experts(layer, record):
        output = model.run(i, b, hidden)
    by_input, *slopes = torch.autograd.grad(output, (hidden, *(values for _, values in visits)), gradient)

    mask = model.batches[b]["attention_mask"]  # [B, T]
    down: Any = layer.get_submodule(EXPERTS).down_proj  # [E, H, F]
    changes = torch.zeros(len(mask), len(down), down.shape[-1], device=model.device)
    for (routed, values), slope in zip(visits, slopes, strict=True):
        of_tokens = values.detach().float() * slope.float()  # [n, F]
        # Which tokens are whose; a product, as sums by index differ from run to run on a GPU.
        sequence = torch.arange(len(mask), device=model.device)[:, None]
        members = (routed.rows // mask.shape[1] == sequence) & mask.flatten()[routed.rows].bool()  # [B, n]
        changes[:, routed.expert] = members.float() @ of_tokens
    return by_input, changes


@torch.no_grad()
def _by_weights(model: LayerwiseModel, _seed: int) -> NeuronScores:
    """L2 norm of the neuron's weights; the data plays no part."""
    return [_of_experts(layer, _weight_norms).cpu() for _, layer in layers_in_turn(model, "scoring neurons, by layer")]


def _weight_norms(gate_up: Tensor, down: Tensor) -> Tensor:
    """L2 norm of each neuron's weights in an expert's projections [2F, H] and [H, F]: float32 [F]."""
    row_squares = gate_up.float().square().sum(dim=1)  # [2F]
    squares = column_norms(down).square() + row_squares.view(2, -1).sum(dim=0)
    return squares.sqrt()


def _of_experts(layer: nn.Module, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The scores [F] of one expert's weights after the other: float32 [E, F]."""
    experts: Any = layer.get_submodule(EXPERTS)
    return torch.stack([score(*weights) for weights in zip(experts.gate_up_proj, experts.down_proj, strict=True)])


def _random(model: LayerwiseModel, seed: int) -> NeuronScores:
    """Uniform numbers: the control of every criterion."""
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for layer in model.layers:
        down: Any = layer.get_submodule(EXPERTS).down_proj  # [E, H, F]
        scores.append(torch.rand(len(down), down.shape[-1], generator=generator))
    return scores


# By their names in the setting prune.criterion, as of importance.py; each takes the model and a seed
CRITERIA: dict[str, Callable[[LayerwiseModel, int], NeuronScores]] = {
    "max": partial(_by_output_change, join=_max),
    "mean": partial(_by_output_change, join=_mean),
    "weight": _by_weights,
    "taylor": partial(first_order_scores, backwards=_changes_by_gradient),
    "random": _random,
}


def expert_neuron_scores(model: LayerwiseModel, criterion: str, seed: int) -> NeuronScores:
    """Score every neuron of every expert on the model's batches; returns float32 [E, F] per layer.

    Where all neurons of an expert score 0, as no token is sent to it, their weights order them.
    """
    scores = CRITERIA[criterion](model, seed)
    for i, of_layer in enumerate(scores):
        silent = (of_layer == 0).all(dim=1)  # [E]
        if silent.any():
            with model.layer(i) as layer, torch.no_grad():
                norms = _of_experts(layer, _weight_norms).cpu()
            of_layer[silent] = norms[silent] * BELOW_THRESHOLDS
    return scores
