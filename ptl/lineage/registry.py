"""MLflow's model registry: one version for each checkpoint, and the aliases that point at versions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ptl.lineage import mlflow_client
from ptl.lineage.mlflow_client import if_there, ignoring
from ptl.lineage.mlflow_objects import existing_models, ptl_keys
from ptl.lineage.run_status import StepRun
from ptl.storage.store import Pointer

if TYPE_CHECKING:
    from mlflow import MlflowClient

VERSIONS = "mlflow.modelVersions"  # tag of a LoggedModel


def register(
    step_run: StepRun,
    registered_model: str,
    pointer: Pointer,
    tags: dict[str, Any],
) -> str:
    """The version of a checkpoint in the registry, found by the tag `ptl.model_id`, else created.

    Its tags say where its score and its items are: run, step and root of the evaluate step that registers it. The id is
    a tag because a version's own model_id is None when it is read back (MLflow 3.17).
    """
    all_tags = {
        "run": step_run.run,
        "step": step_run.step,
        "root": step_run.root,
        **tags,
        "model_id": pointer.model_id,
        "digest": pointer.digest,
        "params": pointer.params,
    }
    with mlflow_client.connected() as client:
        # The first checkpoint that is registered makes the model.
        with ignoring(mlflow_client.ALREADY_THERE):
            client.create_registered_model(registered_model)
        numbers = _versions_of(client, registered_model, pointer.model_id)
        if not numbers:
            # MLflow may have lost the LoggedModel; the version then has the tag alone.
            known = existing_models(client, [pointer.model_id])
            client.create_model_version(
                registered_model,
                source=pointer.uri,
                run_id=pointer.run_id or step_run.run_id,
                tags=ptl_keys(all_tags),
                model_id=pointer.model_id if known else None,
                await_creation_for=0,  # it is only a row in a table
            )
            numbers = _versions_of(client, registered_model, pointer.model_id)
            # A request that was sent twice has made two.
            for duplicate in numbers[1:]:
                if_there(client.delete_model_version, registered_model, duplicate)
            # MLflow's server has done it, a local database has not: the model's page shows whether it is registered.
            if known and VERSIONS not in client.get_logged_model(pointer.model_id).tags:
                version = {"name": registered_model, "version": numbers[0]}
                client.set_logged_model_tags(pointer.model_id, {VERSIONS: json.dumps([version])})
        return numbers[0]


def set_alias(registered_model: str, alias: str, version: str) -> None:
    """Point an alias at a version."""
    with mlflow_client.connected() as client:
        client.set_registered_model_alias(registered_model, alias, version)


def _versions_of(client: MlflowClient, registered_model: str, model_id: str) -> list[str]:
    """Numbers of the versions of one LoggedModel, ascending."""
    query = f"name = '{registered_model}' and tags.`ptl.model_id` = '{model_id}'"
    numbers = [str(version.version) for version in client.search_model_versions(query)]
    return sorted(numbers, key=int)
