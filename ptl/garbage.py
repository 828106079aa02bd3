"""Which checkpoints nobody needs any more, and deleting them. Records, scores and MLflow's runs stay."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass

from ptl import store, tracking
from ptl.errors import InputError
from ptl.inventory import Experiment, Run, Stored

DAY = 24 * 60 * 60.0
LIVE_DAYS = 1.0  # files that are younger may belong to an attempt that is at work: these are never touched
DELETED = "ptl.deleted"  # tag of a LoggedModel: when its files were deleted


@dataclass(frozen=True)
class Rules:
    """What may go."""

    older_than: float = 7.0  # days since the newest file was written
    keep_last: int = 0  # newest finished runs of each experiment that keep everything
    runs: tuple[str, ...] = ()  # only these; their checkpoints go although they are not finished
    dense: bool = False  # imported models of finished runs may go too


@dataclass(frozen=True)
class Verdict:
    """What becomes of a folder, and why."""

    stored: Stored
    goes: bool
    why: str


def decide(held: Experiment, rules: Rules, now: float) -> list[Verdict]:
    """A verdict on everything in an experiment, or only in `rules.runs`; `now` is unix time."""
    finished = sorted(run.started for run in held.runs.values() if run.state == "finished")
    kept = finished[-rules.keep_last :] if rules.keep_last else []
    verdicts: dict[str, list[Verdict]] = {}  # by the files, which several runs may name
    selected = {run.id for run in held.runs.values() if {run.id, run.mlflow_id} & set(rules.runs)}
    for stored in held.stored:
        run = held.runs.get(stored.run) or Run(stored.run, "", "unknown", 0.0, frozenset(), None)
        days = (now - stored.changed) / DAY
        newest = run.state == "finished" and run.started in kept
        why = _kept(stored, run, rules, run.id in selected, newest)
        if why is None and days < rules.older_than:
            why = f"younger than {rules.older_than:g} days"
        elif why is None and stored.kind == "attempt" and days < LIVE_DAYS:
            why = f"younger than {LIVE_DAYS:g} day: an attempt that may be at work"
        verdicts.setdefault(stored.uris[0], []).append(Verdict(stored, why is None, why or _GOES[stored.kind]))
    agreed = [_agreed(named) for named in verdicts.values()]
    return [verdict for verdict in agreed if not rules.runs or verdict.stored.run in selected]


def _agreed(verdicts: list[Verdict]) -> Verdict:
    """The verdict on files that several runs name: they go only when none of them needs them."""
    return next((verdict for verdict in verdicts if not verdict.goes), verdicts[0])


_GOES = {
    "attempt": "left by an attempt that died",
    "training": "training checkpoints of a step that ended",
    "dense": "imported model of a run that ended",
    "cut": "intermediate, cut",
    "recovered": "intermediate, recovered",
}


def _kept(stored: Stored, run: Run, rules: Rules, named: bool, newest: bool) -> str | None:
    """Why a folder stays, whatever its age; None: nothing needs it."""
    if stored.version:
        return f"registered: {stored.version}"
    if run.damaged:  # then what it committed cannot be told from what it did not
        return f"a record of the run cannot be read: {run.damaged}"
    if stored.kind == "attempt" and run.state == "finished" and stored.step not in run.done:
        return "its step has no record, though the run is finished"  # records were lost: it may be the result
    if stored.kind == "attempt":
        return None  # never read by anybody: a repeated step publishes under a fresh prefix
    if stored.kind == "training" and stored.step in run.done:
        return None
    if run.state != "finished":
        return None if named else _UNFINISHED[run.state]
    if run.final is None:
        return "the run's final checkpoint is not known"
    if stored.uris[0] == run.final:
        return "final checkpoint of its run"
    if stored.uris[0] == run.control:
        return "the control of its run"
    if stored.kind == "dense" and not rules.dense:
        return "imported model; --dense lets it go"
    return "one of the newest finished runs" if newest else None


_UNFINISHED = {
    "unfinished": "its run is not finished and can go on; --run lets it go",
    "deleted": "its run was deleted in MLflow; --run lets it go",
    "unknown": "MLflow does not know its run; --run lets it go",
}


def delete(held: Experiment, verdict: Verdict) -> bool:
    """Delete what a verdict lets go; a model in MLflow is marked first. Returns False for what was committed meanwhile.

    Raises InputError where the credentials may not delete.
    """
    stored = verdict.stored
    if not verdict.goes:
        raise ValueError(f"{stored.uris[0]} is to be kept: {verdict.why}")
    if stored.kind == "attempt" and _committed_meanwhile(held, stored):
        return False
    with tracking.explained():
        client = tracking.connect()
        if stored.model_id:
            moment = datetime.datetime.fromtimestamp(time.time(), datetime.UTC).isoformat(timespec="seconds")
            client.set_logged_model_tags(stored.model_id, {DELETED: moment})
        for uri in stored.uris:
            store.delete(uri, below=held.place)
        if stored.model_id and stored.kind == "attempt":
            client.delete_logged_model(stored.model_id)  # part of no lineage
    return True


def _committed_meanwhile(held: Experiment, stored: Stored) -> bool:
    """Whether a record names these files by now: a machine that slept may have committed after the listing."""
    above, _, name = stored.uris[0].rpartition("/")
    training = above == f"{held.root}/{stored.run}"  # then the record is that of one training checkpoint
    record = store.committed(held.root, stored.run, name.rpartition("-")[0] if training else stored.step)
    return record is not None and record["pointer"]["uri"] in stored.uris


def check_runs(wanted: list[str], found: list[Experiment]) -> None:
    """Raise InputError for a run that no experiment has."""
    known = {name for held in found for run in held.runs.values() for name in (run.id, run.mlflow_id)}
    for run in wanted:
        if run not in known:
            raise InputError(f"--run: no run {run!r}; give the id of a pipeline run, or of its parent run in MLflow")
