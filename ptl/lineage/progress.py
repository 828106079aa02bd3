"""How far a run is, from the steps' own MLflow runs: read by whoever watches it from outside; no torch, no kfp.

A pod that is killed cannot end its MLflow run, nor can a step that never started. Whoever sees that the pipeline run
has ended therefore closes what is still RUNNING.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ptl.lineage import mlflow_client
from ptl.lineage.run_status import PARENT, TAG, by_step, parent_among, put_tag, search

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# A watcher asks again soon: MLflow's own retries take minutes, and its timeout is two.
WATCHING = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
MAX_EARLIER = 20  # unfinished runs to take over from: each step asks for a record of each of them
TAKEN_OVER = "steps with the same inputs and settings may be taken over from"


@dataclass(frozen=True)
class StepProgress:
    """What one step's MLflow run says of it, as texts; empty where it says nothing."""

    step: str = ""  # name, such as prune-2
    run_id: str = ""  # in MLflow
    status: str = ""  # RUNNING, FINISHED, FAILED or KILLED
    ended: datetime | None = None
    attempt: str = ""  # number of the newest attempt, from 1
    seconds: str = ""  # of work, when it has ended
    accuracy: str = ""  # of an evaluate step, 0 to 1
    verdict: str = ""  # of an evaluate step
    training: str = ""  # `51,200 of 500,000 tokens, loss 0.457`, while it trains
    error: str = ""  # why the last attempt failed
    loop_ended: str = ""  # why the loop ended with this step, before its last iteration


@dataclass(frozen=True)
class RunProgress:
    """A pipeline run in MLflow: its parent run and the steps that have begun."""

    experiment_id: str
    parent_id: str
    parent_status: str  # as of a step
    steps: dict[str, StepProgress]


def read(run: str, experiment_ids: list[str] | None = None) -> RunProgress | None:
    """The progress of a pipeline run by its id; None where MLflow has no parent run of it.

    One request with `experiment_ids`; without, all experiments are searched, for which they are listed first.
    Raises InputError when MLFLOW_TRACKING_URI is not set, WorkError when MLflow does not answer.
    """
    with _watching() as client:
        if experiment_ids is None:
            experiment_ids = mlflow_client.experiment_ids(client)
        runs = search(client, experiment_ids, run)
    parent = parent_among(runs)
    if parent is None:
        return None
    steps = {step: _step_progress(step, entry) for step, entry in by_step(runs).items()}
    return RunProgress(parent.info.experiment_id, parent.info.run_id, parent.info.status, steps)


def close(progress: RunProgress, status: str, reason: str, reasons: dict[str, str]) -> bool:
    """End what is still RUNNING of a pipeline run that has ended; returns whether there was anything.

    `status` is FAILED, KILLED or FINISHED. `reasons` are those of single steps, `reason` that of the parent and of all
    others; they become the tag `ptl.error`. Raises WorkError when MLflow does not answer.
    """
    errors = {}  # by the id of the MLflow run
    for step in progress.steps.values():
        if step.status == "RUNNING":
            errors[step.run_id] = reasons.get(step.step) or reason
    if progress.parent_status == "RUNNING":
        errors[progress.parent_id] = reason
    with _watching() as client:
        for run_id, error in errors.items():
            if status != "FINISHED":
                client.set_tag(run_id, "ptl.error", error[:TAG])
            client.set_terminated(run_id, status)
    return bool(errors)


def reopen(progress: RunProgress) -> None:
    """Set the parent to RUNNING again, without its error: the pipeline run is retried. Steps reopen their own runs."""
    with _watching() as client:
        client.update_run(progress.parent_id, status="RUNNING")
        put_tag(client, progress.parent_id, "ptl.error", "")


def unfinished(experiment: str, name: str) -> list[str]:
    """Ids of the unfinished pipeline runs of a config of this name in an experiment, the newest first."""
    query = f"{PARENT} and attributes.status != 'FINISHED' and attributes.run_name LIKE '{name}-%'"
    order = ["attributes.start_time DESC"]
    with _watching() as client:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return []
        runs = client.search_runs([found.experiment_id], query, order_by=order, max_results=100)
    # The query also fits a longer name; those of runs end with their time and four digits.
    ours = [run for run in runs if re.fullmatch(rf"{re.escape(name)}-\d+-\d+-[0-9a-f]+", run.info.run_name)]
    return [run.data.tags["ptl.run"] for run in ours[:MAX_EARLIER]]


def _step_progress(step: str, run: Run) -> StepProgress:
    tags, metrics = run.data.tags, run.data.metrics
    is_running = run.info.status == "RUNNING"
    ended = run.info.end_time  # milliseconds
    return StepProgress(
        step=step,
        run_id=run.info.run_id,
        status=run.info.status,
        ended=datetime.fromtimestamp(ended / 1000, UTC) if ended else None,
        seconds="" if is_running else _text(metrics, "seconds", ".0f"),
        accuracy=_text(metrics, "accuracy", ".3f"),
        training=_training(tags, metrics) if is_running else "",
        **{name: tags.get(f"ptl.{name}", "") for name in ("attempt", "verdict", "error", "loop_ended")},
    )


def _training(tags: dict[str, str], metrics: dict[str, float]) -> str:
    seen = _text(metrics, "train/num_input_tokens_seen", ",.0f")
    planned = f" of {int(tags['ptl.tokens']):,}" if "ptl.tokens" in tags else ""
    loss = _text(metrics, "train/loss", ".3f")
    text = f"{seen}{planned} tokens" if seen else ""
    return f"{text}, loss {loss}" if text and loss else text


def _text(metrics: dict[str, float], name: str, form: str) -> str:
    return format(metrics[name], form) if name in metrics else ""


@contextmanager
def _watching() -> Iterator[MlflowClient]:
    """A client with few retries and a short timeout, unless the environment says otherwise."""
    with mlflow_client.briefly(WATCHING), mlflow_client.connected() as client:
        yield client
