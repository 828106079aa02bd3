"""What lies in an MLflow experiment: its pipeline runs, and the folders of their checkpoints with bytes and age."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ptl import store, tracking
from ptl.errors import InputError, WorkError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TRAINING = re.compile(r"(?P<step>.+)\.(?P<stage>\d+)\.training-(?P<number>\d+)(?P<attempt>-[0-9a-f]{12})?(\.partial)?")
_PAGE = 1000


@dataclass(frozen=True)
class Run:
    """A run of the pipeline."""

    id: str
    mlflow_id: str  # its parent run in MLflow; empty where MLflow knows none
    state: str  # finished (its report has a record), unfinished, deleted (in MLflow), unknown (to MLflow)
    started: float  # unix time
    done: frozenset[str]  # steps with a record
    final: str | None  # URI of the checkpoint that the run ended with; None: not known
    control: str | None = None  # that of the control; None: there is none
    damaged: str = ""  # what is wrong with a record


@dataclass(frozen=True)
class Stored:
    """Files in the store that belong together: a checkpoint, what a killed attempt left, or training checkpoints."""

    run: str
    step: str
    kind: str  # dense, cut, recovered: committed by the step; attempt: not committed; training
    uris: tuple[str, ...]  # the folders, in the order in which they are to be deleted
    bytes: int
    changed: float  # unix time of the newest file
    model_id: str = ""  # MLflow LoggedModel, where MLflow has it
    version: str = ""  # registered model and version, where it is registered


@dataclass(frozen=True)
class Experiment:
    """All that one experiment keeps in the store."""

    name: str
    place: str  # MLflow's artifact location: nothing outside of it is the experiment's
    runs: dict[str, Run]
    stored: list[Stored]  # files that records of several runs name appear once for each

    @property
    def root(self) -> str:
        """Where the records are."""
        return f"{self.place}/ptl"


def experiments(names: list[str]) -> Iterator[Experiment]:
    """The experiments of these names, or all that hold runs of the pipeline. Raises InputError for an unknown name."""
    with tracking.explained():
        client = tracking.connect()
        found = {one.name: one for one in _pages(client.search_experiments)}
        for name in names:
            if name not in found:
                raise InputError(f"--experiment: MLflow has no {name!r}; it has {', '.join(sorted(found)) or 'none'}")
        for name in sorted(set(names) or found):
            others = [each for each in found.values() if each.name != name]
            held = _experiment(client, found[name], _elsewhere(client, found[name], others))
            if held.runs or names:
                yield held


def _elsewhere(client: MlflowClient, here: Any, others: list[Any]) -> set[str]:
    """Runs of other experiments that keep their files in the same place, as all of `ptl run` without a server do."""
    place = here.artifact_location.rstrip("/")
    same = [each for each in others if each.artifact_location.rstrip("/") == place]
    return {run for each in same for run in _parents(client, each.experiment_id)}


def _experiment(client: MlflowClient, found: Any, elsewhere: set[str]) -> Experiment:
    # MLflow's models first, then the records, versions last: what is committed or registered meanwhile counts.
    models = [
        model
        for model in _pages(client.search_logged_models, experiment_ids=[found.experiment_id])
        if "ptl.run" in model.tags
    ]
    parents = _parents(client, found.experiment_id)
    place = found.artifact_location.rstrip("/")
    root = f"{place}/ptl"
    files = _sizes(f"{place}/models", depth=1) if models or parents else {}
    below = _sizes(root, depth=2) if models or parents else {}
    unnamed: dict[str, list[str]] = {run: [] for run in parents}
    names = unnamed | _names(below)
    records = {run: _records(root, run, steps) for run, steps in names.items()}
    others = {run for run in names if run in elsewhere and run not in parents}
    runs = {run: _run(run, parents.get(run), *records[run]) for run in names if run not in others}
    stored = [each for run in runs for each in _training(root, runs[run], names[run], below)]
    checkpoints = _checkpoints(place, models, {run: found for run, (found, _) in records.items()}, files)
    versions = _versions(client)
    foreign = {each.uris[0] for each in checkpoints if each.run in others}
    for each in checkpoints:
        if each.uris[0] not in foreign:  # else a run of another experiment needs it
            version = versions.get(each.uris[0]) or versions.get(each.model_id, "")
            stored.append(replace(each, version=version))
    return Experiment(found.name, place, runs, stored)


def _names(below: dict[str, tuple[int, float]]) -> dict[str, list[str]]:
    """What each run keeps beside its checkpoints, without claims, drafts of a killed writer and files of others."""
    found: dict[str, list[str]] = {}
    for path in below:
        run, _, name = path.partition("/")
        if store.is_name(run) and store.is_name(name):
            found.setdefault(run, [])
            if not name.endswith(".claim"):
                found[run].append(name)
    return found


def _records(root: str, run: str, names: list[str]) -> tuple[dict[str, dict[str, Any]], str]:
    """The records of a run's steps, and what is wrong with one that cannot be read."""
    found, damaged = {}, ""
    for step in (name for name in names if ".training-" not in name):
        try:
            record = store.committed(root, run, step)
        except WorkError as error:
            damaged = str(error)
            continue
        if record is not None:
            found[step] = record
    return found, damaged


