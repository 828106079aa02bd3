"""Experiments, runs, models, versions and values in MLflow: each is created once; one that MLflow has lost is missed.

MLflow's client sends a request again whose answer was lost; the server has then created two. So whoever has created
something searches for it again and settles on one of the results. A database that was lost or restored from an older
copy knows nothing of what the store holds: then runs are created anew, and models are left out of the lineage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError
from ptl.lineage.mlflow_client import ALREADY_THERE, connected, if_there, ignoring
from ptl.lineage.run_status import PARENT, StepRun, records_root, search
from ptl.storage import local_files, store
from ptl.storage.store import Pointer

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

LONGEST = 6000  # characters of a parameter
VERSIONS = "mlflow.modelVersions"  # tag of a LoggedModel
REGISTERED_MODEL = (  # the description of a registered model, in Markdown
    "Checkpoints of Prune-Tune Loop runs: a version for each that an evaluation has accepted, for the control, and for "
    "each export. The aliases `not-inferior`, `unclear` and `inferior` are at the final model of the newest run with "
    "that verdict. `ptl fetch models:/NAME/VERSION DIR` copies one."
)

Tags = dict[str, str]
Values = dict[str, Any]  # parameters or tags, by their name without `ptl.`
Metrics = dict[str, float]


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
    if artifact_location and artifact_location.startswith("file:"):
        check_home(existing, local_files.path_of(artifact_location))
    return existing


def check_home(existing: Experiment, artifacts: Path | None = None) -> None:
    """Raise InputError where the folder of local runs was moved or copied: its database names the old folder's files.

    MLflow would send new checkpoints there, and deleting would delete what the original still needs. `artifacts` is the
    folder's own; by default `artifacts` beside MLflow's database, where there is one.
    """
    location = str(existing.artifact_location)
    database = Path(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///"))
    if artifacts is None:
        artifacts = database.with_name("artifacts")
        if not artifacts.is_dir():
            return
    is_its_own = database == artifacts.with_name("mlflow.db")
    if not is_its_own or not location.startswith("file:"):
        return
    # By another name it may be the same folder.
    if not local_files.path_of(location).resolve().is_relative_to(artifacts.resolve()):
        raise InputError(
            f"{artifacts.parent} was moved or copied: what its runs have made is known as {location}",
            field="--home",
            remedy="move it back, make a link there that leads here, or give another folder",
        )


def run(client: MlflowClient, experiment: Experiment, tags: Tags, name: str) -> Run:
    """The MLflow run of a step, or without a tag `ptl.step` of the pipeline run; created where there is none.

    Of several, which concurrent steps or lost answers leave, the one that is claimed first in the store is everybody's;
    others are deleted if they hold nothing.
    """
    experiment_id = experiment.experiment_id
    step = tags.get("ptl.step")
    where = f"tags.`ptl.step` = '{step}'" if step else PARENT
    candidates = search(client, [experiment_id], tags["ptl.run"], where)
    if not candidates:
        created = client.create_run(experiment_id, tags=tags, run_name=name)
        # The answer to an earlier request may have been lost, and other steps create the parent too.
        candidates = search(client, [experiment_id], tags["ptl.run"], where) or [created]
    winner = _claimed(client, experiment, tags["ptl.run"], step or "parent", candidates[0])
    # An empty double only confuses; one with content may be somebody's.
    for other in candidates:
        run_id = other.info.run_id
        if run_id != winner.info.run_id and not _holds_anything(client, other):
            if_there(client.delete_run, run_id)
    return winner


def _claimed(
    client: MlflowClient, experiment: Experiment, pipeline_run: str, role: str, oldest: Run
) -> Run:
    """The run that is claimed in the store; `oldest` where none is."""
    root = records_root(experiment.artifact_location)
    claim = f"{role}-{experiment.experiment_id}"
    run_id = store.claim(root, pipeline_run, claim, oldest.info.run_id)
    winner: Run | None = if_there(client.get_run, run_id)
    while winner is None or winner.info.lifecycle_stage != "active":
        # MLflow has lost what was claimed: the next claim is among what there is now.
        run_id = store.claim(root, pipeline_run, f"{claim}-after-{run_id}", oldest.info.run_id)
        winner = if_there(client.get_run, run_id)
    return winner


def _holds_anything(client: MlflowClient, other: Run) -> bool:
    """Whether a run has metrics, parameters or runs below it."""
    query = f"tags.`mlflow.parentRunId` = '{other.info.run_id}'"
    children = client.search_runs([other.info.experiment_id], query, max_results=1)
    return bool(other.data.metrics or other.data.params or children)


def existing_models(client: MlflowClient, model_ids: Iterable[str]) -> set[str]:
    """Those of the LoggedModels that MLflow has."""
    # A pointer that was made by hand names none.
    return {
        model_id
        for model_id in model_ids
        if model_id and if_there(client.get_logged_model, model_id)
    }


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
    client: MlflowClient, run: Run, metrics: Metrics, step: int = 0, model_id: str | None = None
) -> None:
    """Log the metrics whose newest value is another; of a run as it was read."""
    # Logging a value twice would draw a second point.
    known = run.data.metrics
    changed = {key: value for key, value in metrics.items() if known.get(key) != float(value)}
    log_metrics(client, run.info.run_id, changed, step, model_id)


def log_metrics(
    client: MlflowClient, run_id: str, metrics: Metrics, step: int, model_id: str | None = None
) -> None:
    """Metrics of a run at the x-coordinate `step`; with `model_id` also of a LoggedModel."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)  # milliseconds
    # One request for all of them.
    points = [
        Metric(key, float(value), now, step, model_id=model_id) for key, value in metrics.items()
    ]
    client.log_batch(run_id, metrics=points)


def register(
    step_run: StepRun, registered_model: str, pointer: Pointer, tags: dict[str, Any]
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
    with connected() as client:
        # The first checkpoint that is registered makes the model.
        with ignoring(ALREADY_THERE):
            client.create_registered_model(registered_model, description=REGISTERED_MODEL)
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
                description=_version_description(all_tags),
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


def _version_description(tags: dict[str, Any]) -> str:
    """What a version is, for its page: the step that has registered it, its size and its score, if it has one."""
    if "export" in tags:
        kind = f"Export {tags['export']} of version {tags['parent_version']}"
    else:
        kind = f"Checkpoint that {tags['step']} has registered"
    size = f"{tags['params']:,} parameters"
    if "share_removed" in tags:
        size += f", {float(tags['share_removed']):.1%} of the dense model's removed"
    score = (
        f" {tags['task']}: {tags['accuracy']} on {tags['items']:,} items."
        if "accuracy" in tags
        else ""
    )
    return f"{kind} in run {tags['run']}: {size}.{score}"


def set_alias(registered_model: str, alias: str, version: str) -> None:
    """Point an alias at a version."""
    with connected() as client:
        client.set_registered_model_alias(registered_model, alias, version)


def _versions_of(client: MlflowClient, registered_model: str, model_id: str) -> list[str]:
    """Numbers of the versions of one LoggedModel, ascending."""
    query = f"name = '{registered_model}' and tags.`ptl.model_id` = '{model_id}'"
    numbers = [str(version.version) for version in client.search_model_versions(query)]
    return sorted(numbers, key=int)
