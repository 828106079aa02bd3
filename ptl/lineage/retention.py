"""Checkpoints that nobody needs any more, and deleting them. Records, scores and MLflow's runs stay.

A run's files can go when they are neither its final checkpoints nor registered, when the run is finished or its user
gives it up, and when they are old enough. Whose they are is MLflow's word: what a record names is only ever kept.
"""

from __future__ import annotations

import datetime
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client
from ptl.lineage.mlflow_client import pages
from ptl.lineage.run_status import PARENT, records_root
from ptl.storage import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel

DAY = 24 * 60 * 60.0
DELETED = "ptl.deleted"  # tag of a LoggedModel: when its files were deleted
TRAINING = re.compile(r"(?P<step>.+)\.\d+\.training-.+")  # folder of a training checkpoint, or of its record


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


class _Folder(NamedTuple):
    """All files below one folder."""

    bytes: int = 0
    changed: float = 0.0  # unix time of the newest file


def inventory(names: list[str], given_up: list[str], older_than: float) -> list[ExperimentFiles]:
    """The files of experiments, of all that hold runs of the pipeline where no name is given.

    `given_up` are ids of pipeline runs whose checkpoints may go although they can be resumed: then only their files are
    listed. `older_than` is in days since the newest file was written. Raises InputError for an unknown experiment.
    """
    with mlflow_client.connected() as client:
        known = {experiment.name: experiment for experiment in pages(client.search_experiments)}
        for name in names:
            if name not in known:
                existing = ", ".join(sorted(known)) or "none"
                raise InputError(f"MLflow has no {name!r}", field="--experiment", remedy=f"it has {existing}")
        experiments = [_experiment_files(client, known[name], given_up) for name in sorted(set(names) or known)]
        # Last: what is registered meanwhile counts.
        versions = _versions(client)
    return [
        replace(experiment, stored=[_judged(files, versions, older_than) for files in experiment.stored])
        for experiment in experiments
        if experiment.stored
    ]


def _experiment_files(client: MlflowClient, experiment: Experiment, given_up: list[str]) -> ExperimentFiles:
    """The files of an experiment's runs; those that their run needs say why."""
    location = experiment.artifact_location.rstrip("/")
    root = records_root(location)
    experiment_ids = [experiment.experiment_id]
    parents = pages(client.search_runs, experiment_ids=experiment_ids, filter_string=PARENT)
    runs = {run for parent in parents if store.is_name(run := parent.data.tags["ptl.run"])}
    if given_up:
        runs &= set(given_up)
    if not runs:
        return ExperimentFiles(experiment.name, location, [])
    # MLflow's models before the records: what is committed meanwhile counts.
    models = list(pages(client.search_logged_models, experiment_ids=experiment_ids))
    run_folders = _folders(root, depth=2)
    files = [
        *_checkpoints(location, models, _folders(f"{location}/models", depth=1)),
        *_training_checkpoints(root, run_folders),
    ]
    stored = []
    for run in runs:
        needed = _needed(root, run, run_folders, bool(given_up))
        for own in [each for each in files if each.run == run]:
            # By either: a record names the old address where the store was moved, and MLflow may have lost the id.
            reason = needed.get("") or needed.get(own.uris[0]) or needed.get(own.model_id, "")
            stored.append(replace(own, needed=reason))
    return ExperimentFiles(experiment.name, location, stored)


def _judged(files: StoredFiles, versions: dict[str, str], older_than: float) -> StoredFiles:
    """The files with why they stay, where their run does not say it."""
    version = versions.get(files.uris[0]) or versions.get(files.model_id)
    if version:
        return replace(files, needed=f"registered: {version}")
    if not files.needed and (time.time() - files.changed) / DAY < older_than:
        return replace(files, needed=f"younger than {older_than:g} days")
    return files


def _folders(uri: str, depth: int) -> dict[str, _Folder]:
    """The folders that are `depth` levels below `uri`, by their path from there; from one listing."""
    by_path: dict[str, _Folder] = defaultdict(_Folder)
    for path, size, changed in store.walk(uri):
        folder_path = "/".join(path.split("/")[:depth])
        known = by_path[folder_path]
        by_path[folder_path] = _Folder(known.bytes + size, max(known.changed, changed))
    return by_path


