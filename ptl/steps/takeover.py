"""Results of an earlier run that a run with a corrected config takes over: only what the change affects is repeated.

`ptl run` names the earlier runs. What is taken is copied into this run, so that neither needs the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from ptl import __version__
from ptl.errors import WorkError
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.steps.call import Metadata
from ptl.steps.machine import scratch
from ptl.storage import store
from ptl.storage.manifest import FILES
from ptl.storage.store import Pointer

EARLIER = "PTL_EARLIER_RUNS"  # ids of unfinished runs, the newest first
KEY = "content_key"  # among a record's metadata
LONGEST_PATH = 255  # characters of a setting that may name a file


def key(digest: str, settings: dict[str, Any]) -> str:
    """What a step's files depend on: the checkpoint, the settings, and the local files that these name."""
    # A path is the same after its content has changed: a corrected data file must be read again.
    settings = to_jsonable_python(settings)
    paths = sorted(set(_paths(settings)))
    return store.digest([__version__, digest, settings, [_stamps(path) for path in paths]])


def take(run: StepRun, content_key: str, dst: Path) -> Metadata | None:
    """Copy what an earlier run has committed for this step under the same key; returns its metadata, or None."""
    for earlier_run in os.environ.get(EARLIER, "").split():
        try:
            record = store.committed(run.root, earlier_run, run.step)
            if record is None or record["metadata"].get(KEY) != content_key:
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


def _paths(value: Any) -> Iterator[Path]:
    """Existing files and folders that settings name; not those that hold the working directory, `.` or `/`."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
    elif isinstance(value, str) and "\n" not in value and 0 < len(value) <= LONGEST_PATH:
        path = Path(value).expanduser()
        # A folder that holds the working directory is named by chance, and may be huge.
        if path.exists() and not Path.cwd().is_relative_to(path.resolve()):
            yield path


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change (ns) of a file, or of all files of a folder."""
    if path.is_dir():
        files = list(path.rglob("*"))
    elif path.suffix in (".yaml", ".yml"):
        files = list(path.parent.iterdir())  # a YAML may include what is next to it
    else:
        files = [path]
    stats = [(str(file), file.stat()) for file in sorted(files) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
