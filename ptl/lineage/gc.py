"""Checkpoints that nobody needs any more, and deleting them. Records, scores and MLflow's runs stay.

A run's files can go when they are neither its final checkpoints nor registered, when the run is finished or its user
gives it up, and when they are old enough. A finished rehearsal has no final checkpoints: all of its files can go.
Whose they are is MLflow's word: what a record names is only ever kept.
"""

from __future__ import annotations

import datetime
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ptl.config.rehearsal import is_rehearsal
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client, mlflow_objects
from ptl.lineage.mlflow_client import pages
from ptl.lineage.run_status import PARENT, records_root
from ptl.storage import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel

Folder = tuple[int, float]  # bytes and the unix time of the newest file, of all files below it
DAY = 24 * 60 * 60.0
DELETED = "ptl.deleted"  # tag of a LoggedModel: when its files were deleted
# Steps whose files stay with a finished run, and why
KEPT = {"report": "final checkpoint of its run", "export": "an export of its run"}
# folder of a training checkpoint, or of its record
TRAINING = re.compile(r"(?P<step>.+)\.\d+\.training-.+")


@dataclass(frozen=True)
class StoredFiles:
    """Files in the store that belong together: a checkpoint, or the training checkpoints of a step."""

    run: str  # id of the pipeline run
    step: str  # name, such as prune-2
    uris: tuple[str, ...]  # their folders
    bytes: int
    changed: float  # unix time of the newest file
    model_id: str = ""  # MLflow LoggedModel
    needed: str = ""  # why they stay; empty where they can go


@dataclass(frozen=True)
class ExperimentFiles:
    """What an experiment's runs keep in the store."""

    name: str
    location: str  # MLflow's artifact location: nothing outside of it is deleted
    stored: list[StoredFiles]


def inventory(names: list[str], given_up: list[str], older_than: float) -> list[ExperimentFiles]:
    """The files of experiments, of all that hold runs of the pipeline where no name is given.

    `given_up` are ids of pipeline runs whose checkpoints may go although they can be resumed: then only their files are
    listed. `older_than` is in days since the newest file was written. Raises InputError for an unknown experiment, and
    in a copy of a folder of local runs, whose database names the original's files.
    """
    with mlflow_client.connected() as client:
        known = {experiment.name: experiment for experiment in pages(client.search_experiments)}
        for name in names:
            if name not in known:
                existing = ", ".join(sorted(known)) or "none"
                raise InputError(
                    f"MLflow has no {name!r}", field="--experiment", remedy=f"it has {existing}"
                )
        chosen = [known[name] for name in sorted(set(names) or known)]
        for experiment in chosen:
            mlflow_objects.check_home(experiment)
        experiments = [
            _experiment_files(client, experiment, given_up, older_than) for experiment in chosen
        ]
    return [experiment for experiment in experiments if experiment.stored]


def _experiment_files(
    client: MlflowClient, experiment: Experiment, given_up: list[str], older_than: float
) -> ExperimentFiles:
    """The files of an experiment's runs; those that are needed say why."""
    location = experiment.artifact_location.rstrip("/")
    root = records_root(location)
    ids = [experiment.experiment_id]
    parents = pages(client.search_runs, experiment_ids=ids, filter_string=PARENT)
    names = {
        parent.data.tags["ptl.run"]: parent.data.params.get("ptl.name", "") for parent in parents
    }
    runs = names.keys() & given_up if given_up else names.keys()
    files = ExperimentFiles(experiment.name, location, [])
    if not runs:
        return files
    # MLflow's models before the records, and these before the registry: what is made meanwhile counts.
    models = list(pages(client.search_logged_models, experiment_ids=ids))
    folders = _folders(root, depth=2)
    needed = {}
    for run in filter(store.is_name, runs):
        rehearsed = is_rehearsal(names[run], experiment.name)
        needed[run] = _needed(root, run, folders, given_up=bool(given_up), rehearsed=rehearsed)
    # What is registered: version -> all that names its model
    versions = {
        f"{version.name} {version.version}": f"{version.source} {version.model_id} {version.tags.get('ptl.model_id')}"
        for version in pages(client.search_model_versions)
    }
    for stored in [*_checkpoints(location, models), *_training_checkpoints(root, folders)]:
        reasons = needed.get(stored.run)
        if reasons is not None:
            reason = (
                _registered(stored, versions) or reasons.get("") or reasons.get(stored.model_id, "")
            )
            if not reason and (time.time() - stored.changed) / DAY < older_than:
                reason = f"younger than {older_than:g} days"
            files.stored.append(replace(stored, needed=reason))
    return files


