"""Scores for neurons and for layers: the less a score, the more redundant the part. CRITERIA is where a user extends.

A neuron is one FFN intermediate channel: a row of gate and up, a column of down. Shape letters: B sequences, T tokens,
H hidden size, F intermediate size. Scores are joined sequence by sequence, so that no activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptl.stream import LayerwiseModel

ROWS = 256  # of a weight that are converted at once: they stay in the processor's cache
Scores = list[Tensor]  # float32 [F] of each layer
# Changes [T, F] of one sequence, and the unit of each neuron's changes [F] (or one for all) -> float32 [F]
Score = Callable[[Tensor, Tensor], Tensor]


def _max(changes: Tensor, units: Tensor) -> Tensor:
    """The paper's criterion (arXiv 2602.04919): the largest change of the layer's output over a sequence's tokens."""
    return changes.abs().amax(dim=0).float() * units


def _mean(changes: Tensor, units: Tensor) -> Tensor:
    """The mean change of the layer's output over a sequence's tokens."""
    return changes.abs().mean(dim=0, dtype=torch.float32) * units


def _by_output_change(stream: LayerwiseModel, _seed: int, progress: bool, *, score: Score, join: str) -> Scores:
    """Score by how far the layer's output moves when one neuron is removed, one layer after the other.

    A neuron with activation a and column w adds a w, so that |a| times the norm of w is that distance, unless a norm
    is between down_proj and the residual stream: see `changes_after_norm`.
    """
    family = stream.family
    totals = [_Joined(join) for _ in stream.layers]
    states = stream.embed()
    for i in tqdm(range(len(stream.layers)), desc="scoring neurons, by layer", disable=not progress):
        with (
            torch.no_grad(),
            stream.layer(i) as layer,
            caught_inputs(layer, family.columns) as inputs,
            caught_inputs(layer, family.post_norm or family.columns) as outputs,
        ):
            change = changes_after_norm(layer, stream) if family.post_norm else None
            units = torch.ones((), device=stream.device) if change else column_norms(layer, stream)
            for b, hidden in enumerate(states):
                states[b] = stream.run(i, b, hidden)
                for activations, output, length in zip(inputs.pop(), outputs.pop(), stream.tokens(b), strict=True):
                    activations, output = activations[:length], output[:length]
                    totals[i].add(score(change(activations, output) if change else activations, units))
    return [total.result() for total in totals]


def _by_gradients(stream: LayerwiseModel, _seed: int, progress: bool) -> Scores:
    """First-order change of the loss when the neuron is zeroed (Molchanov et al. 2019, arXiv 1906.10771).

    Runs backwards layer by layer, each forward pass done again. Memory: the hidden states of every layer, beside one
    layer: (layers + 1) x tokens x hidden size.
    """
    inputs = [stream.embed()]
    for i in tqdm(range(len(stream.layers)), desc="taylor, forwards", disable=not progress):
        with torch.no_grad(), stream.layer(i):
            inputs.append([stream.run(i, b, hidden) for b, hidden in enumerate(inputs[-1])])
    gradients = _loss_gradients(stream, inputs.pop())
    totals = [_Joined("mean") for _ in stream.layers]
    for i in tqdm(reversed(range(len(stream.layers))), total=len(totals), desc="taylor, back", disable=not progress):
        with torch.enable_grad(), stream.layer(i) as layer, caught_inputs(layer, stream.family.columns) as caught:
            for b, hidden in enumerate(inputs.pop()):
                hidden = hidden.detach().requires_grad_()
                output = stream.run(i, b, hidden)
                activations = caught.pop()
                wanted = torch.autograd.grad(output, (hidden, activations), gradients[b])
                gradients[b] = wanted[0]
                for values, slopes, length in zip(activations.detach(), wanted[1], stream.tokens(b), strict=True):
                    totals[i].add((values[:length].float() * slopes[:length].float()).sum(dim=0).abs())
    return [total.result() for total in totals]


def _by_weights(stream: LayerwiseModel, _seed: int, progress: bool) -> Scores:
    """L2 norm of the neuron's weights; the data plays no part."""
    scores = []
    for i in tqdm(range(len(stream.layers)), desc="scoring neurons, by layer", disable=not progress):
        with torch.no_grad(), stream.layer(i) as layer:
            squares = column_norms(layer, stream).pow(2)
            for name in stream.family.rows:
                rows = layer.get_parameter(f"{name}.weight").float().pow(2).sum(dim=1)  # [blocks * F]
                squares = squares + rows.view(stream.family.blocks, -1).sum(dim=0)
            scores.append(squares.sqrt().cpu())
    return scores


def _random(stream: LayerwiseModel, seed: int, _progress: bool) -> Scores:
    """Uniform numbers: the control of every criterion."""
    generator = torch.Generator().manual_seed(seed)
    downs: list[Any] = [layer.get_submodule(stream.family.columns) for layer in stream.layers]
    return [torch.rand(down.in_features, generator=generator) for down in downs]


