"""Scores for neurons and for layers: the less a score, the more redundant the part. CRITERIA is where a user extends.

A neuron is one FFN intermediate channel: a row of gate and up, a column of down. Shape letters: B sequences, T tokens,
H hidden size, F intermediate size. Scores are joined sequence by sequence, so that no activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ptl.families import Family
from ptl.stream import LayerwiseModel, layers_in_turn, run_recording

ROWS = 256  # of a weight that are converted at once: they stay in the processor's cache
NeuronScores = list[Tensor]  # float32 [F] of each layer
# Changes [T, F] of one sequence, and the unit of each neuron's changes [F] (or one for all) -> float32 [F]
SequenceScore = Callable[[Tensor, Tensor], Tensor]


def _max(changes: Tensor, units: Tensor) -> Tensor:
    """The paper's criterion (arXiv 2602.04919): the largest change of the layer's output over a sequence's tokens."""
    return changes.abs().amax(dim=0).float() * units


def _mean(changes: Tensor, units: Tensor) -> Tensor:
    """The mean change of the layer's output over a sequence's tokens."""
    return changes.abs().mean(dim=0, dtype=torch.float32) * units


@torch.no_grad()
def _by_output_change(
    model: LayerwiseModel, _seed: int, progress: bool, *, score: SequenceScore, join: str
) -> NeuronScores:
    """Score by how far the layer's output moves when one neuron is removed, one layer after the other.

    A neuron with activation a and column w adds a w, so that |a| times the norm of w is that distance, unless a norm
    is between down_proj and the residual stream: see `changes_after_norm`.
    """
    family = model.family
    totals = [_JoinedScores(join) for _ in model.layers]
    states = model.embed()  # [B, T, H] of each batch
    for i, layer in layers_in_turn(model, "scoring neurons, by layer", progress):
        if family.post_norm:
            change_of = changes_after_norm(layer, family, float(model.config.rms_norm_eps))
            units = torch.ones((), device=model.device)  # the changes are lengths already
            observed = family.post_norm
        else:
            change_of = _activations_alone
            units = column_norms(layer, family)  # [F]
            observed = family.down_projection
        for b, hidden in enumerate(states):
            # [B, T, H], [B, T, F], and [B, T, H] where a norm follows
            states[b], activations, outputs = run_recording(model, i, b, hidden, family.down_projection, observed)
            for sequence, output, length in zip(activations, outputs, model.tokens(b), strict=True):
                changes = change_of(sequence[:length], output[:length])  # [T, F], without padding
                totals[i].add(score(changes, units))
    return [total.result() for total in totals]


def _activations_alone(activations: Tensor, _output: Tensor) -> Tensor:
    """Where nothing follows down_proj, a neuron's change is its activation in units of its column's norm."""
    return activations


@torch.enable_grad()
def _by_gradients(model: LayerwiseModel, _seed: int, progress: bool) -> NeuronScores:
    """First-order change of the loss when the neuron is zeroed (Molchanov et al. 2019, arXiv 1906.10771).

    Runs backwards layer by layer, each forward pass done again. Memory: the hidden states of every layer, beside one
    layer: (layers + 1) x tokens x hidden size.
    """
    inputs = _inputs_of_layers(model, progress)
    gradients = _loss_gradients(model, inputs.pop())  # [B, T, H] of each batch
    totals = [_JoinedScores("mean") for _ in model.layers]
    for i, _ in layers_in_turn(model, "taylor, back", progress, backwards=True):
        for b, hidden in enumerate(inputs.pop()):
            hidden = hidden.detach().requires_grad_()
            output, activations = run_recording(model, i, b, hidden, model.family.down_projection)
            # Gradient by the layer's input, for the layer before it, and by the activations [B, T, F]
            gradients[b], slopes = torch.autograd.grad(output, (hidden, activations), gradients[b])
            for values, slope, length in zip(activations.detach(), slopes, model.tokens(b), strict=True):
                change = values[:length].float() * slope[:length].float()  # [T, F]
                totals[i].add(change.sum(dim=0).abs())
    return [total.result() for total in totals]


@torch.no_grad()
def _inputs_of_layers(model: LayerwiseModel, progress: bool) -> list[list[Tensor]]:
    """Hidden states [B, T, H] before each layer and after the last one, of each batch."""
    inputs = [model.embed()]
    for i, _ in layers_in_turn(model, "taylor, forwards", progress):
        outputs = [model.run(i, b, hidden) for b, hidden in enumerate(inputs[-1])]
        inputs.append(outputs)
    return inputs


def _loss_gradients(model: LayerwiseModel, last_states: list[Tensor]) -> list[Tensor]:
    """Gradient of the summed loss by the last hidden states: [B, T, H] for each batch, zero at padding."""
    gradients = []
    with model.head():
        for b, states in enumerate(last_states):
            rows = []
            for row in range(len(states)):
                hidden = states[row : row + 1].detach().requires_grad_()  # [1, T, H]
                loss = model.loss(b, row, hidden)
                rows += torch.autograd.grad(loss, hidden)
            gradients.append(torch.cat(rows))
    return gradients


@torch.no_grad()
def _by_weights(model: LayerwiseModel, _seed: int, progress: bool) -> NeuronScores:
    """L2 norm of the neuron's weights; the data plays no part."""
    family = model.family
    scores = []
    for _, layer in layers_in_turn(model, "scoring neurons, by layer", progress):
        squares = column_norms(layer, family).pow(2)  # [F]
        for name in family.up_projections:
            weight = layer.get_parameter(f"{name}.weight").float()  # [fused_projections * F, H]
            row_squares = weight.pow(2).sum(dim=1)
            squares = squares + row_squares.view(family.fused_projections, -1).sum(dim=0)
        scores.append(squares.sqrt().cpu())
    return scores