def _registered(stored: StoredFiles, versions: dict[str, str]) -> str:
    """Why a checkpoint stays that a version names, by its model or, one that was made by hand, by its location."""
    for version, names in versions.items():
        if stored.model_id and stored.model_id in names:
            return f"registered: {version}"
    return ""


def _folders(uri: str, depth: int) -> dict[str, Folder]:
    """The folders that are `depth` levels below `uri`, by their path from there; from one listing."""
    by_path: dict[str, Folder] = {}
    for path, size, changed in store.walk(uri):
        folder_path = "/".join(path.split("/")[:depth])
        num_bytes, newest = by_path.get(folder_path, (0, 0.0))
        by_path[folder_path] = (num_bytes + size, max(newest, changed))
    return by_path


def _checkpoints(location: str, models: list[LoggedModel]) -> Iterator[StoredFiles]:
    """The checkpoints that steps made, also those of killed attempts, unless their files are gone."""
    folders = _folders(f"{location}/models", depth=1)
    for model in models:
        uri = f"{location}/models/{model.model_id}/artifacts"
        # Anybody may write to MLflow, and a store may have been moved.
        is_ours = (
            model.artifact_location == uri
            and store.is_below(uri, location)
            and "ptl.run" in model.tags
        )
        if is_ours and model.model_id in folders:
            step = model.tags.get("ptl.step", model.name)
            yield StoredFiles(
                model.tags["ptl.run"],
                step,
                (uri,),
                *folders[model.model_id],
                model_id=model.model_id,
            )


def _training_checkpoints(root: str, folders: dict[str, Folder]) -> Iterator[StoredFiles]:
    """Training checkpoints and their records, those of a step together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in folders:
        run, _, name = path.partition("/")
        match = TRAINING.fullmatch(name)
        if match and store.is_below(f"{root}/{path}", root):
            groups[run, match["step"]].append(path)
    for (run, step), paths in groups.items():
        sizes, times = zip(*(folders[path] for path in paths), strict=True)
        yield StoredFiles(
            run, step, tuple(f"{root}/{path}" for path in paths), sum(sizes), max(times)
        )


def _needed(
    root: str, run: str, folders: Iterable[str], *, given_up: bool, rehearsed: bool
) -> dict[str, str]:
    """Why a run's checkpoints stay, by their id in MLflow; by "" why all of its files do."""
    names = [path.removeprefix(f"{run}/") for path in folders if path.startswith(f"{run}/")]
    # With one that cannot be read, what the run ended with is not distinguishable from the rest.
    try:
        records = [store.committed(root, run, name) for name in names if store.is_name(name)]
    except WorkError as error:
        return {"": f"a record of the run cannot be read: {error}"}
    needed: dict[str, str] = {}
    evaluations = []
    stages = set()
    for record in filter(None, records):
        stage = record.metadata.get("stage", "")
        stages.add(stage)
        if stage in KEPT:
            needed[record.pointer.model_id] = KEPT[stage]
        if "accepted" in record.metadata:
            evaluations.append(record.metadata)
    # The report's record is written when all that it needs is there. A status in MLflow can be set by anybody.
    if "report" not in stages:
        return (
            {} if given_up else {"": "its run is not finished and can be resumed; --run lets it go"}
        )
    if rehearsed:
        return {}
    # The last one of each arm.
    evaluations.sort(key=lambda metadata: metadata["iteration"])
    for evaluation in {metadata["arm"]: metadata for metadata in evaluations}.values():
        reason = KEPT["report"] if evaluation["arm"] == "loop" else "the control of its run"
        needed[evaluation["accepted"]["model_id"]] = reason
    return needed


def delete_files(experiment: ExperimentFiles, stored: StoredFiles) -> None:
    """Delete files that can go; their model in MLflow is marked. Raises InputError where the credentials may not."""
    assert not stored.needed
    # Marked first, so that no page of a model says that files are there which are not.
    if stored.model_id:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with mlflow_client.connected() as client:
            client.set_logged_model_tags(stored.model_id, {DELETED: now})
    for uri in stored.uris:
        store.delete(uri, below=experiment.location)