def _checkpoints(location: str, models: list[LoggedModel], folders: dict[str, _Folder]) -> Iterator[StoredFiles]:
    """The checkpoints that steps made, also those of killed attempts, unless their files are gone."""
    for model in models:
        uri = model.artifact_location
        match = re.fullmatch(re.escape(location) + r"/models/([^/]+)/artifacts", uri)
        # Anybody may write to MLflow: the name may be `..`, which the pattern allows.
        if match is None or not store.is_below(uri, location) or "ptl.run" not in model.tags:
            continue
        folder = folders.get(match[1])
        if folder:
            step = model.tags.get("ptl.step", model.name)
            yield StoredFiles(model.tags["ptl.run"], step, (uri,), *folder, model_id=model.model_id)


def _training_checkpoints(root: str, folders: dict[str, _Folder]) -> Iterator[StoredFiles]:
    """Training checkpoints and their records, those of a step together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in folders:
        run, _, name = path.partition("/")
        match = TRAINING.fullmatch(name)
        if match and store.is_name(run) and store.is_name(name):
            groups[run, match["step"]].append(path)
    for (run, step), paths in groups.items():
        members = [folders[path] for path in paths]
        yield StoredFiles(
            run,
            step,
            uris=tuple(f"{root}/{path}" for path in paths),
            bytes=sum(member.bytes for member in members),
            changed=max(member.changed for member in members),
        )


def _needed(root: str, run: str, run_folders: dict[str, _Folder], given_up: bool) -> dict[str, str]:
    """Why a run's files stay, by their URI or by their id in MLflow; by "" why all of them do."""
    records = []
    for path in run_folders:
        owner, _, name = path.partition("/")
        is_step = store.is_name(name) and not name.endswith(".claim") and not TRAINING.fullmatch(name)
        if owner != run or not is_step:
            continue
        # What the run ended with is then not distinguishable from the rest.
        try:
            record = store.committed(root, run, name)
        except WorkError as error:
            return {"": f"a record of the run cannot be read: {error}"}
        if record is not None:
            records.append(record)
    # The report's record is written when all that it needs is there. A status in MLflow can be set by anybody.
    if "report" not in [record.metadata.get("stage") for record in records]:
        return {} if given_up else {"": "its run is not finished and can be resumed; --run lets it go"}
    needed: dict[str, str] = {}
    for record in records:
        stage = str(record.metadata.get("stage"))
        reason = {"report": "final checkpoint of its run", "export": "an export of its run"}.get(stage)
        if reason:
            needed |= _by_either_name(asdict(record.pointer), reason)
    for arm, reason in (("loop", "final checkpoint of its run"), ("control", "the control of its run")):
        evaluations = [record.metadata for record in records if "accepted" in record.metadata]
        of_arm = [metadata for metadata in evaluations if metadata["arm"] == arm]
        # What the last of them passed on.
        if of_arm:
            last = max(of_arm, key=lambda metadata: metadata["iteration"])
            needed |= _by_either_name(last["accepted"], reason)
    return needed


def _by_either_name(pointer: dict[str, Any], reason: str) -> dict[str, str]:
    """The reason by a checkpoint's URI and by its id in MLflow, which may be empty."""
    return {name: reason for name in (pointer["uri"], pointer["model_id"]) if name}


def _versions(client: MlflowClient) -> dict[str, str]:
    """What is registered, as which version: by the location and by the id of the model."""
    versions = {}
    for version in pages(client.search_model_versions):
        keys = (version.source, version.tags.get("ptl.model_id"), version.model_id)
        # Whoever registers a checkpoint by hand may give any of them.
        for key in filter(None, keys):
            address = key.rstrip("/").removeprefix("models:/")
            if address.startswith("/"):  # a folder, as it is typed
                address = Path(address).as_uri()
            versions[address] = f"{version.name} {version.version}"
    return versions


def delete(experiment: ExperimentFiles, stored: StoredFiles) -> None:
    """Delete files that can go; their model in MLflow is marked. Raises InputError where the credentials may not."""
    if stored.needed:
        raise ValueError(f"{stored.uris[0]} is to be kept: {stored.needed}")
    # Marked first, so that no page of a model says that files are there which are not.
    if stored.model_id:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with mlflow_client.connected() as client:
            client.set_logged_model_tags(stored.model_id, {DELETED: now})
    for uri in stored.uris:
        store.delete(uri, below=experiment.location)
