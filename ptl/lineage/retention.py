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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client
from ptl.lineage.mlflow_client import pages
from ptl.lineage.run_status import PARENT, records_root
from ptl.storage import store
from ptl.storage.store import Record

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


def inventory(names: list[str], runs: list[str], older_than: float) -> list[ExperimentFiles]:
    """The files of experiments, of all that hold runs of the pipeline where no name is given.

    `runs` are ids of pipeline runs, or of their parents in MLflow, that their user gives up: then only their files are
    listed. `older_than` is in days since the newest file was written. Raises InputError for an unknown name.
    """
    with mlflow_client.connected() as client:
        known = {experiment.name: experiment for experiment in pages(client.search_experiments)}
        for name in names:
            if name not in known:
                existing = ", ".join(sorted(known)) or "none"
                raise InputError(f"MLflow has no {name!r}", field="--experiment", remedy=f"it has {existing}")
        chosen = [known[name] for name in sorted(set(names) or known)]
        ids = {experiment.name: _runs_of(client, experiment, runs) for experiment in chosen}
        _check_runs(runs, {name for given in ids.values() for pair in given.items() for name in pair})
        return [
            ExperimentFiles(
                experiment.name,
                _location(experiment),
                _stored(client, experiment, list(ids[experiment.name]), older_than, given_up=bool(runs)),
            )
            for experiment in chosen
            if ids[experiment.name]
        ]


def _location(experiment: Experiment) -> str:
    return str(experiment.artifact_location.rstrip("/"))


def _runs_of(client: MlflowClient, experiment: Experiment, chosen: list[str]) -> dict[str, str]:
    """The experiment's pipeline runs by their id, with that of their parent in MLflow; deleted ones too."""
    from mlflow.entities import ViewType

    parents = pages(
        client.search_runs,
        experiment_ids=[experiment.experiment_id],
        filter_string=PARENT,
        run_view_type=ViewType.ALL,
    )
    ids = {parent.data.tags["ptl.run"]: parent.info.run_id for parent in parents}
    return {run: parent for run, parent in ids.items() if not chosen or {run, parent} & set(chosen)}


def _check_runs(names: list[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"no run {name!r}",
                field="--run",
                remedy="give the id of a pipeline run, or of its parent run in MLflow",
            )


def _stored(
    client: MlflowClient,
    experiment: Experiment,
    runs: list[str],
    older_than: float,
    *,
    given_up: bool,
) -> list[StoredFiles]:
    """All files of these runs of an experiment."""
    location = _location(experiment)
    root = records_root(location)
    # MLflow's models first, then the records, versions last: what is committed or registered meanwhile counts.
    models = list(pages(client.search_logged_models, experiment_ids=[experiment.experiment_id]))
    model_folders = _folders(f"{location}/models", depth=1)
    run_folders = _folders(root, depth=2)
    reasons = {run: _reasons(root, run, run_folders, given_up) for run in filter(store.is_name, runs)}
    versions = _versions(client)
    files = [*_checkpoints(location, models, model_folders), *_training_checkpoints(root, run_folders)]
    judged = []
    for stored in files:
        if stored.run not in reasons:
            continue
        # A record names the old address where the store was moved, and MLflow may have lost the id.
        keys = [stored.uris[0], stored.model_id, ""]
        needed = next((versions[key] for key in keys if key in versions), "")
        needed = needed or next((reasons[stored.run][key] for key in keys if key in reasons[stored.run]), "")
        if not needed and (time.time() - stored.changed) / DAY < older_than:
            needed = f"younger than {older_than:g} days"
        judged.append(replace(stored, needed=needed))
    return judged


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
            uris = (uri, f"{uri}.partial")
            yield StoredFiles(model.tags["ptl.run"], step, uris, *folder, model_id=model.model_id)


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


def _reasons(root: str, run: str, run_folders: dict[str, _Folder], given_up: bool) -> dict[str, str]:
    """Why a run's files stay, by their URI or by their id in MLflow; by "" why all of them do."""
    names = [path.removeprefix(f"{run}/") for path in run_folders if path.startswith(f"{run}/")]
    steps = [name for name in names if store.is_name(name) and not name.endswith(".claim") and not TRAINING.match(name)]
    # What the run ended with is then not distinguishable from the rest.
    try:
        records = [record for step in steps if (record := store.committed(root, run, step))]
    except WorkError as error:
        return {"": f"a record of the run cannot be read: {error}"}
    # The report's record is written when all that it needs is there. A status in MLflow can be set by anybody.
    final = [record["pointer"] for record in records if record["metadata"].get("stage") == "report"]
    if not final:
        return {} if given_up else {"": "its run is not finished and can be resumed; --run lets it go"}
    exports = [record["pointer"] for record in records if record["metadata"].get("stage") == "export"]
    reasons = dict.fromkeys(_keys(exports), "an export of its run")
    for arm, reason in (("control", "the control of its run"), ("loop", "final checkpoint of its run")):
        reasons |= dict.fromkeys(_keys(_accepted(records, arm)), reason)
    return reasons | dict.fromkeys(_keys(final), "final checkpoint of its run")


def _keys(pointers: list[dict[str, Any]]) -> Iterator[str]:
    for pointer in pointers:
        yield from filter(None, (pointer["uri"], pointer["model_id"]))


def _accepted(records: list[Record], arm: str) -> list[dict[str, Any]]:
    """The checkpoint that the last evaluation of an arm passed on; none before the first."""
    evaluations = [record["metadata"] for record in records if "accepted" in record["metadata"]]
    of_arm = [metadata for metadata in evaluations if metadata["arm"] == arm]
    last = max(of_arm, key=lambda metadata: metadata["iteration"], default=None)
    return [last["accepted"]] if last else []


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
            versions[address] = f"registered: {version.name} {version.version}"
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