CRITERIA: dict[str, Callable[[LayerwiseModel, int, bool], Scores]] = {
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


LAYER_CRITERIA: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "max": (_hidden_change, "max"),
    "block_influence": (_block_influence, "mean"),
}


def neuron_scores(stream: LayerwiseModel, criterion: str, seed: int, progress: bool = True) -> Scores:
    """Score every neuron on the stream's batches; returns float32 [F] per layer."""
    return CRITERIA[criterion](stream, seed, progress)


def layer_scores(stream: LayerwiseModel, criterion: str, progress: bool = True) -> Tensor:
    """Score every layer: mean over a sequence's non-padding tokens, joined over sequences; float32 [layers]."""
    change, how = LAYER_CRITERIA[criterion]
    totals = [_Joined(how) for _ in stream.layers]
    states = stream.embed()
    for i in tqdm(range(len(stream.layers)), desc=f"scoring layers ({criterion})", disable=not progress):
        with torch.no_grad(), stream.layer(i):
            for b, before in enumerate(states):
                states[b] = stream.run(i, b, before)
                for old, new, length in zip(before, states[b], stream.tokens(b), strict=True):
                    totals[i].add(change(old[:length], new[:length]).mean()[None])
    return torch.cat([total.result() for total in totals])


def column_norms(layer: nn.Module, stream: LayerwiseModel) -> Tensor:
    """Norm of each column of down_proj: float32 [F]."""
    weight = layer.get_parameter(f"{stream.family.columns}.weight")  # [H, F]
    squares = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in weight.split(ROWS):
        squares += rows.float().square().sum(dim=0)
    return squares.sqrt_()


def changes_after_norm(layer: nn.Module, stream: LayerwiseModel) -> Callable[[Tensor, Tensor], Tensor]:
    """How far each neuron's removal moves what the RMS norm after down_proj gives: exact, not to first order.

    Returns a function of the activations [T, F] and the MLP's output y [T, H]; its value is float32 [T, F]. With g the
    norm's gain, r the root mean square of y and s that of y - a w, the norm of g y / r - g (y - a w) / s is that of
    g (c y + a w / s) with c = 1/r - 1/s. Costs two more products as large as down_proj, and its weight in float32.
    """
    family = stream.family
    weight = layer.get_parameter(f"{family.columns}.weight").float()  # [H, F]
    gain = layer.get_parameter(f"{family.post_norm}.weight").float() + family.norm_offset  # [H]
    epsilon = float(stream.model.config.rms_norm_eps)
    squares, gained = weight.square().mean(dim=0), gain.square() @ weight.square()  # [F]: |w|^2 / H and |g w|^2

    def changes(activations: Tensor, output: Tensor) -> Tensor:
        a, y = activations.float(), output.float()
        mean_square = y.square().mean(dim=1, keepdim=True) + epsilon  # [T, 1]
        growth = a.square() * squares - a * (y @ weight) * (2 / y.shape[1])  # [T, F]
        r, s = mean_square.sqrt(), (mean_square + growth).clamp(min=epsilon).sqrt()
        c = growth / (r * s * (r + s))  # 1/r - 1/s would lose the digits of a small change
        b = a / s
        inner = (y * gain.square()) @ weight  # [T, F]: g y . g w
        total = c.square() * (y * gain).square().sum(dim=1, keepdim=True) + 2 * b * c * inner + b.square() * gained
        return total.clamp(min=0).sqrt()

    return changes


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores: int64 [count], ascending; of equal scores the lower index stays."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def num_redundant(scores: Tensor, sigma: float) -> int:
    """How many units score below the threshold; by the criterion `max` a neuron's score is the change of the output."""
    return int((scores < sigma).sum())


class _Joined:
    """Running max or mean of what the sequences say of each unit."""

    def __init__(self, how: str) -> None:
        self.how, self.value, self.count = how, torch.zeros(()), 0

    def add(self, scores: Tensor) -> None:
        scores = scores.detach().cpu()
        first = self.count == 0
        self.count += 1
        if self.how == "mean":
            self.value = self.value + scores
        else:
            self.value = scores if first else torch.maximum(self.value, scores)

    def result(self) -> Tensor:
        return self.value / self.count if self.how == "mean" else self.value


@contextmanager
def caught_inputs(layer: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """A list that gets the input [B, T, F] of a submodule whenever it runs."""
    caught: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0])

    handle = layer.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def _loss_gradients(stream: LayerwiseModel, last: list[Tensor]) -> list[Tensor]:
    """Gradient of the summed loss by the last hidden states: [B, T, H] for each batch, zero at padding."""
    gradients = []
    with torch.enable_grad(), stream.head():
        for b, hidden in enumerate(last):
            rows = []
            for row in range(hidden.shape[0]):
                one = hidden[row : row + 1].detach().requires_grad_()
                rows.append(torch.autograd.grad(stream.loss(b, row, one), one)[0])
            gradients.append(torch.cat(rows))
    return gradients
