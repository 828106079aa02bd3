"""How far a run of this machine is: its plan, and what each of its steps notes in the run's directory.

A second terminal reads it while the run is at work, without MLflow and without the store.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from ptl import processes
from ptl.log import MARK
from ptl.storage import local_files

PLAN = "plan.json"  # step -> its work by the forecast, in the order of their execution
NOTES = "steps"  # folder with a note of each step that has begun
WAITING, RUNNING, DONE, NOT_NEEDED, FAILED = "waiting", "running", "done", "not needed", "failed"  # a step
INTERRUPTED = "interrupted"  # a run or a step whose command was killed
TAIL = 65536  # bytes at the end of a log in which the newest line of progress is looked for


@dataclass(frozen=True)
class Note:
    """What is known of one step."""

    state: str = WAITING
    since: float = 0.0  # unix time of the begin, or of the end of a step that has ended
    seconds: float | None = None  # of work
    accuracy: float | None = None  # of an evaluation
    verdict: str = ""  # of an evaluation
    summary: str = ""  # of what the step has made
    taken_over_from: str = ""  # id of an earlier run that has done the work
    error: str = ""  # why it failed


@dataclass(frozen=True)
class Progress:
    """A run of this machine as it is now."""

    run_id: str
    folder: Path
    state: str  # running, done, failed or interrupted
    begun: float  # unix time of the command that executes it, or was the last to do so
    steps: dict[str, Note]  # all of the run, in the order of their execution
    newest_line: str  # of progress, while it is running

    @property
    def number(self) -> int:
        """The step that is at work, or would be the next one, counted from 1."""
        ended = sum(note.state in (DONE, NOT_NEEDED) for note in self.steps.values())
        return min(ended + 1, len(self.steps))


def begin(folder: Path, plan: Mapping[str, float]) -> None:
    """Keep the plan of a run, each step with its work by the forecast; steps that are done note it once more."""
    shutil.rmtree(folder / NOTES, ignore_errors=True)
    local_files.replace(folder / PLAN, json.dumps(plan).encode())


def note(step: str, state: str, *, since: float | None = None, **fields: Any) -> None:
    """Note the state of a step; nothing on a cluster, where others watch the run."""
    folder = os.environ.get("PTL_RUN_DIR")
    if folder:
        content = Note(state, time.time() if since is None else since, **fields)
        path = Path(folder, NOTES, f"{step}.json")
        path.parent.mkdir(exist_ok=True)
        local_files.replace(path, json.dumps(asdict(content)).encode())


def read(folder: Path) -> Progress | None:
    """The progress of the run in a directory; None where it has not begun."""
    plan = _json(folder / PLAN)
    if plan is None:
        return None
    is_running = any(map(processes.is_locked, folder.glob("lifeline-*")))
    steps = {step: _note(folder, step, is_running) for step in plan}
    state = RUNNING
    if not is_running:
        state = _end(folder)
    return Progress(
        run_id=folder.name,
        folder=folder,
        state=state,
        begun=(folder / PLAN).stat().st_mtime,
        steps=steps,
        newest_line=_newest_line(folder / "log.txt") if is_running else "",
    )


def newest(home: Path, count: int) -> list[Progress]:
    """The runs of a home that began last, the newest first."""
    runs = [run for run in map(read, (home / "runs").glob("*")) if run]
    return sorted(runs, key=attrgetter("begun"), reverse=True)[:count]


def _end(folder: Path) -> str:
    """How a run ended whose command is not at work."""
    if (folder / "error.json").is_file():
        return FAILED
    return DONE if (folder / "result.json").is_file() else INTERRUPTED


def _note(folder: Path, step: str, is_running: bool) -> Note:
    """What is known of a step; one that was killed cannot note its end."""
    fields = _json(folder / NOTES / f"{step}.json")
    if fields is None:
        return Note()
    latest = Note(**fields)
    is_killed = latest.state == RUNNING and not is_running
    return replace(latest, state=INTERRUPTED) if is_killed else latest


def _json(path: Path) -> dict[str, Any] | None:
    """The content of a file that is written at once, or None where it is not there."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def _newest_line(log: Path) -> str:
    """The last line of progress in the log of a run, as `ptl run` shows it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    marked = [line.strip().removeprefix(MARK) for line in lines if line.strip().startswith(MARK)]
    return marked[-1] if marked else ""
