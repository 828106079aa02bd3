"""The experts of a layer, run one after the other, each on the tokens that its router sends to it; and their scores.

Also those of the neurons inside them: importance.py's criteria on the tokens sent to each expert, whose output is
multiplied by its router's weight. So a neuron with activation a and column w adds (weight x a) w at the tokens that are
sent to its expert, and nothing at all others.

The less a score, the more redundant the expert or neuron; CRITERIA_OF_NEURONS is where a user extends.
Shape letters: B sequences, T tokens, H hidden size, E experts of a layer, K experts that each token is sent to, n
tokens sent to one expert, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptl.model.experts import DOWN
from ptl.pruning.layerwise import (
    LayerwiseModel,
    NeuronScores,
    Observed,
    column_norms,
    first_order_scores,
    layers_in_turn,
)

EXPERTS = "mlp.experts"  # the module of a layer that holds all of its experts
# Neurons that never change anything keep the order of their weights' norms, with scores below every threshold.
BELOW_THRESHOLDS = 1e-30


@dataclass(frozen=True)
class Routed:
    """The tokens of a batch that are sent to one expert, padding included, and what it gives."""

    expert: int
    rows: Tensor  # int64 [n]: which of the B * T tokens
    weights: Tensor  # [n]: what the router multiplies the expert's outputs by
    activations: Tensor  # [n, F]: of its neurons
    outputs: Tensor  # [n, H]: before the router's weight


@contextmanager
def _observed_experts(layer: nn.Module, observe: Callable[[Routed], None]) -> Iterator[None]:
    """While the block lasts, `observe` sees what each expert is sent and gives."""
    experts: Any = layer.get_submodule(EXPERTS)

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        # hidden [B * T, H]; chosen and weights [B * T, K]: the experts of each token, and what the router gives them
        total = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            rows, position = torch.where(chosen == expert)
            activations = experts._apply_gate(
                _project(experts, "gate_up_proj", expert, hidden[rows])
            )
            outputs = _project(experts, "down_proj", expert, activations)
            routed = Routed(expert, rows, weights[rows, position], activations, outputs)
            observe(routed)
            weighted = outputs * routed.weights[:, None]  # [n, H]
            total.index_add_(0, rows, weighted.to(total.dtype))
        return total

    experts.forward = forward
    try:
        yield
    finally:
        # Without the attribute of the instance, the method of the class is used again.
        del experts.forward


def _project(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    """One expert's projection of `inputs` [n, columns]: [n, rows]."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(inputs, weight.T if experts.is_transposed else weight, bias)


ExpertScores = dict[int, Tensor]  # float32 [E] of each layer that has experts, by its number


def expert_scores(model: LayerwiseModel, criterion: str, seed: int) -> ExpertScores:
    """Score every expert on the model's batches by `reap`, or at `random`, the control; float32 [E] per layer."""
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        layers = {
            i: experts
            for i, layer in enumerate(model.layers)
            if (experts := _experts_of(layer)) is not None
        }
        return {
            i: torch.rand(experts.num_experts, generator=generator) for i, experts in layers.items()
        }
    return _reap(model)


def _experts_of(layer: nn.Module) -> Any:
    """The experts of a layer; None: it has one MLP in their place."""
    return getattr(layer.mlp, "experts", None)


@torch.no_grad()
def _reap(model: LayerwiseModel) -> ExpertScores:
    """Router-weighted activation norm, the mean over the expert's tokens (REAP, arXiv 2510.13999, eq. 9)."""
    scores = {}
    states = model.embed()  # [B, T, H] of each batch
    for i, layer in layers_in_turn(model, "scoring experts, by layer"):
        experts = _experts_of(layer)
        if experts is None:
            states = [model.run(i, b, hidden) for b, hidden in enumerate(states)]
            continue
        # [E] each: sums over the tokens sent to an expert
        tokens, norms = torch.zeros(2, experts.num_experts)
        for b, hidden in enumerate(states):
            real = model.batches[b]["attention_mask"].bool().flatten()  # [B * T]
            with _observed_experts(layer, partial(_add_norms, real, tokens, norms)):
                states[b] = model.run(i, b, hidden)
        scores[i] = norms / tokens.clamp(min=1)  # an expert without tokens scores 0
    return scores


def _add_norms(real: Tensor, tokens: Tensor, norms: Tensor, routed: Routed) -> None:
    """Add to an expert's entries of [E] its real tokens, bool [B * T], and the norms of what the layer gets of it."""
    of_expert = real[routed.rows]  # [n]
    weighted = routed.weights[of_expert].float() * routed.outputs[of_expert].float().norm(dim=-1)
    tokens[routed.expert] += len(weighted)
    norms[routed.expert] += weighted.sum().cpu()


