"""Experiments, runs, models and versions in MLflow: each is created once, and one that MLflow has lost is missed.

MLflow's client sends a request again whose answer was lost; the server has then created two. So whoever has created
something looks for it again and settles on one of what there is. A database that was lost or restored from an older
copy knows nothing of what the store holds: then runs are created anew, and models are left out of the lineage.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ptl import store
from ptl.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

GONE = "RESOURCE_DOES_NOT_EXIST"


def experiment(client: MlflowClient, name: str, artifact_location: str | None = None) -> Any:
    """The experiment of this name, created where there is none. Raises InputError for one that was deleted."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            client.create_experiment(name, artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another step, or by us: the answer was lost
                raise
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise InputError(f"storage.experiment: {name!r} was deleted in MLflow; restore it there or choose another name")
    return found


def run(
    client: MlflowClient, experiment_id: str, root: str, pipeline_run: str, step: str, tags: dict[str, str], name: str
) -> Run:
    """The MLflow run of a step, or of the pipeline run where `step` is empty; created with `tags` where there is none.

    Of several, which concurrent steps or lost answers leave, the one that is claimed first in the store is everybody's;
    others are deleted if they hold nothing.
    """
    found = search(client, experiment_id, pipeline_run, step)
    if not found:
        role = "step" if step else "parent"
        created = client.create_run(experiment_id, tags={**tags, "ptl.role": role}, run_name=name)
        found = search(client, experiment_id, pipeline_run, step) or [created]
    claim = f"{step or 'parent'}-{experiment_id}"
    winner = _active(client, own := store.claim(root, pipeline_run, claim, found[0].info.run_id))
    while winner is None:  # MLflow has lost what was claimed: the next claim is among what there is now
        own = store.claim(root, pipeline_run, f"{claim}-after-{own}", found[0].info.run_id)
        winner = _active(client, own)
    for other in found:
        if other.info.run_id != winner.info.run_id and not _holds_anything(client, other):
            _get(client.delete_run, other.info.run_id)
    return winner


def search(client: MlflowClient, experiment_id: str, pipeline_run: str, step: str) -> list[Run]:
    """The active runs of a step, or of the pipeline run where `step` is empty, the oldest first."""
    role = f"tags.`ptl.step` = '{step}'" if step else "tags.`ptl.role` = 'parent'"
    where = f"tags.`ptl.run` = '{pipeline_run}' and {role}"
    return list(client.search_runs([experiment_id], where, order_by=["attributes.start_time ASC"], max_results=100))


def logged_model(client: MlflowClient, experiment_id: str, tags: dict[str, str], **fields: Any) -> LoggedModel:
    """A new LoggedModel; `fields` are those of MLflow's `create_logged_model`."""
    mark = uuid.uuid4().hex
    created = client.create_logged_model(experiment_id, tags={**tags, "ptl.created": mark}, **fields)
    found = client.search_logged_models([experiment_id], f"tags.`ptl.created` = '{mark}'")
    for other in found:
        if other.model_id != created.model_id:
            _get(client.delete_logged_model, other.model_id)
    return created


def existing_models(client: MlflowClient, model_ids: list[str]) -> list[str]:
    """Those of the LoggedModels that MLflow has, in the same order, each once."""
    return [each for each in dict.fromkeys(filter(None, model_ids)) if _get(client.get_logged_model, each) is not None]


def log_output(client: MlflowClient, run_id: str, model_id: str, step: int) -> None:
    """Make a LoggedModel the output of a run, unless it is; MLflow refuses to be told twice."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    def known() -> bool:
        outputs = client.get_run(run_id).outputs
        return outputs is not None and model_id in {model.model_id for model in outputs.model_outputs}

    if known():
        return
    try:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
    except MlflowException:
        if not known():  # else the answer to our first request was lost
            raise


def version(client: MlflowClient, registered_model: str, model_id: str, **fields: Any) -> str:
    """The version of a checkpoint in the registry, found by the tag `ptl.model_id`, else created.

    `fields` are those of MLflow's `create_model_version`; a version's own model_id is None when it is read back
    (MLflow 3.17), hence the tag.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(registered_model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

    def found() -> list[str]:
        same = f"name = '{registered_model}' and tags.`ptl.model_id` = '{model_id}'"
        return sorted((str(each.version) for each in client.search_model_versions(same)), key=int)

    numbers = found()
    if not numbers:
        known = existing_models(client, [model_id])
        client.create_model_version(
            registered_model, model_id=known[0] if known else None, await_creation_for=0, **fields
        )
        numbers = found()
        for other in numbers[1:]:
            _get(functools.partial(client.delete_model_version, registered_model), other)
    _mark_registered(client, registered_model, numbers[0], model_id)
    return numbers[0]


def _mark_registered(client: MlflowClient, registered_model: str, version: str, model_id: str) -> None:
    """What MLflow's server adds to a LoggedModel that gets a version, and a local database does not.

    Without it the page of the model says that it is not registered.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    model = _get(client.get_logged_model, model_id) if model_id else None
    if model is None:  # the database was replaced, or the model deleted: then no page says so
        return
    known = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    if (registered_model, version) not in {(each["name"], str(each["version"])) for each in known}:
        added = [*known, {"name": registered_model, "version": version}]
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(added)})


def _active(client: MlflowClient, run_id: str) -> Run | None:
    """A run, unless it was deleted or is unknown to MLflow."""
    found = _get(client.get_run, run_id)
    return found if found is not None and found.info.lifecycle_stage == "active" else None


def _get(get: Callable[[str], Any], identity: str) -> Any:
    """What MLflow answers about this id; None where it has nothing, as after a deletion whose answer was lost."""
    from mlflow.exceptions import MlflowException

    try:
        return get(identity)
    except MlflowException as error:
        if error.error_code != GONE:
            raise
        return None


def _holds_anything(client: MlflowClient, other: Run) -> bool:
    """Whether a run has metrics, parameters or runs below it."""
    if other.data.metrics or other.data.params:
        return True
    below = f"tags.`mlflow.parentRunId` = '{other.info.run_id}'"
    return bool(client.search_runs([other.info.experiment_id], below, max_results=1))
