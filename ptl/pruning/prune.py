"""Score, select, prune, repair, save: one checkpoint in, one smaller checkpoint out."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ptl.config.run import Calibration
from ptl.config.schedule import Prune
from ptl.data.own_answers import own_answers
from ptl.data.sequences import IGNORED, Batch, calibration_batches, padded
from ptl.errors import InputError
from ptl.model import checkpoint, checks
from ptl.model.dimensions import ModelDimensions, check_unit, model_dimensions, resolve_multiple
from ptl.model.families import family_of
from ptl.model.safetensors_io import Entries
from ptl.pruning import repair
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.selection import CHOICES, SelectionTask, check_goal
from ptl.pruning.surgery import Selection, write_pruned


@dataclass(frozen=True)
class PruneReport:
    """What was pruned. Widths are FFN widths, one per layer that stays."""

    unit: str  # what was removed: "neurons", "layers", "both", "experts" or "nothing"
    criterion: str  # by which it was selected
    params_before: int
    params: int  # afterwards
    goal: int  # parameters asked for
    layers: int  # that stay
    widths: tuple[int, ...]
    experts: int | None  # that stay in each layer; None: a dense model
    removed_layers: tuple[int, ...]  # their numbers in the source
    width_multiple: int  # what widths were rounded down to
    repaired: int  # tensors changed by the closed-form repair
    sequences: int  # calibration sequences scored; 0: none were needed
    seconds: float  # wall-clock time


def prune_checkpoint(
    src: Path, dst: Path, settings: Prune, calibration: Calibration, *, unit: str, goal: int, seed: int
) -> PruneReport:
    """Prune `src` to at most `goal` parameters by removing `unit`, neurons, layers, experts or auto; write it to `dst`.

    Memory: the largest layer, embeddings and the hidden states of the calibration text, whatever the depth. Its own
    answers (calibration.answers `self`) need the whole model, and ridge repair a square of the FFN width in float32.
    `taylor` keeps the hidden states of every layer, in host memory; on a GPU it needs a layer and a batch of them.
    """
    started = time.monotonic()
    family = family_of(checkpoint.read_config(src))
    before = model_dimensions(src, family)
    check_unit(before.experts, before.narrowable, unit)
    # Otherwise nothing has to be removed: no text is read, and no layer is scored.
    selection = Selection(tuple(range(before.layers)), {})
    repaired = sequences = 0
    if goal >= before.params:
        write_pruned(src, dst, family, selection)
    else:
        check_goal(unit, before, settings, goal)
        measured = unit == "auto" or (unit == "neurons" and settings.criterion == "taylor")
        batches = _batches(src, calibration, seed, measured)
        model = LayerwiseModel(src, family, batches)
        task = SelectionTask(model, before, settings, goal, seed)
        selection = CHOICES[unit](task)
        repaired = _write_repaired(src, dst, settings, selection, model)
        sequences = model.num_sequences
    # From the files that were written, not calculated
    after = model_dimensions(dst, family)
    removed_layers = [i for i in range(before.layers) if i not in selection.layers]
    return PruneReport(
        unit=_removed_unit(selection, removed_layers),
        criterion=settings.layer_criterion if unit == "layers" else settings.criterion,
        params_before=before.params,
        params=after.params,
        goal=goal,
        layers=after.layers,
        widths=(after.width,) * after.layers,
        experts=after.experts or None,
        removed_layers=tuple(removed_layers),
        width_multiple=_multiple(before, after, settings),
        repaired=repaired,
        sequences=sequences,
        seconds=time.monotonic() - started,
    )


def _multiple(before: ModelDimensions, after: ModelDimensions, settings: Prune) -> int:
    """What widths were rounded down to; those of a mixture may be as they were."""
    if before.experts and after.width == before.width:
        return 1
    multiple, ranks = settings.width_multiple, settings.tensor_parallel
    return resolve_multiple(before.width, after.width, multiple, ranks, before.least_multiple)


def _write_repaired(
    src: Path,
    dst: Path,
    settings: Prune,
    selection: Selection,
    model: LayerwiseModel,
) -> int:
    """Write the pruned checkpoint, repaired where that is asked for; returns how many tensors the repair changed."""
    changed: Entries = {}
    with tempfile.TemporaryDirectory(prefix="ptl-repair-") as scratch:
        if selection.neurons and settings.repair == "ridge":
            changed = repair.ridge(model, selection, settings.ridge, Path(scratch, "ridge"))
        write_pruned(src, dst, model.family, selection, changed)
    return len(changed)


def _removed_unit(selection: Selection, removed_layers: list[int]) -> str:
    """What was removed, as PruneReport names it."""
    if selection.experts:
        return "experts"
    if selection.neurons:
        return "both" if removed_layers else "neurons"
    return "layers" if removed_layers else "nothing"


def _batches(
    src: Path,
    calibration: Calibration,
    seed: int,
    measured: bool,  # whether the loss is
) -> list[Batch]:
    """The calibration text. Raises InputError where its loss is to be measured and no token has one."""
    checks.check_positions(src, {"calibration.max_length": calibration.max_length})
    tokenizer = checks.load_tokenizer(src)
    if calibration.answers == "given":
        batches = calibration_batches(calibration, tokenizer, seed)
    else:
        batches = padded(own_answers(src, calibration, tokenizer, seed), calibration.batch_size)
    if measured and not any(map(_has_loss, batches)):
        raise InputError(
            f"{calibration.max_length} tokens hold the prompts and nothing of an answer, so that "
            "prune.criterion=taylor and prune.target=auto have no loss to measure",
            field="calibration.max_length",
            remedy="raise it, or set prune.criterion=max, which needs no answers",
        )
    return batches


def _has_loss(batch: Batch) -> bool:
    """Whether a token of an answer is predicted; the first token of a sequence is predicted from nothing."""
    targets = batch["labels"][:, 1:]  # [B, T - 1]
    return bool((targets != IGNORED).any())
