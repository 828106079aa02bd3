"""Scores for neurons and for layers: the less a score, the more redundant the part. CRITERIA is where a user extends.

A neuron is one FFN intermediate channel: a row of gate and up, a column of down. Shape letters: B sequences, T tokens,
H hidden size, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptl.families import Family

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels: int64 [B, T]


@dataclass(frozen=True)
class Criterion:
    """How the activations of one batch become scores, and how batches are joined.

    score(activations [B, T, F], their gradients or None, mask bool [B, T], weights) -> float32 [B, F], a row each.
    """

    score: Callable[[Tensor, Tensor | None, Tensor, dict[str, Tensor]], Tensor]
    join: str  # "max" or "mean" over sequences
    needs_gradients: bool = False


def _contribution(activations: Tensor, mask: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """|activation| x ||down column||: how far each token's output moves without the neuron. float32 [B, T, F]."""
    column_norms = weights["down"].float().norm(dim=0)  # [F]
    return activations.float().abs() * column_norms * mask[..., None]


def _max(activations: Tensor, _: Tensor | None, mask: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The paper's criterion (arXiv 2602.04919): largest change of the layer's output over all non-padding tokens."""
    return _contribution(activations, mask, weights).amax(dim=1)


def _mean(activations: Tensor, _: Tensor | None, mask: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return _contribution(activations, mask, weights).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _taylor(activations: Tensor, gradients: Tensor | None, mask: Tensor, _: dict[str, Tensor]) -> Tensor:
    """First-order change of the loss when the neuron is zeroed (Molchanov et al. 2019, arXiv 1906.10771)."""
    assert gradients is not None
    return (activations.float() * gradients.float() * mask[..., None]).sum(dim=1).abs()


def _weight(activations: Tensor, _: Tensor | None, mask: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """L2 norm of the neuron's weights; the data plays no part."""
    squares = weights["rows"].float().pow(2).sum(dim=-1).sum(dim=0) + weights["down"].float().pow(2).sum(dim=0)  # [F]
    return squares.sqrt().expand(activations.shape[0], -1)


CRITERIA: dict[str, Criterion] = {
    "max": Criterion(_max, "max"),
    "mean": Criterion(_mean, "mean"),
    "weight": Criterion(_weight, "max"),
    "taylor": Criterion(_taylor, "mean", needs_gradients=True),
    "random": Criterion(lambda activations, _g, _m, _w: torch.zeros(activations[:, 0].shape), "max"),
}


def _hidden_change(before: Tensor, after: Tensor) -> Tensor:
    """The paper's layer criterion: how far the layer moves the hidden state. float32 [B, T]."""
    return (after.float() - before.float()).norm(dim=-1)


def _block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of hidden state before and after (ShortGPT, arXiv 2403.03853, eq. 1). float32 [B, T]."""
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)


LAYER_CRITERIA: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "max": (_hidden_change, "max"),
    "block_influence": (_block_influence, "mean"),
}


class _Joined:
    """Running max or mean of rows [B, units], so that no activations are kept."""

    def __init__(self, how: str) -> None:
        self.how, self.value, self.count = how, torch.zeros(()), 0

    def add(self, rows: Tensor) -> None:
        rows = rows.float().cpu()
        self.count += rows.shape[0]
        if self.how == "mean":
            self.value = self.value + rows.sum(dim=0)
        else:
            best = rows.amax(dim=0)
            self.value = best if self.value.dim() == 0 else torch.maximum(self.value, best)

    def result(self) -> Tensor:
        return self.value / self.count if self.how == "mean" else self.value


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    return model.get_decoder().layers  # type: ignore[operator]


def neuron_scores(
    model: Any, family: Family, batches: Sequence[Batch], criterion: str, seed: int, progress: bool = True
) -> list[Tensor]:
    """Score every neuron on the batches; returns float32 [F] per layer."""
    layers = decoder_layers(model)
    downs: list[Any] = [layer.get_submodule(family.columns) for layer in layers]
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(down.weight.shape[1], generator=generator) for down in downs]
    rule = CRITERIA[criterion]
    totals = [_Joined(rule.join) for _ in layers]
    caught: dict[int, Tensor] = {}

    def catch(i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if rule.needs_gradients:
                inputs[0].retain_grad()
                caught[i] = inputs[0]
            else:
                totals[i].add(rule.score(inputs[0], None, mask, _weights(layers[i], family)))

        return hook

    hooks = [down.register_forward_pre_hook(catch(i)) for i, down in enumerate(downs)]
    try:
        with torch.set_grad_enabled(rule.needs_gradients):
            for batch in tqdm(batches, desc=f"scoring neurons ({criterion})", disable=not progress):
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                mask = batch["attention_mask"].bool()
                output = model(**batch, use_cache=False)
                if rule.needs_gradients:
                    output.loss.backward()
                    for i, activations in caught.items():
                        totals[i].add(rule.score(activations.detach(), activations.grad, mask, {}))
                    model.zero_grad(set_to_none=True)
                    caught.clear()
    finally:
        for handle in hooks:
            handle.remove()
    return [total.result() for total in totals]


def layer_scores(model: Any, batches: Iterable[Batch], criterion: str, progress: bool = True) -> Tensor:
    """Score every layer: mean over a sequence's non-padding tokens, joined over sequences; float32 [layers]."""
    change, how = LAYER_CRITERIA[criterion]
    layers = decoder_layers(model)
    totals = [_Joined(how) for _ in layers]

    def catch(i: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = inputs[0] if inputs else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            rows = (change(before, after) * mask).sum(dim=1) / mask.sum(dim=1)  # [B]
            totals[i].add(rows[:, None])

        return hook

    hooks = [layer.register_forward_hook(catch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc=f"scoring layers ({criterion})", disable=not progress):
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                mask = batch["attention_mask"].bool()
                model(**batch, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return torch.cat([total.result() for total in totals])


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores: int64 [count], ascending; of equal scores the lower index stays."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def num_redundant(scores: Tensor, sigma: float) -> int:
    """How many units score below the threshold, so that removing each changes the output by less than sigma."""
    return int((scores < sigma).sum())


def _weights(layer: nn.Module, family: Family) -> dict[str, Tensor]:
    rows = torch.stack([layer.get_parameter(f"{name}.weight").detach() for name in family.rows])  # [rows, F, H]
    return {"rows": rows, "down": layer.get_parameter(f"{family.columns}.weight").detach()}