def _run(run: str, parent: Any, records: dict[str, dict[str, Any]], damaged: str) -> Run:
    finals = {}
    for arm in ("loop", "control"):
        metadata = [record["metadata"] for record in records.values() if record["metadata"].get("arm", "loop") == arm]
        scored = [each for each in metadata if "accepted" in each]
        finals[arm] = max(scored, key=lambda metadata: metadata["iteration"])["accepted"]["uri"] if scored else None
    mlflow_id, state, started = "", "unknown", 0.0
    if parent is not None:
        # A status can be set by anybody; the report's record is written when all that it needs is there.
        ended = parent.info.status == "FINISHED" and "report" in records
        state = "finished" if ended else "unfinished"
        if parent.info.lifecycle_stage != "active":
            state = "deleted"
        mlflow_id, started = parent.info.run_id, parent.info.start_time / 1000
    return Run(run, mlflow_id, state, started, frozenset(records), finals["loop"], finals["control"], damaged)


def _checkpoints(
    place: str, models: list[Any], records: dict[str, dict[str, dict[str, Any]]], files: dict[str, tuple[int, float]]
) -> list[Stored]:
    """Every checkpoint that a record names or that MLflow knows, unless its files are gone.

    Only folders of the form that MLflow gives models of this experiment. Any other URI is not ours to judge: of a store
    that was moved, records name the old place, which others may use, and a forged record names what it likes.
    """
    kinds = {"import": "dense", "prune": "cut", "recover": "recovered"}
    known = {model.artifact_location: model for model in models}
    owners: dict[str, list[tuple[str, str, str]]] = {}
    for run, steps in records.items():
        for step, record in steps.items():
            if record["metadata"].get("stage") in kinds:
                owner = (run, step, kinds[record["metadata"]["stage"]])
                owners.setdefault(record["pointer"]["uri"], []).append(owner)
    ids = {record["pointer"]["model_id"] for steps in records.values() for record in steps.values()}
    for uri, model in known.items():
        run = model.tags["ptl.run"]
        moved = uri not in owners and model.model_id in ids  # committed under the address before the move
        if not moved and run not in [owner for owner, _, _ in owners.get(uri, [])]:
            owners.setdefault(uri, []).append((run, model.tags.get("ptl.step", model.name), "attempt"))
    found = []
    for uri, claims in owners.items():
        match = re.fullmatch(re.escape(place) + r"/models/([^/]+)/artifacts", uri)
        if match is None or not store.is_below(uri, place):
            continue
        model = known.get(uri)
        for run, step, kind in claims:
            size, changed = files.get(match[1], (0, 0.0))
            if kind == "attempt" and model:
                changed = max(changed, model.last_updated_timestamp / 1000)
            if size or kind == "attempt":  # else deleted before
                uris = (uri, f"{uri}.partial")
                found.append(Stored(run, step, kind, uris, size, changed, model.model_id if model else ""))
    return found


def _training(root: str, run: Run, names: list[str], below: dict[str, tuple[int, float]]) -> Iterator[Stored]:
    """Training checkpoints: those of a finished step together; of others, what a kill left half-written apart."""
    found = [(match, name) for name in names if (match := _TRAINING.fullmatch(name))]
    # As steps clear them: the newest first, files before their record.
    found.sort(key=lambda each: (int(each[0]["stage"]), int(each[0]["number"]), bool(each[0]["attempt"])), reverse=True)
    groups: dict[tuple[str, str], list[str]] = {}
    for match, name in found:
        half = name.endswith(".partial") or (match["attempt"] and name.rpartition("-")[0] not in names)
        apart = bool(half) and match["step"] not in run.done
        groups.setdefault((match["step"], name if apart else ""), []).append(name)
    for (step, attempt), members in groups.items():
        sizes, times = zip(*(below[f"{run.id}/{name}"] for name in members), strict=True)
        uris = tuple(f"{root}/{run.id}/{name}" for name in members)
        yield Stored(run.id, step, "attempt" if attempt else "training", uris, sum(sizes), max(times))


def _sizes(uri: str, depth: int) -> dict[str, tuple[int, float]]:
    """Bytes and time of the newest file of each folder so deep below `uri`, from one listing."""
    found: dict[str, tuple[int, float]] = {}
    for path, size, changed in store.walk(uri):
        key = "/".join(path.split("/")[:depth])
        total, newest = found.get(key, (0, 0.0))
        found[key] = (total + size, max(newest, changed))
    return found


def _parents(client: MlflowClient, experiment_id: str) -> dict[str, Any]:
    """The MLflow run of each pipeline run. Deleted ones too; but those that lost a race against an active one not."""
    from mlflow.entities import ViewType

    where = "tags.`ptl.role` = 'parent'"
    found = _pages(client.search_runs, experiment_ids=[experiment_id], filter_string=where, run_view_type=ViewType.ALL)
    ordered = sorted(found, key=lambda run: bool(run.info.lifecycle_stage == "active"))
    return {run.data.tags["ptl.run"]: run for run in ordered}


def _versions(client: MlflowClient) -> dict[str, str]:
    """`name version` of everything that is registered, by the location and by the id of the model."""
    found = {}
    for version in _pages(client.search_model_versions):
        said = f"{version.name} {version.version}"
        for key in ((version.source or "").rstrip("/"), version.tags.get("ptl.model_id"), version.model_id):
            if key:
                found[key.removeprefix("models:/")] = said
    return found


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """All results of a search of MLflow, page by page."""
    token = None
    while True:
        page = search(max_results=_PAGE, page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return
