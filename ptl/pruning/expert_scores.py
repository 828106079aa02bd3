"""Scores for the experts of a mixture: the less a score, the more redundant. CRITERIA is where a user extends.

Shape letters: routing.py. Each expert runs on its own tokens, one expert after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptl.pruning.layerwise import LayerwiseModel, layers_in_turn
from ptl.pruning.routing import Routed, RunExpert, activations, outputs, running_experts

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
            states = model.run_batches(i, states)
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
