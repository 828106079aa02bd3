"""Closed-form repair after pruning: no training, only what the calibration text shows about the pruned layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptl.model import safetensors_io
from ptl.model.experts import DOWN
from ptl.model.safetensors_io import Entries, Entry
from ptl.pruning.layerwise import LayerwiseModel, States, layers_in_turn, run_with_activations
from ptl.pruning.routing import EXPERTS, Routed, RunExpert, activations, outputs, running_experts
from ptl.pruning.surgery import Selection


@torch.no_grad()
def ridge(
    model: LayerwiseModel,
    selection: Selection,
    strength: float,
    folder: Path,
) -> Entries:
    """Fit each pruned down_proj to the output of the original one; returns the new tensors by name, in `folder`.

    With X the neurons' activations over all tokens, K kept and R removed ones, the ridge problem
    min ||X_K W'^T - X W^T||^2 + lambda ||W' - W_K||^2 has the solution W' = W_K + W_R C_RK (C_KK + lambda I)^-1 with
    C = X^T X; lambda is `strength` times the mean of C's diagonal. Memory: C, float32 [F, F], beside one layer.
    Where an RMS norm follows down_proj, each token's error is divided by the root mean square of its output, as the
    norm divides it. Each expert of a mixture is fitted on its own tokens, times the router's weight: [E, F, F].
    """
    folder.mkdir(parents=True, exist_ok=True)
    fit_layer = _fit_experts if model.family.experts else _fit_mlp
    repaired = {}
    states = model.embed()  # [B, T, H] of each batch
    for i, layer in layers_in_turn(model, "repairing down_proj, by layer"):
        kept = selection.neurons.get(i)
        # Nothing to fit: the layer is removed, or keeps all its neurons.
        if kept is None:
            states = model.run_batches(i, states)
            continue
        for name, fitted in fit_layer(model, layer, i, states, kept.to(model.device), strength).items():
            repaired[name] = _save(model, folder, name, fitted)
    return repaired


def _fit_mlp(
    model: LayerwiseModel,
    layer: nn.Module,
    i: int,
    states: States,  # before the layer, and afterwards behind it
    kept: Tensor,  # int64 [kept]
    strength: float,
) -> dict[str, Tensor]:
    """The fitted down_proj of a dense layer by its name: float32 [H, kept]."""
    part = f"{model.family.down_projection}.weight"
    # C = X^T X: [F, F], over all batches
    weight = layer.get_parameter(part).float()  # [H, F]
    width = weight.shape[1]
    products = weight.new_zeros(width, width)
    for b, hidden in enumerate(states):
        states[b], rows = _activations(model, i, b, hidden)
        products.addmm_(rows.t(), rows)
    return {f"model.layers.{i}.{part}": fit(weight, products, kept, strength)}


def _fit_experts(
    model: LayerwiseModel,
    layer: nn.Module,
    i: int,
    states: States,  # before the layer, and afterwards behind it
    kept: Tensor,  # int64 [E, kept]
    strength: float,
) -> dict[str, Tensor]:
    """The fitted down projections of a layer's experts, by their names in the checkpoint; else as `_fit_mlp`."""
    down: Any = layer.get_submodule(EXPERTS).down_proj  # [E, H, F]
    width = down.shape[-1]
    products = torch.zeros(len(down), width, width, device=model.device)
    for b, hidden in enumerate(states):
        tokens = model.batches[b]["attention_mask"].bool().flatten()  # [B * T]
        with running_experts(layer, _adding_products(tokens, products)):
            states[b] = model.run(i, b, hidden)
    fitted = [fit(down[expert].float(), products[expert], kept[expert], strength) for expert in range(len(down))]
    experts = model.family.experts
    assert experts is not None
    if experts.is_fused(model.entries):
        return {f"model.layers.{i}.{DOWN}": torch.stack(fitted)}
    names = [experts.part(expert, experts.projections[2]) for expert in range(len(fitted))]
    return {f"model.layers.{i}.{name}.weight": weight for name, weight in zip(names, fitted, strict=True)}


def _adding_products(tokens: Tensor, products: Tensor) -> RunExpert:
    """Runs an expert, and adds X^T X of its activations at these of the tokens [B * T] to its part of [E, F, F]."""

    def run(experts: Any, routed: Routed) -> Tensor:
        values = activations(experts, routed)  # [n, F]
        real = tokens[routed.rows]  # [n]
        rows = values[real].float() * routed.weights[real, None].float()
        products[routed.expert].addmm_(rows.t(), rows)
        return outputs(experts, routed, values)

    return run


def _activations(
    model: LayerwiseModel,
    i: int,
    b: int,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """Hidden states after layer i, and the inputs of its down_proj at the N non-padding tokens: float32 [N, F]."""
    after, activations, *mlp_outputs = run_with_activations(model, i, b, hidden)
    tokens = model.batches[b]["attention_mask"].bool()  # [B, T]
    rows = activations[tokens].float()
    # At most one: only where a norm follows, which divides each token's output
    for output in mlp_outputs:
        squares = output[tokens].float().square()  # [N, H]
        mean_square = squares.mean(dim=1, keepdim=True) + model.config.rms_norm_eps  # [N, 1]
        rows *= mean_square.rsqrt()
    return after, rows


def fit(
    weight: Tensor,  # W: float32 [H, F]
    products: Tensor,  # C = X^T X of its inputs: float32 [F, F]
    kept: Tensor,  # int64 [kept]
    strength: float,
) -> Tensor:
    """The fitted weight W': float32 [H, kept]."""
    removed = torch.ones_like(weight[0], dtype=torch.bool)  # [F]
    removed[kept] = False
    # Neurons that are never active give a C of zeros, and lambda must not be zero.
    penalty = strength * products.diagonal().mean() + torch.finfo(torch.float32).tiny
    kept_products = products[kept]  # [kept, F]
    inner = kept_products[:, kept]  # a copy: C_KK
    inner.diagonal().add_(penalty)
    # The output of the removed neurons, as the kept ones see it
    target = kept_products[:, removed] @ weight[:, removed].t()  # [kept, H]
    # The matrix is symmetric and positive definite.
    correction = torch.cholesky_solve(target, torch.linalg.cholesky(inner))  # [kept, H]
    return weight[:, kept] + correction.t()


def _save(model: LayerwiseModel, folder: Path, name: str, tensor: Tensor) -> Entry:
    """The new value of one tensor, in a file of its own and in the checkpoint's dtype."""
    path = folder / f"{name}.safetensors"
    dtype = model.entries[name].dtype
    stored = tensor.cpu().to(safetensors_io.dtypes()[dtype])
    safetensors_io.write_tensors(path, [(name, dtype, tuple(stored.shape))], [stored])
    (entry,) = safetensors_io.entries(path)
    return entry
