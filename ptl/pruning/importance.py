"""Scores for neurons and for layers: the less a score, the more redundant the part. CRITERIA is where a user extends.

A neuron is one FFN intermediate channel: a row of gate and up, a column of down. Shape letters: B sequences, T tokens,
H hidden size, F intermediate size. Scores are joined sequence by sequence, so that no activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ptl.errors import WorkError
from ptl.model.families import Family
from ptl.pruning.experts import (
    CRITERIA_OF_NEURONS,
    observe_expert_neurons,
    order_silent,
    random_scores,
    weight_norms,
)
from ptl.pruning.layerwise import (
    LayerwiseModel,
    NeuronScores,
    Observed,
    UnitScores,
    column_norms,
    first_order_scores,
    layers_in_turn,
    run_with_activations,
    sequences,
    width_scores,
)


@torch.no_grad()
def _by_output_change(model: LayerwiseModel, _seed: int) -> NeuronScores:
    """Score by how far the layer's output moves, at most, when one neuron is removed (arXiv 2602.04919).

    A neuron with activation a and column w adds a w, so that |a| times the norm of w is that distance, unless a norm
    is between down_proj and the residual stream: see `changes_after_norm`. Granite multiplies a w by a constant.
    """
    family = model.family
    scores = []
    states = model.embed()  # [B, T, H] of each batch
    for i, layer in layers_in_turn(model, "scoring neurons, by layer"):
        change_of = None
        if family.post_norm:
            change_of = changes_after_norm(layer, family, model.config.rms_norm_eps)
            units = torch.ones((), device=model.device)  # these changes are lengths already
        else:
            # A neuron's change is its activation.
            units = column_norms(_down_projection(layer, family)) * model.residual_scale  # [F]
        total = torch.zeros(())  # a score is never negative
        for b, hidden in enumerate(states):
            states[b], *observed = run_with_activations(model, i, b, hidden)
            for sequence in sequences(model, b, *observed):
                changes = change_of(*sequence) if change_of else sequence[0]  # [T, F]
                largest = changes.abs().amax(dim=0)  # [F]
                total = torch.maximum(total, (largest.float() * units).cpu())
        scores.append(total)
    return scores


def _observe_neurons(model: LayerwiseModel, i: int, b: int, hidden: Tensor) -> Observed:
    """What neurons give, and each sequence's first-order change of the loss [F]."""
    output, activations, _ = run_with_activations(model, i, b, hidden)

    def changes(slopes: Sequence[Tensor]) -> Iterator[Tensor]:
        for value, slope in sequences(model, b, activations.detach(), slopes[0]):
            of_tokens = value.float() * slope.float()  # [T, F]
            yield of_tokens.sum(dim=0)

    return output, [activations], changes


@torch.no_grad()
def _by_weights(model: LayerwiseModel, _seed: int) -> NeuronScores:
    """L2 norm of the neuron's weights; the data plays no part."""
    family = model.family
    scores = []
    for _, layer in layers_in_turn(model, "scoring neurons, by layer"):
        # [2F, H]
        gate_up = torch.cat(
            [layer.get_parameter(f"{name}.weight") for name in family.up_projections]
        )
        scores.append(weight_norms(gate_up, _down_projection(layer, family)).cpu())
    return scores


# By their names in the setting prune.criterion; each takes the model and a seed
CRITERIA: dict[str, Callable[[LayerwiseModel, int], NeuronScores]] = {
    "max": _by_output_change,
    "weight": _by_weights,
    "taylor": partial(first_order_scores, observe=_observe_neurons),
    "random": random_scores,
}


def neuron_scores(model: LayerwiseModel, criterion: str, seed: int) -> NeuronScores:
    """Score every neuron on the model's batches; returns float32 [F] per layer, of a mixture [E, F]."""
    if not model.family.experts:
        return CRITERIA[criterion](model, seed)
    scores = CRITERIA_OF_NEURONS[criterion](model, seed)
    order_silent(model, scores)
    return scores


