"""The forms of a checkpoint for other runtimes, behind one interface. FORMATS is where another runtime is added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.config.export import Export
from ptl.config.run import Calibration, Evaluate

Folders = Mapping[str, Path]  # of the dense and the final model, by name


@dataclass(frozen=True)
class Format:
    """What a form needs: each function takes the type of the weights where that matters."""

    # (checkpoint, type): raises InputError for what cannot be made, before anything expensive
    check: Callable[[Path, str], None]
    # (checkpoint, empty folder to fill, type, calibration, seed) -> notes for the user
    write: Callable[[Path, Path, str, Calibration, int], list[str]]
    # (folder, settings): a model of the harness, as language_models.language_model gives it
    language_model: Callable[[Path, Evaluate], Any]
    # (checkpoints, their forms, settings, seed): `models` as in speed.measure_speed, and the `setting` in a sentence;
    # or the `reason` why it was not measured
    speed: Callable[[Folders, Folders, Evaluate, int], dict[str, Any]]


FORMATS: dict[str, Format] = {}


def check_exports(src: Path, forms: Iterable[Export]) -> None:
    """Raise InputError for the first form that cannot be made of a checkpoint, without writing any."""
    for form in forms:
        FORMATS[form.format].check(src, form.type)
