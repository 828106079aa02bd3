"""Trackers to which a training can log beside MLflow: the names of transformers' integrations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

# Those whose module has that name too.
Tracker = Literal["wandb", "tensorboard", "trackio", "comet_ml", "clearml", "swanlab"]


def _one_needs_no_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_one_needs_no_list)]
