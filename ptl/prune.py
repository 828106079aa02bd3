"""Score, select, cut, save: one checkpoint in, one smaller checkpoint out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ptl import checkpoint, importance
from ptl.anatomy import Anatomy, anatomy, layers_for, width_for
from ptl.config import Calibration, Prune
from ptl.data import calibration_batches
from ptl.families import Family, family_of
from ptl.stream import Stream
from ptl.surgery import Cut, cut_checkpoint


@dataclass(frozen=True)
class PruneReport:
    """What a cut did. Widths are FFN widths, one per layer that stays."""

    unit: str
    criterion: str
    params_before: int
    params: int
    goal: int
    layers: int
    widths: tuple[int, ...]
    removed_layers: tuple[int, ...]
    seconds: float


def prune_checkpoint(
    src: Path, dst: Path, settings: Prune, calibration: Calibration, *, unit: str, goal: int, seed: int
) -> PruneReport:
    """Cut `src` to at most `goal` parameters by removing `unit` ("neurons" or "layers"); write it to `dst`."""
    started = time.monotonic()
    family = family_of(checkpoint.read_config(src))
    body = anatomy(src, family)
    cut = _select_neurons if unit == "neurons" else _select_layers
    selected = cut(src, family, body, settings, calibration, goal, seed)
    cut_checkpoint(src, dst, family, selected)
    after = anatomy(dst, family)
    return PruneReport(
        unit=unit,
        criterion=settings.criterion if unit == "neurons" else settings.layer_criterion,
        params_before=body.params,
        params=after.params,
        goal=goal,
        layers=after.layers,
        widths=(after.width,) * after.layers,
        removed_layers=tuple(i for i in range(body.layers) if i not in selected.layers),
        seconds=time.monotonic() - started,
    )


def _select_neurons(
    src: Path, family: Family, body: Anatomy, settings: Prune, calibration: Calibration, goal: int, seed: int
) -> Cut:
    every = tuple(range(body.layers))
    width = width_for(body, goal, settings.width_multiple)
    if width == body.width:
        return Cut(every, {})
    scores = importance.neuron_scores(_stream(src, family, calibration, seed), settings.criterion, seed)
    if settings.sigma_neuron is not None:
        needed = body.width - min(importance.num_redundant(layer, settings.sigma_neuron) for layer in scores)
        needed += -needed % settings.width_multiple
        width = min(max(width, needed), body.width)
    return Cut(every, {i: importance.keep_highest(layer, width) for i, layer in enumerate(scores)})


def _select_layers(
    src: Path, family: Family, body: Anatomy, settings: Prune, calibration: Calibration, goal: int, seed: int
) -> Cut:
    count = layers_for(body, goal)
    if count == 0:
        return Cut(tuple(range(body.layers)), {})
    scores = importance.layer_scores(_stream(src, family, calibration, seed), settings.layer_criterion)
    if settings.sigma_layer is not None:
        count = min(count, importance.num_redundant(scores, settings.sigma_layer))
    kept = importance.keep_highest(scores, body.layers - count)
    return Cut(tuple(kept.tolist()), {})


def _stream(src: Path, family: Family, calibration: Calibration, seed: int) -> Stream:
    from transformers import AutoTokenizer

    return Stream(src, family, calibration_batches(calibration, AutoTokenizer.from_pretrained(src), seed))
