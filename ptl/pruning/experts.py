"""The experts of a layer, run one after the other, each on the tokens that its router sends to it; and their scores.

The less a score, the more redundant the expert; CRITERIA is where a user extends. Shape letters: B sequences, T tokens,
H hidden size, E experts of a layer, K experts that each token is sent to, n tokens sent to one expert, F neurons of an
expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptl.pruning.layerwise import LayerwiseModel, layers_in_turn

EXPERTS = "mlp.experts"  # the module of a layer that holds all of its experts


@dataclass(frozen=True)
class Routed:
    """The tokens of a batch that are sent to one expert, padding included."""

    expert: int
    rows: Tensor  # int64 [n]: which of the B * T tokens
    hidden: Tensor  # [n, H]
    weights: Tensor  # [n]: what the router multiplies the expert's outputs by


RunExpert = Callable[[Any, Routed], Tensor]  # the module of the experts -> one expert's outputs [n, H], not multiplied


@contextmanager
def running_experts(layer: nn.Module, run: RunExpert) -> Iterator[None]:
    """While the block lasts, `run` computes what each expert gives."""
    experts: Any = layer.get_submodule(EXPERTS)

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        # hidden [B * T, H]; chosen and weights [B * T, K]: the experts of each token, and what the router gives them
        total = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            rows, position = torch.where(chosen == expert)
            routed = Routed(expert, rows, hidden[rows], weights[rows, position])
            weighted = run(experts, routed) * routed.weights[:, None]  # [n, H]
            total.index_add_(0, rows, weighted.to(total.dtype))
        return total

    experts.forward = forward
    try:
        yield
    finally:
        # Without the attribute of the instance, the method of the class is used again.
        del experts.forward


def activations(experts: Any, routed: Routed) -> Tensor:
    """What an expert's neurons give at its tokens: [n, F]."""
    gated: Tensor = experts._apply_gate(_project(experts, "gate_up_proj", routed.expert, routed.hidden))
    return gated


def outputs(experts: Any, routed: Routed, values: Tensor) -> Tensor:
    """What an expert gives, before the router's weight, for these activations [n, F] of its neurons: [n, H]."""
    return _project(experts, "down_proj", routed.expert, values)


def _project(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    """One expert's projection of `inputs` [n, columns]: [n, rows]."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(inputs, weight.T if experts.is_transposed else weight, bias)


ExpertScores = dict[int, Tensor]  # float32 [E] of each layer that has experts, by its number


class Observed:
    """What the calibration tokens show about the experts of one layer: sums over the tokens sent to each."""

    def __init__(self, experts: int) -> None:
        self.tokens = torch.zeros(experts)  # [E]
        self.norms = torch.zeros(experts)  # [E]: of the expert's output, Euclidean
        self.weighted_norms = torch.zeros(experts)  # [E]: the same times the router's weight

    def add(self, expert: int, outputs: Tensor, weights: Tensor) -> None:
        """Take in an expert's outputs [n, H], and the router's weights [n] of these tokens."""
        norms = outputs.float().norm(dim=-1)  # [n]
        self.tokens[expert] += len(norms)
        self.norms[expert] += norms.sum().cpu()
        self.weighted_norms[expert] += (weights.float() * norms).sum().cpu()


def _reap(observed: Observed) -> Tensor:
    """Router-weighted activation norm, the mean over the expert's tokens (REAP, arXiv 2510.13999, eq. 9)."""
    return observed.weighted_norms / observed.tokens.clamp(min=1)  # an expert without tokens scores 0


def _frequency(observed: Observed) -> Tensor:
    """How many tokens are sent to the expert."""
    return observed.tokens


def _norm(observed: Observed) -> Tensor:
    """Norm of the expert's output, the mean over its tokens (MAN, arXiv 2606.15716)."""
    return observed.norms / observed.tokens.clamp(min=1)


# By their names in the setting prune.criterion: what was observed in a layer -> float32 [E]
CRITERIA: dict[str, Callable[[Observed], Tensor]] = {
    "reap": _reap,
    "frequency": _frequency,
    "norm": _norm,
}


def expert_scores(model: LayerwiseModel, criterion: str, seed: int) -> ExpertScores:
    """Score every expert on the model's batches; returns float32 [E] per layer. `random` is the control."""
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        layers = {i: experts for i, layer in enumerate(model.layers) if (experts := experts_of(layer)) is not None}
        return {i: torch.rand(experts.num_experts, generator=generator) for i, experts in layers.items()}
    return {i: CRITERIA[criterion](layer) for i, layer in observe(model).items()}


def experts_of(layer: nn.Module) -> Any:
    """The experts of a layer; None: it has one MLP in their place."""
    return getattr(layer.mlp, "experts", None)


@torch.no_grad()
def observe(model: LayerwiseModel) -> dict[int, Observed]:
    """Run all batches through the model, layer by layer, and observe the experts of each layer that has them."""
    layers = {}
    states = model.embed()  # [B, T, H] of each batch
    for i, layer in layers_in_turn(model, "scoring experts, by layer"):
        experts = experts_of(layer)
        if experts is None:
            states = [model.run(i, b, hidden) for b, hidden in enumerate(states)]
            continue
        observed = layers[i] = Observed(experts.num_experts)
        for b, hidden in enumerate(states):
            tokens = model.batches[b]["attention_mask"].bool().flatten()  # [B * T]
            with running_experts(layer, _observing(tokens, observed)):
                states[b] = model.run(i, b, hidden)
    return layers


def _observing(tokens: Tensor, observed: Observed) -> RunExpert:
    """Runs an expert, and observes what it gives at these of the tokens [B * T]."""

    def run(experts: Any, routed: Routed) -> Tensor:
        hidden = outputs(experts, routed, activations(experts, routed))  # [n, H]
        real = tokens[routed.rows]  # [n]
        observed.add(routed.expert, hidden[real], routed.weights[real])
        return hidden

    return run
