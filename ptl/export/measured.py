"""A form for another runtime of the final and of the dense model: written, scored on the run's tasks, and timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptl.config.export import Export
from ptl.config.run import Calibration, Evaluate
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.paired import Item
from ptl.export.formats import FORMATS

WEIGHTS = (".safetensors", ".gguf")  # files that count as a model's size, as in its evaluation


@dataclass(frozen=True)
class ExportReport:
    """What was measured of a form."""

    models: dict[str, dict[str, Any]]  # by name, dense and final: bytes of weights, and tasks as in scores.json
    speed: dict[str, Any]  # of Format.speed; {"reason": ...} where it was not measured
    notes: list[str]  # for the user, on the final model's form


def limited(settings: Evaluate, limit: int | None) -> Evaluate:
    """The evaluation of no more than `limit` items of each benchmark, the first of those that the run scores."""
    if limit is None:
        return settings
    tasks = tuple(task.model_copy(update={"limit": min(task.limit or limit, limit)}) for task in settings.tasks)
    return settings.model_copy(update={"tasks": tasks})


def write_and_score(
    folders: Mapping[str, Path],  # checkpoints by name, `final` and perhaps `dense`
    made: Mapping[str, Path],  # where the form of each is written
    form: Export,
    calibration: Calibration,
    settings: Evaluate,
    seed: int,
) -> tuple[ExportReport, dict[str, list[Item]]]:
    """Write the form of each checkpoint and score it on all tasks, as `form` says; also returns the items of each."""
    format_ = FORMATS[form.format]
    models = {}
    items = {}
    notes: list[str] = []
    # Before hours of work on the first of them
    for src in folders.values():
        format_.check(src, form.type)
    scored = limited(settings, form.limit)
    for name, src in folders.items():
        made[name].mkdir(parents=True, exist_ok=True)
        notes = format_.write(src, made[name], form.type, calibration, seed)
        tasks, items[name] = score_tasks(format_.language_model(made[name], src, scored, seed), scored, seed)
        models[name] = {
            "bytes": sum(path.stat().st_size for path in made[name].iterdir() if path.suffix in WEIGHTS),
            "tasks": [asdict(task) for task in tasks],
        }
    speed = format_.speed(folders, made, settings, seed)
    # Those of the last one, the final model.
    return ExportReport(models, speed, notes), items