def all_width_scores(model: LayerwiseModel, narrowable: bool) -> UnitScores:
    """Score dimensions of the residual stream, KV heads and, in a `narrowable` model, neurons, by `taylor`."""
    if not narrowable:
        return width_scores(model, observe=_observe_nothing)
    if not model.family.experts:
        return width_scores(model, observe=_observe_neurons)
    scores = width_scores(model, observe=observe_expert_neurons)
    order_silent(model, scores.neurons)
    return scores


def _observe_nothing(model: LayerwiseModel, i: int, b: int, hidden: Tensor) -> Observed:
    return model.run(i, b, hidden), [], lambda _slopes: ()


@torch.no_grad()
def layer_scores(model: LayerwiseModel) -> Tensor:
    """Score every layer by how far it moves the hidden state, as the paper does (arXiv 2602.04919); float32 [layers].

    The mean over a sequence's non-padding tokens, and of the sequences the largest.
    """
    scores = []
    states = model.embed()  # [B, T, H] of each batch
    for i, _ in layers_in_turn(model, "scoring layers"):
        total = torch.zeros(())
        for b, hidden in enumerate(states):
            states[b] = model.run(i, b, hidden)
            for before, after in sequences(model, b, hidden, states[b]):
                movement = after.float() - before.float()  # [T, H]
                total = torch.maximum(total, movement.norm(dim=-1).mean().cpu())
        scores.append(total)
    return torch.stack(scores)


def changes_after_norm(
    layer: nn.Module,
    family: Family,
    epsilon: float,  # of the norm
) -> Callable[..., Tensor]:
    """How far each neuron's removal moves what the RMS norm after down_proj gives: exact, not to first order.

    Returns a function of the activations [T, F] and the MLP's output y [T, H]; its value is float32 [T, F]. With g the
    norm's gain, r the root mean square of y and s that of y - a w, the norm of g y / r - g (y - a w) / s is that of
    g (c y + a w / s) with c = 1/r - 1/s. Costs two more products as large as down_proj, and its weight in float32.
    """
    norm = layer.get_parameter(f"{family.post_norm}.weight")
    w = _down_projection(layer, family).float()  # [H, F]
    g = norm.float() + family.norm_offset  # [H]
    # What does not depend on the text
    w2 = w.square()
    g2 = g.square()
    mean_w2 = w2.mean(dim=0)  # [F]: |w|^2 / H
    gw2 = g2 @ w2  # [F]: |g w|^2

    def changes(activations: Tensor, output: Tensor) -> Tensor:
        a = activations.float()  # [T, F]
        y = output.float()  # [T, H]
        r2 = y.square().mean(dim=1, keepdim=True) + epsilon  # [T, 1]
        # s^2 - r^2: [T, F]
        growth = a.square() * mean_w2
        products = y @ w
        growth = growth - a * products * (2 / len(g))
        s2 = r2 + growth
        r = r2.sqrt()
        s = s2.clamp(min=epsilon).sqrt()
        # 1/r - 1/s would lose the digits of a small change.
        c = growth / (r * s * (r + s))
        b = a / s
        # |g (c y + b w)|^2, multiplied out: [T, F]
        gy = y * g
        gy2 = gy.square().sum(dim=1, keepdim=True)  # [T, 1]: |g y|^2
        gygw = (y * g2) @ w  # g y . g w
        total = c.square() * gy2
        total = total + 2 * b * c * gygw
        total = total + b.square() * gw2
        return total.clamp(min=0).sqrt()

    return changes


def _down_projection(layer: nn.Module, family: Family) -> Tensor:
    return layer.get_parameter(f"{family.down_projection}.weight")  # [H, F]


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores: int64 [count], ascending; of equal scores the lower index stays.

    Of scores [E, units] those of each of the E rows: [E, count]. Raises WorkError for scores that are no numbers.
    """
    if scores.isnan().any():
        raise WorkError(
            "scores are NaN: the calibration text overflows the checkpoint's dtype",
            field="prune",
            remedy="set `dtype` in its config.json to bfloat16 or float32",
        )
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[..., :count].sort().values
