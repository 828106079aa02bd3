"""The experts of a layer, run one after the other, each on the tokens that its router sends to it.

Shape letters: B sequences, T tokens, H hidden size, E experts of a layer, K experts that each token is sent to, n
tokens sent to one expert, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
