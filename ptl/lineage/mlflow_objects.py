"""Experiments, runs and models in MLflow: each is created once, and one that MLflow has lost is missed.

MLflow's client sends a request again whose answer was lost; the server has then created two. So whoever has created
something searches for it again and settles on one of the results. A database that was lost or restored from an older
copy knows nothing of what the store holds: then runs are created anew, and models are left out of the lineage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ptl.errors import InputError
from ptl.lineage.mlflow_client import ALREADY_THERE, if_there, ignoring
from ptl.lineage.run_status import PARENT, records_root, search
from ptl.storage import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run


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
    where = f"tags.`ptl.step` = '{step}'" if step else PARENT
    candidates = search(client, [experiment_id], pipeline_run, where)
    if not candidates:
        created = client.create_run(experiment_id, tags=tags, run_name=name)
        # The answer to an earlier request may have been lost, and other steps create the parent too.
        candidates = search(client, [experiment_id], pipeline_run, where) or [created]
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


def _holds_anything(client: MlflowClient, other: Run) -> bool:
    """Whether a run has metrics, parameters or runs below it."""
    query = f"tags.`mlflow.parentRunId` = '{other.info.run_id}'"
    children = client.search_runs([other.info.experiment_id], query, max_results=1)
    return bool(other.data.metrics or other.data.params or children)


def existing_models(client: MlflowClient, model_ids: Iterable[str]) -> set[str]:
    """Those of the LoggedModels that MLflow has."""
    return {model_id for model_id in model_ids if if_there(client.get_logged_model, model_id)}


def log_output(client: MlflowClient, run_id: str, model_id: str, step: int) -> None:
    """Make a LoggedModel the output of a run, unless it is one already: MLflow refuses the second time."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    try:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
    except MlflowException:
        # Logged by an earlier attempt, or by a request whose answer was lost.
        outputs = client.get_run(run_id).outputs
        if outputs is None or model_id not in [model.model_id for model in outputs.model_outputs]:
            raise