@torch.no_grad()
def _by_output_change(model: LayerwiseModel, _seed: int) -> NeuronScores:
    """Score by how far the layer's output moves, at most, when one neuron is removed, one layer after the other."""
    scores = []
    states = model.embed()  # [B, T, H] of each batch
    for i, layer in layers_in_turn(model, "scoring neurons of experts, by layer"):
        norms = _of_experts(layer, lambda _gate_up, down: column_norms(down))  # [E, F]
        total = torch.zeros_like(norms)
        for b, hidden in enumerate(states):
            tokens = model.batches[b]["attention_mask"].bool().flatten()  # [B * T]
            with _observed_experts(layer, partial(_join_changes, tokens, total)):
                states[b] = model.run(i, b, hidden)
        scores.append((total * norms).cpu())
    return scores


def _join_changes(tokens: Tensor, total: Tensor, routed: Routed) -> None:
    """Join to an expert's row of `total` [E, F] how far each neuron moves the output at these tokens: bool [B * T]."""
    real = tokens[routed.rows]  # [n]
    if real.any():
        weighted = routed.activations[real].float() * routed.weights[real, None].float()
        total[routed.expert] = torch.maximum(total[routed.expert], weighted.abs().amax(dim=0))


def observe_expert_neurons(model: LayerwiseModel, i: int, b: int, hidden: Tensor) -> Observed:
    """What neurons of experts give, and each sequence's first-order change of the loss [B, E, F].

    The router's weight is part of the gradient. A layer with one MLP in place of experts has none.
    Memory: the batch's activations in all experts of the layer, which the backward pass needs.
    """
    visits: list[Routed] = []
    layer = model.layers[i]
    with _observed_experts(layer, visits.append):
        output = model.run(i, b, hidden)

    def changes(slopes: Sequence[Tensor]) -> Tensor:
        mask = model.batches[b]["attention_mask"]  # [B, T]
        down: Any = layer.get_submodule(EXPERTS).down_proj  # [E, H, F]
        total = torch.zeros(len(mask), len(down), down.shape[-1], device=model.device)
        for routed, slope in zip(visits, slopes, strict=True):
            of_tokens = routed.activations.detach().float() * slope.float()  # [n, F]
            # Which tokens are whose; a product, as sums by index differ from run to run on a GPU.
            sequence = torch.arange(len(mask), device=model.device)[:, None]
            # [B, n]
            members = (routed.rows // mask.shape[1] == sequence) & mask.flatten()[
                routed.rows
            ].bool()
            total[:, routed.expert] = members.float() @ of_tokens
        return total

    return output, [routed.activations for routed in visits], changes


@torch.no_grad()
def _by_weights(model: LayerwiseModel, _seed: int) -> NeuronScores:
    """L2 norm of the neuron's weights; the data plays no part."""
    return [
        _of_experts(layer, weight_norms).cpu()
        for _, layer in layers_in_turn(model, "scoring neurons, by layer")
    ]


def weight_norms(gate_up: Tensor, down: Tensor) -> Tensor:
    """L2 norm of each neuron's weights in an MLP's projections [2F, H] and [H, F]: float32 [F]."""
    row_squares = gate_up.float().square().sum(dim=1)  # [2F]
    squares = column_norms(down).square() + row_squares.view(-1, down.shape[1]).sum(dim=0)
    return squares.sqrt()


def _of_experts(layer: nn.Module, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The scores [F] of one expert's weights after the other: float32 [E, F]."""
    experts: Any = layer.get_submodule(EXPERTS)
    return torch.stack(
        [score(*weights) for weights in zip(experts.gate_up_proj, experts.down_proj, strict=True)]
    )


def random_scores(model: LayerwiseModel, seed: int) -> NeuronScores:
    """Uniform numbers, of any model's neurons: the control of every criterion."""
    generator = torch.Generator().manual_seed(seed)
    part = DOWN if model.family.experts else f"{model.family.down_projection}.weight"
    shapes = [layer.get_parameter(part).shape for layer in model.layers]  # [H, F] or [E, H, F]
    return [torch.rand(*shape[:-2], shape[-1], generator=generator) for shape in shapes]


# By their names in the setting prune.criterion, as of importance.py; each takes the model and a seed
CRITERIA_OF_NEURONS: dict[str, Callable[[LayerwiseModel, int], NeuronScores]] = {
    "max": _by_output_change,
    "weight": _by_weights,
    "taylor": partial(first_order_scores, observe=observe_expert_neurons),
    "random": random_scores,
}


def order_silent(model: LayerwiseModel, scores: NeuronScores) -> None:
    """Where all neurons of an expert score 0, as no token is sent to it, their weights order them."""
    for i, of_layer in enumerate(scores):
        silent = (of_layer == 0).all(dim=1)  # [E]
        if silent.any():
            with model.layer(i) as layer, torch.no_grad():
                norms = _of_experts(layer, weight_norms).cpu()
            of_layer[silent] = norms[silent] * BELOW_THRESHOLDS
