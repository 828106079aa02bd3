"""Score, select, prune, save: one checkpoint in, one smaller checkpoint out."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ptl.config.run import Calibration
from ptl.config.schedule import Prune
from ptl.data.sequences import IGNORED, Batch, calibration_batches
from ptl.errors import InputError
from ptl.model import checkpoint, pretrained, shapes, widths
from ptl.model.dimensions import (
    ModelDimensions,
    check_unit,
    experts_for,
    layers_for,
    model_dimensions,
    width_for,
)
from ptl.model.families import family_of
from ptl.pruning.experts import ExpertScores, expert_scores
from ptl.pruning.importance import all_width_scores, keep_highest, layer_scores, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel, mean_loss
from ptl.pruning.surgery import Selection, write_pruned


@dataclass(frozen=True)
class Candidate:
    """Widths to end the loop with, and the loss of a token of the calibration text right after they are cut."""

    hidden: int
    width: int
    kv_heads: int
    experts: int | None
    loss: float


@dataclass(frozen=True)
class PruneReport:
    """What was pruned. Widths are FFN widths, one per layer that stays."""

    unit: str  # what was removed: "neurons", "width", "layers", "experts" or "nothing"
    criterion: str  # by which it was selected
    params_before: int
    params: int  # afterwards
    goal: int  # parameters asked for
    layers: int  # that stay
    widths: tuple[int, ...]
    hidden: int  # dimensions of the residual stream
    kv_heads: int  # of each layer
    experts: int | None  # that stay in each layer; None: a dense model
    candidates: tuple[Candidate, ...]  # ways to the end of the loop that were compared; none but for "width"
    removed_layers: tuple[int, ...]  # their numbers in the source
    sequences: int  # calibration sequences scored; 0: none were needed
    seconds: float  # wall-clock time


def prune_checkpoint(
    src: Path, dst: Path, prune: Prune, calibration: Calibration, *, unit: str, goal: int, end: int, seed: int
) -> PruneReport:
    """Prune `src` to at most `goal` parameters by removing `unit`, neurons, width, layers or experts; write `dst`.

    `end` are the parameters that the loop ends with, for which `width` chooses the sizes.

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
    candidates: list[Candidate] = []
    if goal < before.params:
        by_loss = unit == "width" or (unit == "neurons" and prune.criterion == "taylor")
        count = None if unit == "width" else _count(unit, before, prune, goal)
        model = LayerwiseModel(src, family, _batches(src, calibration, seed, by_loss))
        if count is None:
            selection, candidates = _width(src, dst, model, before, prune, goal, end, seed)
        else:
            selection = _SELECT[unit](model, before, prune.criterion, count, seed)
        sequences = model.num_sequences
    write_pruned(src, dst, family, selection)
    # From the files that were written, not calculated
    after = model_dimensions(dst, family)
    removed_layers = [i for i in range(before.layers) if i not in selection.layers]
    removed = after.params < before.params
    return PruneReport(
        unit=unit if removed else "nothing",
        criterion="max" if unit == "layers" else prune.criterion,
        params_before=before.params,
        params=after.params,
        goal=goal,
        layers=after.layers,
        widths=(after.width,) * after.layers,
        hidden=after.hidden,
        kv_heads=after.groups,
        candidates=tuple(candidates),
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


def _width(
    src: Path,
    dst: Path,
    model: LayerwiseModel,
    dimensions: ModelDimensions,
    prune: Prune,
    goal: int,
    end: int,
    seed: int,
) -> tuple[Selection, list[Candidate]]:
    """The highest-scored of each width, on the way to those with which the loss is the least right after the cut.

    Each candidate is written beside `dst` and read layer by layer: one forward pass, whatever the model's size.
    """
    select = _selecting(model, dimensions, seed)
    possible = widths.candidates(dimensions, end, prune.width_multiple, prune.ends)
    compared = []
    for sizes in possible if len(possible) > 1 else ():
        with tempfile.TemporaryDirectory(dir=dst.parent, prefix="candidate-") as folder:
            write_pruned(src, Path(folder), model.family, select(sizes))
            loss = mean_loss(LayerwiseModel(Path(folder), model.family, model.batches))
        compared.append(Candidate(sizes.hidden, sizes.width, sizes.groups, sizes.experts or None, loss))
    losses = [candidate.loss for candidate in compared] or [0.0]
    chosen = possible[losses.index(min(losses))]
    sizes = chosen if goal <= end else widths.towards(dimensions, chosen, goal, prune.width_multiple)
    return select(sizes), compared


def _selecting(model: LayerwiseModel, dimensions: ModelDimensions, seed: int) -> Callable[[ModelDimensions], Selection]:
    """Scores all widths once; what it returns selects the highest-scored for any sizes."""
    scores = all_width_scores(model, dimensions.narrowable)
    of_experts = {} if dimensions.narrowable else expert_scores(model, "reap", seed)

    def select(sizes: ModelDimensions) -> Selection:
        everything = Selection(tuple(range(dimensions.layers)), {})
        neurons, experts, hidden, groups = {}, {}, None, {}
        if sizes.width < dimensions.width:
            neurons = {i: keep_highest(of_layer, sizes.width) for i, of_layer in enumerate(scores.neurons)}
        if sizes.experts < dimensions.experts:
            experts = _kept_experts(of_experts, dimensions.expert_groups, sizes.experts)
        if sizes.hidden < dimensions.hidden:
            hidden = keep_highest(scores.hidden, sizes.hidden)
        if sizes.groups < dimensions.groups:
            groups = {i: keep_highest(of_layer, sizes.groups) for i, of_layer in enumerate(scores.groups)}
        return replace(everything, neurons=neurons, experts=experts, hidden=hidden, groups=groups)

    return select


def _experts(model: LayerwiseModel, dimensions: ModelDimensions, criterion: str, number: int, seed: int) -> Selection:
    """The highest-scored experts of each layer, as many in each, and as many in each group of a layer."""
    kept = _kept_experts(expert_scores(model, criterion, seed), dimensions.expert_groups, number)
    return Selection(tuple(range(dimensions.layers)), {}, kept)


def _kept_experts(scores: ExpertScores, groups: int, number: int) -> dict[int, Tensor]:
    """The highest-scored experts of each layer: int64 [number], ascending."""
    kept = {}
    for layer, of_layer in scores.items():
        of_groups = of_layer.view(groups, -1)  # experts of a group follow each other: [groups, size]
        starts = torch.arange(groups)[:, None] * of_groups.shape[1]
        kept[layer] = (keep_highest(of_groups, number // groups) + starts).flatten()
    return kept


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
            remedy="raise it, or set prune.target=neurons and prune.criterion=max, which needs no answers",
        )
    return batches


def _has_loss(batch: Batch) -> bool:
    """Whether a token of an answer is predicted; the first token of a sequence is predicted from nothing."""
    targets = batch["labels"][:, 1:]  # [B, T - 1]
    return bool((targets != IGNORED).any())
