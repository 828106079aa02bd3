"""What a step's result depends on, and earlier results that have the same: only what a change affects is repeated.

Within a run a committed result is taken again under the same key. A run with a corrected config takes over, as copies,
what the unfinished runs that import-model was given have committed under it, so that neither needs the other.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl import __version__
from ptl.config.base import Section
from ptl.config.recover import DataSource, Distil
from ptl.config.run import Evaluate, ModelSource
from ptl.data import sources
from ptl.errors import InputError, WorkError
from ptl.evaluation import tasks
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.steps.call import Metadata
from ptl.steps.machine import scratch
from ptl.storage import store
from ptl.storage.manifest import FILES, file_digest
from ptl.storage.store import Pointer

SCORES = "scores_key"  # among an evaluation's metadata: its scores depend on less than its verdict


@dataclass(frozen=True)
class Key:
    """What a result depends on; the same digest means that it may be taken."""

    digest: str
    files: dict[str, str]  # name of each local file that is read, and what changes with its content


def key(parent: str, settings: Metadata) -> Key:
    """The key of a step by its checkpoint's digest, its settings, and the content of the files that these name.

    Raises InputError for a file that is not there.
    """
    files = dict(_files(settings))
    return Key(store.digest([__version__, parent, settings, files]), files)


def _files(settings: Any) -> Iterator[tuple[str, str]]:
    """Name of each file that settings read, and what changes with its content."""
    if isinstance(settings, DataSource):
        digest = sources.content_digest(settings)
        if digest is not None:
            yield settings.source, digest
    elif isinstance(settings, Evaluate):
        yield from ((str(path), file_digest(path)) for path in tasks.files(settings))
    elif isinstance(settings, ModelSource):
        # Of weights a stamp will do, and saves reading them once more: after a new import of the same bytes, which have
        # the same digest, no other step is repeated.
        for path in _files_in(settings.path):
            stat = path.stat()
            is_large = path.suffix == ".safetensors"
            yield str(path), f"{stat.st_size} {stat.st_mtime_ns}" if is_large else file_digest(path)
    elif isinstance(settings, Distil):
        yield from ((str(path), file_digest(path)) for path in _files_in(settings.teacher))
    elif isinstance(settings, Section):
        yield from _files(dict(settings))
    elif isinstance(settings, dict):
        yield from _files(list(settings.values()))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _files(value)


def _files_in(model: str | None) -> list[Path]:
    """The files of a model's folder; none of a hub id."""
    if model is None or not Path(model).is_dir():
        return []
    return [path for path in Path(model).iterdir() if path.is_file()]


def record(key: Key, pointer: Pointer, metadata: Metadata) -> store.Record:
    """What a step commits."""
    return {
        "key": key.digest,
        "version": __version__,
        "files": key.files,
        "pointer": dataclasses.asdict(pointer),
        "metadata": metadata,
    }


def withdraw_outdated(run: StepRun, current: Key) -> None:
    """Withdraw this run's own result where it was made from other files or settings: the step is made again.

    Raises InputError where another version of ptl made it, or where the run is finished.
    """
    record = store.committed(run.root, run.run, run.step)
    if record is None:
        return
    if record["version"] != __version__:
        raise InputError(
            f"done by ptl {record['version']}, and this is ptl {__version__}",
            field=f"step {run.step} of run {run.run}",
            remedy=f"resume the run with ptl {record['version']}, or start a new one",
        )
    reason = f"{_changed(record, current) or 'its input'} has changed since it was done"
    if store.committed(run.root, run.run, "report"):
        raise InputError(
            f"{reason}, and the run is finished",
            field=f"step {run.step} of run {run.run}",
            remedy="restore what has changed, or start a new run",
        )
    say(run.step, f"{reason}: it is done again")
    store.withdraw(run.root, run.run, run.step)


def check_same_files(run: StepRun, stage: str, current: Key) -> None:
    """Raise InputError where the first step of this kind has read another content of the same files.

    On one machine that step has been done again by now. A cluster does not repeat what has succeeded.
    """
    first = {"prune": "prune-1", "recover": "recover-1", "evaluate": "evaluate-0"}.get(stage, run.step)
    record = None if first == run.step else store.committed(run.root, run.run, first)
    changed = _changed(record, current) if record else ""
    if changed:
        raise InputError(
            f"{changed} has changed since {first} was done, whose result cannot be compared with this one's",
            field=run.step,
            remedy="restore it and retry, or start a new run, which takes over the steps that do not depend on it",
        )


def _changed(record: store.Record, current: Key) -> str:
    """Names of the files that have changed since a record was made, or were added or left out."""
    before, now = record["files"], current.files
    return ", ".join(sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)))


def take(run: StepRun, key: str, dst: Path) -> Metadata | None:
    """Copy what an earlier run has committed for this step under the same key; returns its metadata, or None."""
    for earlier_run in run.earlier:
        try:
            record = store.committed(run.root, earlier_run, run.step)
            if record is None or key not in (record["key"], record["metadata"].get(SCORES)):
                continue
            folder = store.fetch(Pointer(**record["pointer"]), scratch("cache"))
        except WorkError as error:
            # Damaged files of another run are no reason to fail: the step does the work itself.
            say(run.step, f"not taken over from run {earlier_run}: {error}")
            continue
        # Without the list of files: the copy is published with one of its own.
        shutil.copytree(folder, dst, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILES))
        say(run.step, f"taken over from run {earlier_run}: same inputs, same settings")
        tracking.tag(run, {"taken_over_from": earlier_run})
        metadata: Metadata = record["metadata"]
        metadata.pop("started")  # this step's own start counts
        return metadata
    return None
