"""What is in an MLflow experiment: its pipeline runs, and the folders of their checkpoints with bytes and age."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client
from ptl.lineage.mlflow_client import pages
from ptl.lineage.run_status import records_root
from ptl.lineage.stored_files import Folder, Records, StoredFiles, checkpoints, folders, training_checkpoints
from ptl.storage import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel, Run


@dataclass(frozen=True)
class RunInventory:
    """A run of the pipeline, by its records and by MLflow."""

    id: str
    mlflow_id: str  # its parent run in MLflow; empty where MLflow knows none
    state: str  # finished (its report has a record), unfinished, deleted (in MLflow), unknown (to MLflow)
    started: float  # unix time
    done: frozenset[str]  # steps with a record
    final: str | None  # URI of the checkpoint that the run ended with; None: not known
    control: str | None = None  # that of the control; None: there is none
    damaged: str = ""  # what is wrong with a record


@dataclass(frozen=True)
class ExperimentInventory:
    """All that one experiment keeps in the store."""

    name: str
    location: str  # MLflow's artifact location: nothing outside of it is the experiment's
    runs: dict[str, RunInventory]  # by the id of the pipeline run
    stored: list[StoredFiles]  # files that records of several runs name appear once for each

    @property
    def root(self) -> str:
        """Where the records are."""
        return records_root(self.location)


def experiments(names: list[str]) -> Iterator[ExperimentInventory]:
    """The experiments of these names, or all that hold runs of the pipeline. Raises InputError for an unknown name."""
    with mlflow_client.connected() as client:
        known = {experiment.name: experiment for experiment in pages(client.search_experiments)}
        for name in names:
            if name not in known:
                existing = ", ".join(sorted(known)) or "none"
                raise InputError(f"MLflow has no {name!r}", field="--experiment", remedy=f"it has {existing}")
        for name in sorted(set(names) or known):
            experiment = known[name]
            others = [other for other in known.values() if other is not experiment]
            foreign_runs = _runs_at(client, _location(experiment), others)
            inventory = _inventory(client, experiment, foreign_runs)
            if inventory.runs or names:
                yield inventory


def _location(experiment: Experiment) -> str:
    return str(experiment.artifact_location.rstrip("/"))


def _runs_at(client: MlflowClient, location: str, experiments: Iterable[Experiment]) -> set[str]:
    """Runs of the experiments that keep their files at a location; all of `ptl run` without a server share one."""
    runs: set[str] = set()
    for experiment in experiments:
        if _location(experiment) == location:
            runs.update(_parents(client, experiment.experiment_id))
    return runs


def _inventory(
    client: MlflowClient,
    experiment: Experiment,
    foreign_runs: set[str],
) -> ExperimentInventory:
    """What one experiment holds; `foreign_runs` are those of other experiments at the same location."""
    location = _location(experiment)
    # MLflow's models first, then the records, versions last: what is committed or registered meanwhile counts.
    models = _models(client, experiment.experiment_id)
    parents = _parents(client, experiment.experiment_id)
    if not models and not parents:
        return ExperimentInventory(experiment.name, location, {}, [])
    root = records_root(location)
    model_folders = folders(f"{location}/models", depth=1)
    run_folders = folders(root, depth=2)
    names: dict[str, list[str]] = {run: [] for run in parents}  # some have written nothing yet
    names |= _names(run_folders)

    records: dict[str, Records] = {}
    runs: dict[str, RunInventory] = {}
    stored: list[StoredFiles] = []
    for run, run_names in names.items():
        records[run], damaged = _records(root, run, run_names)
        # Of the runs that share the location, those of this experiment.
        if run in parents or run not in foreign_runs:
            runs[run] = _run_inventory(run, parents.get(run), records[run], damaged)
            stored += training_checkpoints(root, run, runs[run].done, run_names, run_folders)
    all_checkpoints = checkpoints(location, models, records, model_folders)
    versions = _versions(client)
    # What a run of another experiment needs stays, although one of this experiment names it too.
    foreign = set(names) - set(runs)
    needed = {files.uris[0] for files in all_checkpoints if files.run in foreign}
    for files in all_checkpoints:
        uri = files.uris[0]
        if uri not in needed:
            version = versions.get(uri) or versions.get(files.model_id, "")
            stored.append(replace(files, version=version))
    return ExperimentInventory(experiment.name, location, runs, stored)


def _names(run_folders: dict[str, Folder]) -> dict[str, list[str]]:
    """Records and training checkpoints of each run, without claims."""
    names: dict[str, list[str]] = {}
    for path in run_folders:
        run, _, name = path.partition("/")
        # Drafts of a killed writer and files of others have no such names.
        if store.is_name(run) and store.is_name(name):
            run_names = names.setdefault(run, [])
            if not name.endswith(".claim"):
                run_names.append(name)
    return names


def _records(root: str, run: str, names: list[str]) -> tuple[Records, str]:
    """The records of a run's steps, and what is wrong with one that cannot be read."""
    records: Records = {}
    damaged = ""
    for name in names:
        if ".training-" in name:
            continue
        try:
            record = store.committed(root, run, name)
        except WorkError as error:
            damaged = str(error)
            continue
        if record is not None:
            records[name] = record
    return records, damaged


def _run_inventory(
    run: str,
    parent: Run | None,
    records: Records,
    damaged: str,
) -> RunInventory:
    state = "unknown"
    if parent is not None:
        # A status can be set by anybody; the report's record is written when all that it needs is there.
        ended = parent.info.status == "FINISHED" and "report" in records
        state = "finished" if ended else "unfinished"
        if not _is_active(parent):
            state = "deleted"
    return RunInventory(
        id=run,
        mlflow_id=parent.info.run_id if parent else "",
        state=state,
        started=parent.info.start_time / 1000 if parent else 0.0,
        done=frozenset(records),
        final=_final_uri(records, "loop"),
        control=_final_uri(records, "control"),
        damaged=damaged,
    )


def _final_uri(records: Records, arm: str) -> str | None:
    """The checkpoint that the last evaluation of an arm passed on; None before the first."""
    uris = {}  # by iteration
    for record in records.values():
        metadata = record.metadata
        # Only evaluations have accepted anything.
        if "accepted" in metadata and metadata["arm"] == arm:
            uris[metadata["iteration"]] = metadata["accepted"]["uri"]
    return uris[max(uris)] if uris else None


def _models(client: MlflowClient, experiment_id: str) -> list[LoggedModel]:
    """The LoggedModels of an experiment that steps made."""
    models = pages(client.search_logged_models, experiment_ids=[experiment_id])
    return [model for model in models if "ptl.run" in model.tags]


def _parents(client: MlflowClient, experiment_id: str) -> dict[str, Run]:
    """The MLflow run of each pipeline run. Deleted ones too; but those that lost a race against an active one not."""
    from mlflow.entities import ViewType

    runs = pages(
        client.search_runs,
        experiment_ids=[experiment_id],
        filter_string="tags.`ptl.role` = 'parent'",
        run_view_type=ViewType.ALL,
    )
    # The active one comes last and is the one that stays in the dict.
    return {run.data.tags["ptl.run"]: run for run in sorted(runs, key=_is_active)}


def _is_active(run: Run) -> bool:
    return bool(run.info.lifecycle_stage == "active")


def _versions(client: MlflowClient) -> dict[str, str]:
    """`name version` of everything that is registered, by the location and by the id of the model."""
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
