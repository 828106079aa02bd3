"""What lies in an MLflow experiment: its pipeline runs, and the folders of their checkpoints with bytes and age."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    state: str  # finished, unfinished, deleted (in MLflow), unknown (to MLflow)
    started: float  # unix time
    done: frozenset[str]  # steps with a record
    final: str | None  # URI of the checkpoint that the run ended with; None: not known
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
    root: str
    runs: dict[str, Run]
    stored: list[Stored]


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
    steps: dict[str, list[str]] = {run: [] for run in parents}
    for path in below:
        run, _, name = path.partition("/")
        if (run in elsewhere and run not in parents) or not (store.is_name(run) and store.is_name(name)):
            continue  # the latter: drafts that a killed writer left, and files of others
        steps.setdefault(run, [])
        if not name.endswith(".claim"):
            steps[run].append(name)
    records = {run: _records(root, run, names) for run, names in steps.items()}
    runs = {run: _run(run, parents.get(run), *records[run]) for run in steps}
    stored = [each for run, names in steps.items() for each in _training(root, runs[run], names, below)]
    known = {run: found for run, (found, _) in records.items()}
    checkpoints = _checkpoints(models, known, files, _versions(client))
    # Of a store that was moved the records still name the old place, which may be in use by others.
    stored += [each for each in checkpoints if each.uris[0].startswith(f"{place}/")]
    return Experiment(found.name, root, runs, stored)


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
    scored = [
        record["facts"]
        for step, record in records.items()
        if step.startswith("evaluate-") and "accepted" in record["facts"]
    ]
    final = max(scored, key=lambda facts: facts["iteration"])["accepted"]["uri"] if scored else None
    if parent is None:
        return Run(run, "", "unknown", 0.0, frozenset(records), final, damaged)
    state = "finished" if parent.info.status == "FINISHED" else "unfinished"
    if parent.info.lifecycle_stage != "active":
        state = "deleted"
    started = parent.info.start_time / 1000
    return Run(run, parent.info.run_id, state, started, frozenset(records), final, damaged)


def _checkpoints(
    models: list[Any],
    records: dict[str, dict[str, dict[str, Any]]],
    files: dict[str, tuple[int, float]],
    versions: dict[str, str],
) -> Iterator[Stored]:
    """Every checkpoint that a record names or that MLflow knows, unless its files are gone or were moved."""
    kinds = {"import": "dense", "prune": "cut", "recover": "recovered"}
    known = {model.artifact_location: model for model in models}
    committed = {
        record["pointer"]["uri"]: (run, step, kinds[record["facts"]["stage"]])
        for run, steps in records.items()
        for step, record in steps.items()
        if record["facts"].get("stage") in kinds
    }
    ids = {record["pointer"]["model_id"] for steps in records.values() for record in steps.values()}
    for uri in dict.fromkeys([*committed, *known]):
        model = known.get(uri)
        if model and uri not in committed and model.model_id in ids:
            continue  # committed under the address before the move
        size, changed = _measured(uri, files)
        if uri in committed:
            run, step, kind = committed[uri]
        else:
            assert model is not None
            run, step, kind = model.tags["ptl.run"], model.tags.get("ptl.step", model.name), "attempt"
            changed = max(changed, model.last_updated_timestamp / 1000)
        if size == 0 and kind != "attempt":
            continue  # deleted before
        model_id = model.model_id if model else ""
        version = versions.get(uri) or versions.get(model_id, "")
        yield Stored(run, step, kind, (uri, f"{uri}.partial"), size, changed, model_id, version)


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


def _measured(uri: str, files: dict[str, tuple[int, float]]) -> tuple[int, float]:
    """Of a checkpoint: MLflow puts it into `<experiment>/models/<model id>/artifacts`."""
    above, _, last = uri.rpartition("/")
    folder, _, model = above.rpartition("/")
    if last == "artifacts" and folder.endswith("/models"):
        return files.get(model, (0, 0.0))
    return _sizes(uri, depth=0).get("", (0, 0.0))


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
