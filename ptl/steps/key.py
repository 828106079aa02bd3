"""What a step's result depends on: only what a change affects is done again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl import __version__
from ptl.config.base import Section
from ptl.config.recover import DataSource, RecoverStage
from ptl.config.run import Evaluate, ModelSource
from ptl.data import sources
from ptl.errors import InputError
from ptl.evaluation import tasks
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.storage import store
from ptl.storage.manifest import file_digest
from ptl.storage.store import Record


@dataclass(frozen=True)
class Key:
    """What a result depends on; the same digest means that it may be taken."""

    digest: str
    files: dict[str, str]  # name of each local file that is read, and what changes with its content


def key_of(parent: str, settings: dict[str, Any]) -> Key:
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
    elif isinstance(settings, RecoverStage) and settings.teacher:
        yield from ((str(path), file_digest(path)) for path in _files_in(settings.teacher))
    elif isinstance(settings, Section | dict):
        yield from _files(list(dict(settings).values()))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _files(value)


def _files_in(model: str | None) -> list[Path]:
    """The files of a model's folder; none of a hub id."""
    if model is None or not Path(model).is_dir():
        return []
    return [path for path in Path(model).iterdir() if path.is_file()]


def withdraw_outdated(run: StepRun, record: Record, key: Key) -> None:
    """Withdraw this run's result of a step, which was made from other files or settings: it is made again.

    Raises InputError where another version of ptl made it, or where the run is finished.
    """
    field = f"step {record.step} of run {run.run}"
    if record.version != __version__:
        raise InputError(
            f"done by ptl {record.version}, and this is ptl {__version__}",
            field=field,
            remedy=f"resume the run with ptl {record.version}, or start a new one",
        )
    reason = f"{_changed(record, key) or 'its input'} has changed since it was done"
    if store.committed(run.root, run.run, "report"):
        remedy = "restore what has changed, or start a new run"
        raise InputError(f"{reason}, and the run is finished", field=field, remedy=remedy)
    say(record.step, f"{reason}: it is done again")
    store.withdraw(run.root, run.run, record.step)


def check_same_files(run: StepRun, stage: str, key: Key) -> None:
    """Raise InputError where the first step of this kind has read another content of the same files.

    On one machine that step has been done again by now. A cluster does not repeat what has succeeded.
    """
    first = {"prune": "prune-1", "recover": "recover-1", "evaluate": "evaluate-0"}.get(stage)
    record = store.committed(run.root, run.run, first) if first and first != run.step else None
    changed = _changed(record, key) if record else ""
    if changed:
        raise InputError(
            f"{changed} has changed since {first} was done, whose result cannot be compared with this one's",
            field=run.step,
            remedy="restore it and retry, or start a new run, which takes over the steps that do not depend on it",
        )


def _changed(record: Record, key: Key) -> str:
    """Names of the files that have changed since a record was made, or were added or left out."""
    return ", ".join(sorted(dict(record.files.items() ^ key.files.items())))
