"""Closed-form repair of a cut, without training: each layer's MLP makes up for what was lost before it and in it.

Shape letters: importance.py, of the pruned model; N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ptl.model import safetensors_io
from ptl.pruning.layerwise import LayerwiseModel, layers_in_turn, run_with_activations

STRENGTH = 0.1  # of the penalty
EPSILON = 1e-6  # added to a mean square, as norms do


@torch.no_grad()
def repair(
    folder: Path, dense: LayerwiseModel, stay: Tensor | None, weights: Sequence[float]
) -> None:
    """Fit each down projection [H, F] of a pruned checkpoint, in place, on the text of the model that was pruned.

    The residual stream after its layer, or what a norm after the MLP reads, is to be as without the cut, in the
    dimensions that `stay` (int64 [H]; None: all); the layers before it are fitted already. Sources of the text count by
    their `weights`. Memory: a layer of both models, three float32 [F, F], and on the host the hidden states of both.
    Source: He et al. 2017, arXiv 1707.06168, with a ridge penalty on the change.
    """
    cut = LayerwiseModel(folder, dense.family, dense.batches)
    # [B, T, H] of each batch
    wanted, states = ([hidden.cpu() for hidden in model.embed()] for model in (dense, cut))
    counts = _counts(cut, weights)
    part = f"{cut.family.down_projection}.weight"
    for i, layer in layers_in_turn(cut, "repairing, by layer"):
        stored = cut.entries[f"model.layers.{i}.{part}"]
        # As stored: the layer in memory has the config's dtype
        weight = safetensors_io.read_tensor(stored).float().to(cut.device)  # [H, F]
        products = torch.zeros(weight.shape[1], weight.shape[1], device=cut.device)
        lost = torch.zeros(weight.shape[::-1], device=cut.device)
        with dense.layer(i):
            for b, hidden in enumerate(states):
                after, _, target = run_with_activations(dense, i, b, wanted[b].to(cut.device))
                wanted[b] = after.cpu()
                _, activations, output = run_with_activations(cut, i, b, hidden.to(cut.device))
                target = target if stay is None else target[..., stay]
                rows, errors = _equations(counts[b], activations, target, output)
                products.addmm_(rows.t(), rows)
                lost.addmm_(rows.t(), errors)
        weight += change(products, lost) / cut.residual_scale
        layer.get_parameter(part).copy_(weight)
        for b, hidden in enumerate(states):
            states[b] = cut.run(i, b, hidden.to(cut.device)).cpu()
        safetensors_io.overwrite(stored, weight.cpu())


def _counts(model: LayerwiseModel, weights: Sequence[float]) -> list[Tensor]:
    """How much each token counts, of each batch: float32 [B, T], 0 at padding; all of a source its weight together."""
    masks, sources = (
        [batch[name] for batch in model.batches] for name in ("attention_mask", "source")
    )
    tokens = torch.cat([model.tokens(b) for b in range(len(masks))])  # [sequences]
    of_sources = torch.tensor(weights, device=model.device) / torch.bincount(
        torch.cat(sources), tokens, len(weights)
    )
    return [mask * of_sources[its, None].float() for mask, its in zip(masks, sources, strict=True)]


def _equations(
    counts: Tensor, activations: Tensor, target: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """What the change of a down projection multiplies [N, F], and should give [N, H], of tokens that count.

    What reads the output divides it by its root mean square: each token's row is divided by that of the target.
    """
    tokens = counts > 0  # [B, T]
    expected = target[tokens].float()  # [N, H]
    mean_square = expected.square().mean(dim=1) + EPSILON  # [N]
    factor = (counts[tokens] / mean_square).sqrt()[:, None]  # [N, 1]
    return activations[tokens].float() * factor, (expected - output[tokens].float()) * factor


def change(products: Tensor, lost: Tensor) -> Tensor:
    """The change C [H, F] that minimizes |X C^T - E|^2 + penalty |C|^2, of X^T X, float32 [F, F], and X^T E [F, H].

    The penalty, which is added to `products`, is STRENGTH times the mean squared norm of X's columns.
    """
    products.diagonal().add_(
        STRENGTH * products.diagonal().mean() + torch.finfo(torch.float32).tiny
    )
    return torch.cholesky_solve(lost, torch.linalg.cholesky(products)).t()
