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
from ptl.config import dag
from ptl.log import MARK
from ptl.storage import local_files
from ptl.units import duration

# step -> its work by the forecast, 0 where that is not known; in the order of their execution
PLAN = "plan.json"
NOTES = "steps"  # folder with a note of each step that has begun
# a step
WAITING, RUNNING, DONE, NOT_NEEDED, FAILED = "waiting", "running", "done", "not needed", "failed"
INTERRUPTED = "interrupted"  # a run or a step whose command was killed
TAIL = 65536  # bytes at the end of a log in which the newest line of progress is looked for


@dataclass(frozen=True)
class Note:
    """What is known of one step."""

    state: str = WAITING
    since: float = 0.0  # unix time of the begin, or of the end of a step that has ended
    seconds: float | None = None  # that it took, in the run that has done it
    accuracy: float | None = None  # of an evaluation
    verdict: str = ""  # of an evaluation
    ends_loop: bool = False  # whether the later iterations are not needed
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
    work: dict[str, float]  # of each step by the forecast, in any unit; 0 where it is not known
    steps: dict[str, Note]  # all of the run, in the order of their execution
    newest_line: str  # of progress, while it is running

    @property
    def number(self) -> int:
        """The step that is at work, or would be the next one, counted from 1."""
        states = [note.state for note in self.steps.values()]
        for state in (RUNNING, INTERRUPTED):
            if state in states:
                return states.index(state) + 1
        ended = sum(state in (DONE, NOT_NEEDED) for state in states)
        return min(ended + 1, len(states))

    @property
    def position(self) -> str:
        """Like `step 7 of 19, about 12 min left`; the time only while it is running and steps have been measured."""
        if self.state == DONE:
            return f"{len(self.steps)} steps"
        seconds = self.seconds_left(time.time()) if self.state == RUNNING else None
        left = f", about {duration(seconds)} left" if seconds else ""
        return f"step {self.number} of {len(self.steps)}{left}"

    def seconds_left(self, now: float) -> float | None:
        """The wall-clock seconds until the last step ends; None before the first step of known work has ended.

        A step takes as long for its work as the steps of its kind have taken; before one of them has ended, as long as
        all steps together.
        """
        measured = [step for step, note in self.steps.items() if note.seconds and self.work[step]]
        if not measured:
            return None
        loop_has_ended = any(note.ends_loop for note in self.steps.values())
        seconds = 0.0
        for step, note in self.steps.items():
            is_needed = not (
                loop_has_ended and dag.arm_of(step) == "loop" and dag.iteration_of(step)
            )
            if note.state not in (WAITING, RUNNING, INTERRUPTED) or not is_needed:
                continue
            alike = [
                other for other in measured if dag.kind_of(other) == dag.kind_of(step)
            ] or measured
            rate = sum(self.steps[other].seconds or 0 for other in alike) / sum(
                self.work[other] for other in alike
            )
            expected = rate * self.work[step]
            begun = note.since if note.state == RUNNING else now
            seconds += max(0.0, expected - (now - begun))
        return seconds


def begin(folder: Path, work: Mapping[str, float]) -> None:
    """Keep the plan of a run: `work` of each step, as in `Progress`. Steps that are done note it once more."""
    shutil.rmtree(folder / NOTES, ignore_errors=True)
    local_files.replace(folder / PLAN, json.dumps(work).encode())


def position_of(step: str) -> str:
    """Where a step of a local run stands among all, in brackets: ` (step 7 of 19, about 12 min left)`; else empty."""
    folder = os.environ.get("PTL_RUN_DIR")
    run = read(Path(folder)) if folder else None
    return f" ({run.position})" if run and step in run.steps else ""


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
        work=plan,
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
