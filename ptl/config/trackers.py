"""Trackers to which a training can log beside MLflow: the names of transformers' integrations."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ptl.errors import InputError

# Those whose module has that name too.
Tracker = Literal["wandb", "tensorboard", "trackio", "comet_ml", "clearml", "swanlab"]


def _one_needs_no_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_one_needs_no_list)]


def missing(trackers: Iterable[str]) -> list[str]:
    """The trackers whose package is not installed here."""
    # transformers' integration takes the smaller package too.
    smaller = {"tensorboard": "tensorboardX"}
    return [name for name in trackers if not (find_spec(name) or find_spec(smaller.get(name, name)))]


def check(trackers: Iterable[str]) -> None:
    """Raise InputError where the package of a tracker is missing; called where recover runs."""
    for name in missing(trackers):
        raise InputError(
            f"the package {name} is not installed",
            field="recover.report_to",
            remedy=f"install it where recover runs (pip install {name}; on a cluster in an image of your own, "
            "docs/install.md), or leave it out: MLflow has the same curves",
        )