def _random(model: LayerwiseModel, seed: int, _progress: bool) -> NeuronScores:
    """Uniform numbers: the control of every criterion."""
    generator = torch.Generator().manual_seed(seed)
    width = getattr(model.config, model.family.width_field)
    return [torch.rand(width, generator=generator) for _ in model.layers]


CRITERIA: dict[str, Callable[[LayerwiseModel, int, bool], NeuronScores]] = {
    "max": partial(_by_output_change, score=_max, join="max"),
    "mean": partial(_by_output_change, score=_mean, join="mean"),
    "weight": _by_weights,
    "taylor": _by_gradients,
    "random": _random,
}


def _hidden_change(before: Tensor, after: Tensor) -> Tensor:
    """The paper's layer criterion: how far the layer moves the hidden state. float32 [T]."""
    return (after.float() - before.float()).norm(dim=-1)


def _block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of hidden state before and after (ShortGPT, arXiv 2403.03853, eq. 1). float32 [T]."""
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)


# The change of one sequence's hidden states [T, H], [T, H] -> [T], and how sequences are joined
LAYER_CRITERIA: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "max": (_hidden_change, "max"),
    "block_influence": (_block_influence, "mean"),
}


def neuron_scores(model: LayerwiseModel, criterion: str, seed: int, progress: bool = True) -> NeuronScores:
    """Score every neuron on the model's batches; returns float32 [F] per layer."""
    return CRITERIA[criterion](model, seed, progress)


@torch.no_grad()
def layer_scores(model: LayerwiseModel, criterion: str, progress: bool = True) -> Tensor:
    """Score every layer: mean over a sequence's non-padding tokens, joined over sequences; float32 [layers]."""
    change_of, join = LAYER_CRITERIA[criterion]
    totals = [_JoinedScores(join) for _ in model.layers]
    states = model.embed()  # [B, T, H] of each batch
    for i, _ in layers_in_turn(model, f"scoring layers ({criterion})", progress):
        for b, hidden in enumerate(states):
            states[b] = model.run(i, b, hidden)
            for before, after, length in zip(hidden, states[b], model.tokens(b), strict=True):
                changes = change_of(before[:length], after[:length])  # [T], without padding
                totals[i].add(changes.mean()[None])
    return torch.cat([total.result() for total in totals])


def column_norms(layer: nn.Module, family: Family) -> Tensor:
    """Norm of each column of down_proj: float32 [F]."""
    weight = layer.get_parameter(f"{family.down_projection}.weight")  # [H, F]
    squares = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in weight.split(ROWS):
        squares += rows.float().square().sum(dim=0)
    return squares.sqrt_()


def changes_after_norm(layer: nn.Module, family: Family, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
    """How far each neuron's removal moves what the RMS norm after down_proj gives: exact, not to first order.

    Returns a function of the activations [T, F] and the MLP's output y [T, H]; its value is float32 [T, F]. With g the
    norm's gain, r the root mean square of y and s that of y - a w, the norm of g y / r - g (y - a w) / s is that of
    g (c y + a w / s) with c = 1/r - 1/s. Costs two more products as large as down_proj, and its weight in float32.
    """
    weight = layer.get_parameter(f"{family.down_projection}.weight").float()  # [H, F]
    gain = layer.get_parameter(f"{family.post_norm}.weight").float() + family.norm_offset  # [H]
    squared_gain = gain.square()
    mean_squares = weight.square().mean(dim=0)  # [F]: |w|^2 / H
    gained = squared_gain @ weight.square()  # [F]: |g w|^2

    def changes(activations: Tensor, output: Tensor) -> Tensor:
        a = activations.float()
        y = output.float()
        mean_square = y.square().mean(dim=1, keepdim=True) + epsilon  # [T, 1]: r^2
        products = y @ weight  # [T, F]: y . w
        growth = a.square() * mean_squares - a * products * (2 / y.shape[1])  # [T, F]: s^2 - r^2
        r = mean_square.sqrt()
        s = (mean_square + growth).clamp(min=epsilon).sqrt()
        c = growth / (r * s * (r + s))  # 1/r - 1/s would lose the digits of a small change
        b = a / s
        inner = (y * squared_gain) @ weight  # [T, F]: g y . g w
        gained_output = (y * gain).square().sum(dim=1, keepdim=True)  # [T, 1]: |g y|^2
        total = c.square() * gained_output + 2 * b * c * inner + b.square() * gained
        return total.clamp(min=0).sqrt()

    return changes


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores: int64 [count], ascending; of equal scores the lower index stays."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def num_redundant(scores: Tensor, sigma: float) -> int:
    """How many units score below the threshold; by the criterion `max` a neuron's score is the change of the output."""
    return int((scores < sigma).sum())


class _JoinedScores:
    """Running `max` or `mean` over sequences of the scores of each unit."""

    def __init__(self, join: str) -> None:
        self.join = join
        self.value = torch.zeros(())  # a score is never negative
        self.count = 0  # sequences

    def add(self, scores: Tensor) -> None:
        """Take in the scores [units] of one sequence."""
        scores = scores.detach().cpu()
        self.count += 1
        if self.join == "mean":
            self.value = self.value + scores
        else:
            self.value = torch.maximum(self.value, scores)

    def result(self) -> Tensor:
        """The joined scores: float32 [units]."""
        return self.value / self.count if self.join == "mean" else self.value
