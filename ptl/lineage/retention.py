"""Which checkpoints nobody needs any more, and deleting them. Records, scores and MLflow's runs stay."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from ptl.errors import InputError
from ptl.lineage import mlflow_client
from ptl.lineage.inventory import ExperimentInventory, RunInventory
from ptl.lineage.stored_files import StoredFiles
from ptl.storage import store

DAY = 24 * 60 * 60.0
LIVE_DAYS = 1.0  # files that are younger may belong to an attempt that is at work: these are never touched
DELETED = "ptl.deleted"  # tag of a LoggedModel: when its files were deleted

# Why files can go, by their kind.
_DELETABLE = {
    "attempt": "left by an attempt that died",
    "training": "training checkpoints of a step that ended",
    "dense": "imported model of a run that ended",
    "pruned": "intermediate, pruned",
    "recovered": "intermediate, recovered",
    "exported": "export of a run that is not finished",
}
# Why files stay, by the state of their run.
_UNFINISHED = {
    "unfinished": "its run is not finished and can be resumed; --run lets it go",
    "deleted": "its run was deleted in MLflow; --run lets it go",
    "unknown": "MLflow does not know its run; --run lets it go",
}


@dataclass(frozen=True)
class Rules:
    """What may go."""

    older_than: float = 7.0  # days since the newest file was written
    keep_last: int = 0  # newest finished runs of each experiment that keep everything
    runs: tuple[str, ...] = ()  # only these; their checkpoints go although they are not finished
    dense: bool = False  # imported models of finished runs may go too


@dataclass(frozen=True)
class Retention:
    """Whether files stay, and why."""

    stored: StoredFiles
    deletable: bool
    reason: str


def apply_rules(experiment: ExperimentInventory, rules: Rules, now: float) -> list[Retention]:
    """What becomes of everything in an experiment, or only in `rules.runs`; `now` is unix time."""
    runs = experiment.runs
    newest = _newest(experiment, rules.keep_last)
    # A user may name a run by either id.
    selected = [run.id for run in runs.values() if {run.id, run.mlflow_id} & set(rules.runs)]
    agreed: dict[str, Retention] = {}  # by the files, which several runs may name
    for stored in experiment.stored:
        unknown = RunInventory(stored.run, "", "unknown", 0.0, frozenset(), None)
        run = runs.get(stored.run, unknown)
        reason = _needed(stored, run, rules, run.id in selected, run.id in newest)
        reason = reason or _too_young(stored, rules, now)
        retention = Retention(stored, deletable=not reason, reason=reason or _DELETABLE[stored.kind])
        # They go only when none of the runs needs them.
        uri = stored.uris[0]
        earlier = agreed.get(uri)
        if earlier is None or (earlier.deletable and reason):
            agreed[uri] = retention
    retentions = agreed.values()
    return [retention for retention in retentions if not rules.runs or retention.stored.run in selected]


def _newest(experiment: ExperimentInventory, number: int) -> list[str]:
    """Ids of the finished runs that keep everything."""
    finished = [run for run in experiment.runs.values() if run.state == "finished"]
    finished.sort(key=lambda run: run.started, reverse=True)
    return [run.id for run in finished[:number]]


def _too_young(stored: StoredFiles, rules: Rules, now: float) -> str:
    """Why files are too young to go; empty where they are old enough."""
    days = (now - stored.changed) / DAY
    if days < rules.older_than:
        return f"younger than {rules.older_than:g} days"
    if stored.kind == "attempt" and days < LIVE_DAYS:
        return f"younger than {LIVE_DAYS:g} day: an attempt that may be at work"
    return ""


def _needed(
    stored: StoredFiles,
    run: RunInventory,
    rules: Rules,
    selected: bool,
    keeps_all: bool,
) -> str:
    """Why files stay, whatever their age; empty where nothing needs them.

    `selected`: the user named the run; `keeps_all`: it is one of the newest runs.
    """
    uri = stored.uris[0]
    finished = run.state == "finished"
    done = stored.step in run.done
    if stored.version:
        return f"registered: {stored.version}"
    # What the run committed is then not distinguishable from what it did not.
    if run.damaged:
        return f"a record of the run cannot be read: {run.damaged}"
    if stored.kind == "attempt":
        # Nobody reads it: a repeated step publishes under a fresh prefix.
        # Where records were lost, it may be the result.
        return "its step has no record, though the run is finished" if finished and not done else ""
    if stored.kind == "training" and done:
        return ""
    if not finished:
        return "" if selected else _UNFINISHED[run.state]
    # Of a finished run, what it ended with stays, and what the rules keep.
    if run.final is None:
        return "the run's final checkpoint is not known"
    if uri == run.final:
        return "final checkpoint of its run"
    if uri == run.control:
        return "the control of its run"
    if stored.kind == "exported":
        return "an export of its run"
    if stored.kind == "dense" and not rules.dense:
        return "imported model; --dense lets it go"
    return "one of the newest finished runs" if keeps_all else ""


def delete(experiment: ExperimentInventory, retention: Retention) -> bool:
    """Delete files that can go; a model in MLflow is marked first. Returns False for what was committed meanwhile.

    Raises InputError where the credentials may not delete.
    """
    stored = retention.stored
    is_attempt = stored.kind == "attempt"
    if not retention.deletable:
        raise ValueError(f"{stored.uris[0]} is to be kept: {retention.reason}")
    if is_attempt and _committed_meanwhile(experiment, stored):
        return False
    with mlflow_client.connected() as client:
        # First, so that no page of a model says that files are there which are not.
        if stored.model_id:
            now = datetime.datetime.now(datetime.UTC)
            client.set_logged_model_tags(stored.model_id, {DELETED: now.isoformat(timespec="seconds")})
        for uri in stored.uris:
            store.delete(uri, below=experiment.location)
        # An attempt is part of no lineage.
        if stored.model_id and is_attempt:
            client.delete_logged_model(stored.model_id)
    return True


def _committed_meanwhile(experiment: ExperimentInventory, stored: StoredFiles) -> bool:
    """Whether a record names these files by now: a machine that slept may have committed after the listing."""
    folder, _, name = stored.uris[0].rpartition("/")
    record_name = stored.step
    # A training checkpoint has a record of its own.
    if folder == f"{experiment.root}/{stored.run}":
        record_name = name.rpartition("-")[0]
    record = store.committed(experiment.root, stored.run, record_name)
    return record is not None and record.pointer.uri in stored.uris


def check_runs(names: list[str], experiments: list[ExperimentInventory]) -> None:
    """Raise InputError for a run that no experiment has."""
    known = set()
    for experiment in experiments:
        for run in experiment.runs.values():
            known |= {run.id, run.mlflow_id}
    for name in names:
        if name not in known:
            raise InputError(
                f"no run {name!r}",
                field="--run",
                remedy="give the id of a pipeline run, or of its parent run in MLflow",
            )
