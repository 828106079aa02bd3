"""Score, select, prune, save: one checkpoint in, one smaller checkpoint out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ptl.config.run import Calibration
from ptl.config.schedule import Prune
from ptl.data.sequences import IGNORED, Batch, calibration_batches
from ptl.errors import InputError
from ptl.model import checkpoint, pretrained, shapes
from ptl.model.dimensions import (
    ModelDimensions,
    check_unit,
    experts_for,
    layers_for,
    model_dimensions,
    width_for,
)
from ptl.model.families import family_of
from ptl.pruning.experts import expert_scores
from ptl.pruning.importance import keep_highest, layer_scores, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.surgery import Selection, write_pruned


@dataclass(frozen=True)
class PruneReport:
    """What was pruned. Widths are FFN widths, one per layer that stays."""

    unit: str  # what was removed: "neurons", "layers", "experts" or "nothing"
    criterion: str  # by which it was selected
    params_before: int
    params: int  # afterwards
    goal: int  # parameters asked for
    layers: int  # that stay
    widths: tuple[int, ...]
    experts: int | None  # that stay in each layer; None: a dense model
    removed_layers: tuple[int, ...]  # their numbers in the source
    sequences: int  # calibration sequences scored; 0: none were needed
    seconds: float  # wall-clock time


def prune_checkpoint(
    src: Path, dst: Path, prune: Prune, calibration: Calibration, *, unit: str, goal: int, seed: int
) -> PruneReport:
    """Prune `src` to at most `goal` parameters by removing `unit`, neurons, layers or experts; write it to `dst`.

    Memory: the largest layer, embeddings and the hidden states of the calibration text, whatever the depth. `taylor`
    keeps the hidden states of every layer, in host memory; on a GPU it needs a layer and a batch of them.
    """
    started = time.monotonic()
    family = family_of(checkpoint.read_config(src))
    before = model_dimensions(src, family)
    check_unit(before.experts, before.narrowable, unit)
    # Otherwise nothing has to be removed: no text is read, and no layer is scored.
    selection = Selection(tuple(range(before.layers)), {})
    sequences = 0
    if goal < before.params:
        count = _count(unit, before, prune, goal)
        by_loss = unit == "neurons" and prune.criterion == "taylor"
        model = LayerwiseModel(src, family, _batches(src, calibration, seed, by_loss))
        selection = _SELECT[unit](model, before, prune.criterion, count, seed)
        sequences = model.num_sequences
    write_pruned(src, dst, family, selection)
    # From the files that were written, not calculated
    after = model_dimensions(dst, family)
    removed_layers = [i for i in range(before.layers) if i not in selection.layers]
    removed = bool(selection.experts or selection.neurons or removed_layers)
    return PruneReport(
        unit=unit if removed else "nothing",
        criterion="max" if unit == "layers" else prune.criterion,
        params_before=before.params,
        params=after.params,
        goal=goal,
        layers=after.layers,
        widths=(after.width,) * after.layers,
        experts=after.experts or None,
        removed_layers=tuple(removed_layers),
        sequences=sequences,
        seconds=time.monotonic() - started,
    )


def _count(unit: str, dimensions: ModelDimensions, settings: Prune, goal: int) -> int:
    """How many stay: neurons of each layer, layers, or experts of each. Raises InputError for a goal out of reach."""
    if unit == "neurons":
        return width_for(dimensions, goal, settings.width_multiple)
    if unit == "layers":
        return dimensions.layers - layers_for(dimensions, goal)
    return experts_for(dimensions, goal)


def _neurons(model: LayerwiseModel, dimensions: ModelDimensions, criterion: str, width: int, seed: int) -> Selection:
    """The highest-scored neurons of each layer, or of each of its experts, as many in each."""
    scores = neuron_scores(model, criterion, seed)  # [F] of each layer, or [E, F]
    highest = {layer: keep_highest(of_layer, width) for layer, of_layer in enumerate(scores)}
    return Selection(tuple(highest), highest)


def _layers(model: LayerwiseModel, dimensions: ModelDimensions, _criterion: str, count: int, _seed: int) -> Selection:
    """The highest-scored layers."""
    scores = layer_scores(model)  # [layers]
    scores[list(dimensions.dense_layers)] = math.inf  # these stay: a layer with experts is many times larger
    return Selection(tuple(keep_highest(scores, count).tolist()), {})


def _experts(model: LayerwiseModel, dimensions: ModelDimensions, criterion: str, number: int, seed: int) -> Selection:
    """The highest-scored experts of each layer, as many in each, and as many in each group of a layer."""
    groups = dimensions.expert_groups
    kept = {}
    for layer, scores in expert_scores(model, criterion, seed).items():
        of_groups = scores.view(groups, -1)  # experts of a group follow each other: [groups, size]
        starts = torch.arange(groups)[:, None] * of_groups.shape[1]
        kept[layer] = (keep_highest(of_groups, number // groups) + starts).flatten()  # [number], ascending
    return Selection(tuple(range(dimensions.layers)), {}, kept)


# By the unit that an iteration removes; each takes the model, its dimensions, a criterion, how many stay, and a seed
_SELECT = {"neurons": _neurons, "layers": _layers, "experts": _experts}


def _batches(src: Path, calibration: Calibration, seed: int, by_loss: bool) -> list[Batch]:
    """The calibration text. Raises InputError where its loss is to be measured and no token has one."""
    shapes.check_positions(src, {"calibration.max_length": calibration.max_length})
    tokenizer = pretrained.load_tokenizer(src)
    batches = calibration_batches(calibration, tokenizer, seed)
    if by_loss and not any(map(_has_loss, batches)):
        raise InputError(
            f"{calibration.max_length} tokens hold the prompts and nothing of an answer, so that "
            "prune.criterion=taylor has no loss to measure",
            field="calibration.max_length",
            remedy="raise it, or set prune.criterion=max, which needs no answers",
        )
    return batches


def _has_loss(batch: Batch) -> bool:
    """Whether a token of an answer is predicted; the first token of a sequence is predicted from nothing."""
    targets = batch["labels"][:, 1:]  # [B, T - 1]
    return bool((targets != IGNORED).any())
