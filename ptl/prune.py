"""Score, select, cut, repair, save: one checkpoint in, one smaller checkpoint out."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ptl import checkpoint, model_checks, repair
from ptl.anatomy import model_dimensions, resolve_multiple
from ptl.choose import CHOICES, SelectionTask
from ptl.config import Calibration, Prune
from ptl.data import IGNORED, Batch, calibration_batches, padded
from ptl.errors import InputError
from ptl.families import Family, family_of
from ptl.own_answers import own_answers
from ptl.stream import LayerwiseModel
from ptl.surgery import Selection, cut_checkpoint


@dataclass(frozen=True)
class PruneReport:
    """What a cut did. Widths are FFN widths, one per layer that stays."""

    unit: str  # what went: "neurons", "layers", "both" or "nothing"
    criterion: str
    params_before: int
    params: int
    goal: int
    layers: int
    widths: tuple[int, ...]
    removed_layers: tuple[int, ...]
    width_multiple: int  # what widths were rounded down to
    repaired: int  # tensors changed by the closed-form repair
    sequences: int  # calibration sequences scored; 0: none were needed
    seconds: float


def prune_checkpoint(
    src: Path, dst: Path, settings: Prune, calibration: Calibration, *, unit: str, goal: int, seed: int
) -> PruneReport:
    """Cut `src` to at most `goal` parameters by removing `unit` ("neurons", "layers", "auto"); write it to `dst`.

    Memory: the largest layer, embeddings and the hidden states of the calibration text, whatever the depth. Its own
    answers (calibration.answers `self`) need the whole model, ridge repair a square of the FFN width in float32, and
    `taylor` and `auto` the hidden states of every layer.
    """
    started = time.monotonic()
    family = family_of(checkpoint.read_config(src))
    repair.check(settings.repair, family)
    body = model_dimensions(src, family)
    made: list[LayerwiseModel] = []

    @functools.cache
    def stream() -> LayerwiseModel:
        batches = _batches(src, calibration, seed)
        if unit == "auto" or settings.criterion == "taylor":
            _check_answers(batches, calibration)
        made.append(LayerwiseModel(src, family, batches))
        return made[0]

    selected = CHOICES[unit](SelectionTask(body, settings, goal, seed, stream))
    repaired = _cut(src, dst, family, settings, selected, made)
    after = model_dimensions(dst, family)
    removed = tuple(i for i in range(body.layers) if i not in selected.layers)
    return PruneReport(
        unit=_unit(removed, selected),
        criterion=settings.layer_criterion if unit == "layers" else settings.criterion,
        params_before=body.params,
        params=after.params,
        goal=goal,
        layers=after.layers,
        widths=(after.width,) * after.layers,
        removed_layers=removed,
        width_multiple=resolve_multiple(body.width, settings.width_multiple, settings.tensor_parallel),
        repaired=repaired,
        sequences=sum(len(batch["input_ids"]) for batch in made[0].batches) if made else 0,
        seconds=time.monotonic() - started,
    )


def _cut(src: Path, dst: Path, family: Family, settings: Prune, selected: Selection, made: list[LayerwiseModel]) -> int:
    """Write the cut checkpoint, repaired where that is asked for; returns how many tensors the repair changed."""
    changed: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="ptl-repair-") as scratch:
        if selected.neurons and settings.repair in ("ridge", "both"):
            changed = repair.ridge(made[0], selected, settings.ridge, Path(scratch, "ridge"))
        if made and settings.repair in ("magnitude", "both"):
            changed = repair.magnitude(made[0], selected, changed, Path(scratch, "magnitude"))
        cut_checkpoint(src, dst, family, selected, changed)
    return len(changed)


def _unit(removed: tuple[int, ...], selected: Selection) -> str:
    names = {(True, True): "both", (True, False): "layers", (False, True): "neurons", (False, False): "nothing"}
    return names[bool(removed), bool(selected.neurons)]


def _batches(src: Path, calibration: Calibration, seed: int) -> list[Batch]:
    model_checks.check_positions(src, {"calibration.max_length": calibration.max_length})
    tokenizer = model_checks.load_tokenizer(src)
    if calibration.answers == "given":
        return calibration_batches(calibration, tokenizer, seed)
    return padded(own_answers(src, calibration, tokenizer, seed), calibration.batch_size)


def _check_answers(batches: list[Batch], calibration: Calibration) -> None:
    """Raise InputError where there is no loss to measure: it is that of the answers' tokens."""
    if all(bool((batch["labels"][:, 1:] == IGNORED).all()) for batch in batches):
        raise InputError(
            f"calibration.max_length: {calibration.max_length} tokens hold the prompts and nothing of an answer, so "
            "that prune.criterion=taylor and prune.target=auto have no loss to measure; raise it"
        )
