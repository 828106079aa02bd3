"""Closed-form repair after a cut: no training, only what the calibration text says about the cut layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ptl import safefile
from ptl.errors import InputError
from ptl.families import Family
from ptl.importance import caught_inputs
from ptl.stream import LayerwiseModel
from ptl.surgery import Selection, cut_tensor


def check(kind: str, family: Family) -> None:
    """Raise InputError for a repair that the family's structure does not allow."""
    if kind in ("magnitude", "both") and not family.writes:
        raise InputError(
            f"prune.repair={kind} is not possible for {family.model_type}: its layers read the hidden state without a "
            "norm, so that it cannot be scaled; use off or ridge"
        )


def ridge(
    stream: LayerwiseModel, cut: Selection, strength: float, folder: Path, progress: bool = True
) -> dict[str, Path]:
    """Fit each cut down_proj to the output of the uncut one; returns a file for each new tensor, in `folder`.

    With X the neurons' activations over all tokens, K kept and R removed ones, the ridge problem
    min ||X_K W'^T - X W^T||^2 + lambda ||W' - W_K||^2 has the solution W' = W_K + W_R C_RK (C_KK + lambda I)^-1 with
    C = X^T X; lambda is `strength` times the mean of C's diagonal. Memory: C, float32 [F, F], beside one layer.
    Where an RMS norm follows down_proj, each token's error is divided by the root mean square of its output, as the
    norm divides it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states, written = stream.embed(), {}
    columns, norm = stream.family.columns, stream.family.post_norm
    for i in tqdm(range(len(stream.layers)), desc="repairing down_proj, by layer", disable=not progress):
        kept = cut.neurons.get(i)
        with (
            torch.no_grad(),
            stream.layer(i) as layer,
            caught_inputs(layer, columns) as inputs,
            caught_inputs(layer, norm or columns) as outputs,
        ):
            moments: Tensor | None = None
            for b, hidden in enumerate(states):
                states[b] = stream.run(i, b, hidden)
                tokens = stream.batches[b]["attention_mask"].bool()
                rows, output = inputs.pop()[tokens].float(), outputs.pop()[tokens].float()  # [tokens, F], [tokens, H]
                if norm:
                    rows *= (output.square().mean(dim=1, keepdim=True) + stream.model.config.rms_norm_eps).rsqrt()
                if kept is not None and i in cut.layers:
                    moments = rows.t() @ rows if moments is None else moments.addmm_(rows.t(), rows)
            if moments is not None and kept is not None:
                weight = layer.get_parameter(f"{columns}.weight")
                repaired = fit(weight.float(), moments, kept.to(weight.device), strength).to(weight.dtype)
                name = f"model.layers.{i}.{columns}.weight"
                written[name] = _keep(folder, name, repaired)
    return written


def fit(weight: Tensor, moments: Tensor, kept: Tensor, strength: float) -> Tensor:
    """W' [H, kept] for the weight [H, F] and the second moments [F, F] of its inputs; all float32."""
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    inner = moments[kept][:, kept]
    penalty = strength * moments.diagonal().mean() + torch.finfo(torch.float32).tiny
    inner.diagonal().add_(penalty)
    target = moments[kept][:, removed] @ weight[:, removed].t()  # [kept, H]
    factor = torch.linalg.cholesky(inner)
    return weight[:, kept] + torch.cholesky_solve(target, factor).t()


def magnitude(
    stream: LayerwiseModel, cut: Selection, repaired: dict[str, Path], folder: Path, progress: bool = True
) -> dict[str, Path]:
    """Make up for the growth of the hidden state that removed layers took with them (Prune&Comp, arXiv 2507.18212).

    The paper scales everything before a removed layer by the ratio of norms alpha. Here what the layers after it add to
    the hidden state is divided by alpha instead: the next norms make both the same, and embeddings that are tied to the
    output stay as they are. `repaired` are tensors that were changed already; returns it with the scaled ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    growth = _growth(stream, set(range(len(stream.layers))) - set(cut.layers), progress)
    scale, found = 1.0, dict(repaired)
    for i in range(len(stream.layers)):
        scale *= growth.get(i, 1.0)
        if i not in cut.layers or scale == 1.0:
            continue
        for name in _writes(stream.entries, stream.family, i):
            if name in repaired:
                tensor = safefile.read(safefile.entries(repaired[name])[0])
            else:
                placed = cut_tensor(name, safefile.read(stream.entries[name]), stream.family, cut)
                assert placed is not None
                tensor = placed[1]
            offset = stream.family.norm_offset if name.endswith("norm.weight") else 0.0
            found[name] = _keep(folder, name, ((tensor.float() + offset) / scale - offset).to(tensor.dtype))
    return found


def _growth(stream: LayerwiseModel, removed: set[int], progress: bool) -> dict[int, float]:
    """Mean over tokens of |hidden state after| / |before|, for each removed layer."""
    states, found = stream.embed(), {}
    for i in tqdm(range(len(stream.layers)), desc="measuring magnitudes, by layer", disable=not progress):
        ratios = []
        with torch.no_grad(), stream.layer(i):
            for b, before in enumerate(states):
                states[b] = stream.run(i, b, before)
                ratio = states[b].float().norm(dim=-1) / before.float().norm(dim=-1)
                ratios.append(ratio[stream.batches[b]["attention_mask"].bool()])
        if i in removed:
            found[i] = float(torch.cat(ratios).mean())
    return found


def _writes(names: Iterable[str], family: Family, layer: int) -> list[str]:
    """The tensors through which a layer adds to the hidden state."""
    wanted = {f"model.layers.{layer}.{part}.{kind}" for part in family.writes for kind in ("weight", "bias")}
    return sorted(wanted & set(names))


def _keep(folder: Path, name: str, tensor: Tensor) -> Path:
    path = folder / f"{name}.safetensors"
    dtype = next(key for key, value in safefile.dtypes().items() if value == tensor.dtype)
    safefile.write(path, [(name, dtype, tuple(tensor.shape))], [tensor.cpu()])
    return path
