"""Score, select, prune, save: one checkpoint in, one smaller checkpoint out."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ptl.config.chat import NO_CHAT, Chat
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
from ptl.model.widths import ComparedWidths
from ptl.pruning.experts import expert_scores
from ptl.pruning.importance import all_width_scores, keep_highest, layer_scores, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel, UnitScores, mean_loss
from ptl.pruning.repair import repair
from ptl.pruning.surgery import Selection, write_pruned


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
    # ways to the end of the loop that were compared; none but for "width"
    candidates: tuple[ComparedWidths, ...]
    # widths to end the loop with, as fields of ModelDimensions; empty but for "width"
    chosen: dict[str, int]
    removed_layers: tuple[int, ...]  # their numbers in the source
    sequences: int  # calibration sequences scored; 0: none were needed
    seconds: float  # wall-clock time


def prune_checkpoint(
    src: Path,
    dst: Path,
    prune: Prune,
    calibration: Calibration,
    *,
    unit: str,
    goal: int,
    end: int,
    chosen: Mapping[str, Any] = MappingProxyType({}),
    chat: Chat = NO_CHAT,
    seed: int,
) -> PruneReport:
    """Prune `src` to at most `goal` parameters by removing `unit`, neurons, width, layers or experts; write `dst`.

    `end`: parameters at the end of the loop, for which `width` chooses the sizes unless an iteration has `chosen` them.

    Memory: a layer, embeddings and the hidden states of the text, whatever the depth; see `width_scores` and `repair`.
    """
    started = time.monotonic()
    family = family_of(checkpoint.read_config(src))
    before = model_dimensions(src, family)
    check_unit(before.experts, before.narrowable, unit, prune.repair)
    selection = Selection(tuple(range(before.layers)), {})
    model: LayerwiseModel | None = None
    candidates: list[ComparedWidths] = []
    criterion: str = "max" if unit == "layers" else prune.criterion
    if goal < before.params:  # otherwise no text is read, and no layer is scored
        is_width = unit == "width"
        possible = _possible(unit, before, prune, goal, end, chosen)
        if is_width and len(possible) == 1:
            unit, criterion = _removed(before, possible[0])
        model = LayerwiseModel(
            src, family, _batches(src, calibration, chat, seed, by_loss=criterion == "taylor")
        )
        scores = _scores(model, before, unit, criterion, seed)
        sizes, candidates = _compared(
            src, dst, model, possible, partial(select_units, scores, before)
        )
        if is_width:
            chosen = {
                name: getattr(sizes, name) for name in ("hidden", "width", "kv_heads", "experts")
            }
            sizes = (
                widths.towards(before, sizes, goal, prune.width_multiple) if goal > end else sizes
            )
        selection = select_units(scores, before, sizes)
    write_pruned(src, dst, family, selection)
    if prune.repair and model and unit != "layers":
        _repair(
            src,
            dst,
            calibration.model_copy(update={"num_sequences": prune.repair}),
            selection,
            chat,
            seed,
        )
    after = model_dimensions(dst, family)  # from the files that were written, not calculated
    return PruneReport(
        unit=unit if after.params < before.params else "nothing",
        criterion=criterion,
        params_before=before.params,
        params=after.params,
        goal=goal,
        layers=after.layers,
        widths=(after.width,) * after.layers,
        hidden=after.hidden,
        kv_heads=after.kv_heads,
        candidates=tuple(candidates),
        chosen=dict(chosen),
        experts=after.experts or None,
        removed_layers=tuple(i for i in range(before.layers) if i not in selection.layers),
        sequences=model.num_sequences if model else 0,
        seconds=time.monotonic() - started,
    )


def _possible(
    unit: str,
    dimensions: ModelDimensions,
    settings: Prune,
    goal: int,
    end: int,
    chosen: Mapping[str, Any],
) -> list[ModelDimensions]:
    """The sizes that pruning may lead to: for `width` at the end of the loop. Raises InputError for none."""
    if unit == "width":
        if chosen:
            return [replace(dimensions, **chosen)]
        return widths.candidates(dimensions, end, settings.width_multiple, settings.wanted)
    if unit == "neurons":
        return [replace(dimensions, width=width_for(dimensions, goal, settings.width_multiple))]
    if unit == "layers":
        return [replace(dimensions, layers=dimensions.layers - layers_for(dimensions, goal))]
    return [replace(dimensions, experts=experts_for(dimensions, goal))]


def _removed(before: ModelDimensions, after: ModelDimensions) -> tuple[str, str]:
    """What width removes, and by which criterion: of neurons or experts alone the other scores are not looked at."""
    if after == replace(before, width=after.width):
        return "neurons", "taylor"
    return (
        ("experts", "reap")
        if after == replace(before, experts=after.experts)
        else ("width", "taylor")
    )


def _scores(
    model: LayerwiseModel, dimensions: ModelDimensions, unit: str, criterion: str, seed: int
) -> UnitScores:
    """Scores of all that an iteration may remove: of a mixture whose neurons stay, `width` removes experts."""
    if unit == "neurons":
        return UnitScores(neuron_scores(model, criterion, seed))
    if unit == "experts":
        return UnitScores([], experts=expert_scores(model, criterion, seed))
    if unit == "layers":
        of_layers = layer_scores(model)  # [layers]
        # these stay: a layer with experts is many times larger
        of_layers[list(dimensions.dense_layers)] = math.inf
        return UnitScores([], layers=of_layers)
    scores = all_width_scores(model, dimensions.narrowable)
    return (
        scores
        if dimensions.narrowable
        else replace(scores, experts=expert_scores(model, "reap", seed))
    )


def select_units(scores: UnitScores, before: ModelDimensions, after: ModelDimensions) -> Selection:
    """The highest-scored of all that `after` has less of than `before`."""
    layers, neurons, experts, hidden, kv_heads = [*range(before.layers)], {}, {}, None, {}
    if after.layers < before.layers:
        layers = keep_highest(scores.layers, after.layers).tolist()
    if after.width < before.width:
        neurons = {
            i: keep_highest(of_layer, after.width) for i, of_layer in enumerate(scores.neurons)
        }
    if after.experts < before.experts:
        for i, of_layer in scores.experts.items():
            # experts of a group follow each other: [groups, size]
            of_groups = of_layer.view(before.expert_groups, -1)
            starts = torch.arange(before.expert_groups)[:, None] * of_groups.shape[1]
            highest = keep_highest(of_groups, after.experts // before.expert_groups)
            experts[i] = (highest + starts).flatten()  # [experts], ascending
    if after.hidden < before.hidden:
        hidden = keep_highest(scores.hidden, after.hidden)
    if after.kv_heads < before.kv_heads:
        kv_heads = {
            i: keep_highest(of_layer, after.kv_heads) for i, of_layer in enumerate(scores.kv_heads)
        }
    return Selection(tuple(layers), neurons, experts, hidden, kv_heads)


def _compared(
    src: Path,
    dst: Path,
    model: LayerwiseModel,
    possible: list[ModelDimensions],
    select: Callable[[ModelDimensions], Selection],
) -> tuple[ModelDimensions, list[ComparedWidths]]:
    """The sizes with the least loss right after the cut, and what was compared.

    The first where all are above that of guessing, which ranks nothing. Each is written to `dst` for a while, and read
    layer by layer.
    """
    if len(possible) == 1:
        return possible[0], []
    losses = []
    dst.mkdir(parents=True, exist_ok=True)
    for sizes in possible:
        with tempfile.TemporaryDirectory(dir=dst, prefix="candidate-") as name:
            folder = Path(name)
            write_pruned(src, folder, model.family, select(sizes), state=False)
            losses.append(mean_loss(LayerwiseModel(folder, model.family, model.batches)))
    ranked = [math.inf if math.isnan(loss) else loss for loss in losses]
    best = ranked.index(min(ranked)) if min(ranked) < math.log(model.config.vocab_size) else 0
    candidates = [
        ComparedWidths(
            sizes.hidden, sizes.width, sizes.kv_heads, sizes.experts or None, loss, taken=i == best
        )
        for i, (sizes, loss) in enumerate(zip(possible, losses, strict=True))
    ]
    return possible[best], candidates


def _repair(
    src: Path, dst: Path, text: Calibration, selection: Selection, chat: Chat, seed: int
) -> None:
    """Repair the pruned checkpoint `dst` on a text."""
    dense = LayerwiseModel(
        src, family_of(checkpoint.read_config(src)), _batches(src, text, chat, seed, by_loss=False)
    )
    repair(dst, dense, selection.hidden, [source.weight for source in text.data])


def _batches(
    src: Path, calibration: Calibration, chat: Chat, seed: int, by_loss: bool
) -> list[Batch]:
    """The calibration text. Raises InputError where its loss is to be measured and no token has one."""
    shapes.check_positions(src, {"calibration.max_length": calibration.max_length})
    tokenizer = pretrained.load_tokenizer(src)
    batches = calibration_batches(calibration, tokenizer, seed, chat)
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
