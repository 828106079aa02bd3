"""Closed-form repair of a cut, without training: the neurons that stay take over what those that go gave.

Shape letters: importance.py; N tokens, K neurons that stay.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ptl.model import safetensors_io
from ptl.model.safetensors_io import Entries, Entry
from ptl.pruning.layerwise import LayerwiseModel, layers_in_turn, run_with_activations

STRENGTH = 0.01  # of the penalty
EPSILON = 1e-6  # added to a mean square, as norms do


@contextmanager
def fitted(model: LayerwiseModel | None, kept: Mapping[int, Tensor], folder: Path) -> Iterator[Entries]:
    """Each layer's down projection [H, K], fitted to the output of all F neurons, by the tensors' names.

    `kept`: int64 [K] of each layer. Without a model, or where all neurons stay, the mapping is empty. The weights are
    in files below `folder` for as long as the block lasts. Memory: three float32 [K, F] beside a layer.
    Source: He et al. 2017, arXiv 1707.06168, with a ridge penalty on the change.
    """
    if model is None or not kept:
        yield {}
        return
    entries = {}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="repaired-") as files:
        for old, weight in _weights(model, kept):
            stored = weight.cpu().to(safetensors_io.dtypes()[old.dtype])
            file = Path(files, f"{old.name}.safetensors")
            safetensors_io.write_tensors(file, [(old.name, old.dtype, tuple(stored.shape))], [stored])
            (entries[old.name],) = safetensors_io.entries(file)
        yield entries


@torch.no_grad()
def _weights(model: LayerwiseModel, kept: Mapping[int, Tensor]) -> Iterator[tuple[Entry, Tensor]]:
    """Of each layer the down projection in the checkpoint, and what is fitted to it: float32 [H, K]."""
    states = model.embed()  # [B, T, H] of each batch
    for i, _ in layers_in_turn(model, "repairing, by layer"):
        # As stored: the layer in memory has the config's dtype
        old = model.entries[f"model.layers.{i}.{model.family.down_projection}.weight"]
        weight = safetensors_io.read_tensor(old).float().to(model.device)  # [H, F]
        stay = kept[i].to(model.device)
        products = torch.zeros(len(stay), weight.shape[1], device=model.device)
        for b, hidden in enumerate(states):
            states[b], rows = _activations(model, i, b, hidden)
            products.addmm_(rows[:, stay].t(), rows)
        yield old, fit(weight, products, stay)


def _activations(model: LayerwiseModel, i: int, b: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states after layer i, and what its down projection reads at the tokens that are no padding [N, F].

    What reads the layer's output divides it by its root mean square: each token's row is divided by that.
    """
    after, activations, *before_norm = run_with_activations(model, i, b, hidden)
    tokens = model.batches[b]["attention_mask"].bool()  # [B, T]
    (normed,) = before_norm or (after,)
    mean_square = normed[tokens].float().square().mean(dim=1, keepdim=True)  # [N, 1]
    return after, activations[tokens].float() * (mean_square + EPSILON).rsqrt()


def fit(weight: Tensor, products: Tensor, kept: Tensor) -> Tensor:
    """The weight W' [H, K] that minimizes |X_K W'^T - X W^T|^2 + penalty |W' - W_K|^2.

    Of the weight W, float32 [H, F], the products X_K^T X, float32 [K, F], and the columns K that stay, int64 [K]. The
    penalty is STRENGTH times the mean squared norm of X_K's columns.
    """
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)  # [F]
    removed[kept] = False
    inner = products[:, kept]  # [K, K]
    inner.diagonal().add_(STRENGTH * inner.diagonal().mean() + torch.finfo(torch.float32).tiny)
    lost = products[:, removed] @ weight[:, removed].t()  # [K, H]: what the removed neurons gave, as the others see it
    return weight[:, kept] + torch.cholesky_solve(lost, torch.linalg.cholesky(inner)).t()
