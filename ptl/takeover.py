"""Results of an earlier run that a run with a corrected config takes over: only what the change affects is repeated.

`ptl run` names the earlier runs. What is taken is copied into this run, so that neither needs the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ptl import __version__, preempt, store, tracking
from ptl.errors import WorkError
from ptl.execution import Metadata, Work, scratch
from ptl.log import say
from ptl.manifest import FILES
from ptl.run_status import StepRun
from ptl.store import Pointer

EARLIER = "PTL_EARLIER_RUNS"  # ids of unfinished runs, the newest first
KEY = "content_key"  # among a record's metadata


def key(digest: str, settings: dict[str, Any]) -> str:
    """What a step's files depend on: the checkpoint, the settings, and the local files that these name."""
    return preempt.key_of(__version__, digest, settings, [_stamp(path) for path in sorted(set(_paths(settings)))])


def or_taken(work: Work, content_key: str) -> Work:
    """The same work, unless an earlier run has done it."""

    def taken(dst: Path, run: StepRun) -> Metadata:
        metadata = take(run, content_key, dst)
        return {**(work(dst, run) if metadata is None else metadata), KEY: content_key}

    return taken


def take(run: StepRun, content_key: str, dst: Path) -> Metadata | None:
    """Copy what an earlier run has committed for this step under the same key; returns its metadata, or None."""
    for name in os.environ.get(EARLIER, "").split():
        try:
            record = store.committed(run.root, name, run.step)
            if record is None or record["metadata"].get(KEY) != content_key:
                continue
            folder = store.fetch(Pointer(**record["pointer"]), scratch("cache"))
        except WorkError as error:
            say(run.step, f"not taken over from run {name}: {error}")
            continue
        shutil.copytree(folder, dst, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILES))
        say(run.step, f"taken over from run {name}: same inputs, same settings")
        tracking.tag(run, {"taken_over_from": name})
        return {fact: value for fact, value in record["metadata"].items() if fact != "started"}
    return None


def _paths(value: Any) -> Iterator[Path]:
    """Existing files and folders that settings name; not those that hold the working directory, `.` or `/`."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _paths(inner)
    elif isinstance(value, str) and "\n" not in value and 0 < len(value) < 256:
        path = Path(value).expanduser()
        if path.exists() and not Path.cwd().is_relative_to(path.resolve()):
            yield path


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, and of what is beside a YAML: it may include that; all of a folder's."""
    files = path.rglob("*") if path.is_dir() else path.parent.iterdir() if path.suffix in (".yaml", ".yml") else [path]
    found = [(str(file), file.stat()) for file in sorted(files) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
