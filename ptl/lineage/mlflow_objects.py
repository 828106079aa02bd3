"""Experiments, runs and models in MLflow: each is created once, and one that MLflow has lost is missed.

MLflow's client sends a request again whose answer was lost; the server has then created two. So whoever has created
something searches for it again and settles on one of the results. A database that was lost or restored from an older
copy knows nothing of what the store holds: then runs are created anew, and models are left out of the lineage.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError
from ptl.lineage.mlflow_client import ALREADY_THERE, if_there, ignoring
from ptl.lineage.run_status import records_root
from ptl.storage import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel, Run


def experiment(client: MlflowClient, name: str, artifact_location: str | None = None) -> Experiment:
    """The experiment of this name, created where there is none. Raises InputError for one that was deleted."""
    existing = client.get_experiment_by_name(name)
    if existing is None:
        # Another step may be faster, or the answer to our request is lost.
        with ignoring(ALREADY_THERE):
            client.create_experiment(name, artifact_location)
        existing = client.get_experiment_by_name(name)
    if existing is None or existing.lifecycle_stage != "active":
        raise InputError(
            f"{name!r} was deleted in MLflow",
            field="storage.experiment",
            remedy="restore it there or choose another name",
        )
    return existing


def run(
    client: MlflowClient,
    experiment: Experiment,
    pipeline_run: str,
    step: str,
    tags: dict[str, str],
    name: str,
) -> Run:
    """The MLflow run of a step, or of the pipeline run where `step` is empty; created with `tags` where there is none.

    Of several, which concurrent steps or lost answers leave, the one that is claimed first in the store is everybody's;
    others are deleted if they hold nothing.
    """
    experiment_id = experiment.experiment_id
    candidates = search(client, [experiment_id], pipeline_run, step)
    if not candidates:
        all_tags = {**tags, "ptl.role": "step" if step else "parent"}
        created = client.create_run(experiment_id, tags=all_tags, run_name=name)
        # The answer to an earlier request may have been lost, and other steps create the parent too.
        candidates = search(client, [experiment_id], pipeline_run, step) or [created]
    winner = _claimed(client, experiment, pipeline_run, step or "parent", candidates[0])
    # An empty double only confuses; one with content may be somebody's.
    for other in candidates:
        run_id = other.info.run_id
        if run_id != winner.info.run_id and not _holds_anything(client, other):
            if_there(client.delete_run, run_id)
    return winner


def _claimed(
    client: MlflowClient,
    experiment: Experiment,
    pipeline_run: str,
    role: str,
    oldest: Run,
) -> Run:
    """The run that is claimed in the store; `oldest` where none is."""
    root = records_root(experiment.artifact_location)
    claim = f"{role}-{experiment.experiment_id}"
    while True:
        run_id = store.claim(root, pipeline_run, claim, oldest.info.run_id)
        winner: Run | None = if_there(client.get_run, run_id)
        if winner and winner.info.lifecycle_stage == "active":
            return winner
        # MLflow has lost what was claimed: the next claim is among what there is now.
        claim = f"{role}-{experiment.experiment_id}-after-{run_id}"


def search(client: MlflowClient, experiment_ids: list[str], pipeline_run: str, step: str) -> list[Run]:
    """The active runs of a step, or of the pipeline run where `step` is empty, the oldest first."""
    role = f"tags.`ptl.step` = '{step}'" if step else "tags.`ptl.role` = 'parent'"
    query = f"tags.`ptl.run` = '{pipeline_run}' and {role}"
    order = ["attributes.start_time ASC"]
    return list(client.search_runs(experiment_ids, query, order_by=order, max_results=100))


def logged_model(
    client: MlflowClient,
    experiment_id: str,
    tags: dict[str, str],
    **fields: Any,
) -> LoggedModel:
    """A new LoggedModel; `fields` are those of MLflow's `create_logged_model`."""
    mark = uuid.uuid4().hex
    all_tags = {**tags, "ptl.created": mark}
    created = client.create_logged_model(experiment_id, tags=all_tags, **fields)
    # A request that was sent twice has made two.
    query = f"tags.`ptl.created` = '{mark}'"
    for model in client.search_logged_models([experiment_id], query):
        if model.model_id != created.model_id:
            if_there(client.delete_logged_model, model.model_id)
    return created


def existing_models(client: MlflowClient, model_ids: Iterable[str]) -> set[str]:
    """Those of the LoggedModels that MLflow has."""
    return {model_id for model_id in model_ids if if_there(client.get_logged_model, model_id)}


def log_output(client: MlflowClient, run_id: str, model_id: str, step: int) -> None:
    """Make a LoggedModel the output of a run, unless it is one already: MLflow refuses the second time."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    if _is_output(client, run_id, model_id):
        return
    try:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
    except MlflowException:
        # The answer to our first request may have been lost.
        if not _is_output(client, run_id, model_id):
            raise


def _is_output(client: MlflowClient, run_id: str, model_id: str) -> bool:
    outputs = client.get_run(run_id).outputs
    return outputs is not None and model_id in [model.model_id for model in outputs.model_outputs]


def _holds_anything(client: MlflowClient, other: Run) -> bool:
    """Whether a run has metrics, parameters or runs below it."""
    query = f"tags.`mlflow.parentRunId` = '{other.info.run_id}'"
    children = client.search_runs([other.info.experiment_id], query, max_results=1)
    return bool(other.data.metrics or other.data.params or children)
