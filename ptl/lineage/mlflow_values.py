"""Parameters, metrics and tags of MLflow runs under our names; what a run has already is not logged again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LONGEST = 6000  # characters of a parameter

Tags = dict[str, str]
Values = dict[str, Any]  # parameters or tags, by their name without `ptl.`
Metrics = dict[str, float]


def ptl_keys(values: Values) -> Tags:
    """Parameters or tags as MLflow keeps ours: `ptl.<name>`, as text."""
    return {f"ptl.{key}": str(value) for key, value in values.items()}


def set_tags(client: MlflowClient, run_id: str, tags: Tags) -> None:
    """Set tags that have their full names."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def add_params(client: MlflowClient, run: Run, params: Values) -> None:
    """Give a run the parameters `ptl.<name>` that it has not yet: MLflow never changes one."""
    from mlflow.entities import Param

    known = run.data.params
    new = [Param(key, text[:LONGEST]) for key, text in ptl_keys(params).items() if key not in known]
    client.log_batch(run.info.run_id, params=new)


def add_metrics(
    client: MlflowClient,
    run: Run,
    metrics: Metrics,
    step: int = 0,
    model_id: str | None = None,
) -> None:
    """Log the metrics whose newest value is another; of a run as it was read."""
    # Logging a value twice would draw a second point.
    known = run.data.metrics
    changed = {key: value for key, value in metrics.items() if known.get(key) != float(value)}
    log_metrics(client, run.info.run_id, changed, step, model_id)


def log_metrics(
    client: MlflowClient,
    run_id: str,
    metrics: Metrics,
    step: int,
    model_id: str | None = None,
) -> None:
    """Metrics of a run at the x-coordinate `step`; with `model_id` also of a LoggedModel."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)  # milliseconds
    # One request for all of them.
    points = [Metric(key, float(value), now, step, model_id=model_id) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=points)
