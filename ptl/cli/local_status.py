"""What `ptl status` prints of the runs of this machine, from what their directories hold."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from ptl.errors import InputError
from ptl.lineage import locate
from ptl.local import progress
from ptl.local.progress import Note, Progress
from ptl.log import table_text

NEWEST = 10  # runs that are listed
NUMBERS = ("Seconds", "Accuracy")


def find(reference: str, home: Path) -> Progress | None:
    """The run of this machine that a user names by its id or its directory; None where there is none of this name."""
    named = locate.run_directory(reference)
    return progress.read(named.resolve() if named else home / "runs" / reference)


def list_runs(home: Path) -> list[Progress]:
    """The newest runs of a home. Raises InputError where there are none."""
    runs = progress.newest(home, NEWEST)
    if not runs:
        raise InputError(
            f"no run is named, and there are none in {home}",
            field="run",
            remedy="give the id of a run on a cluster, or the --home of local runs",
        )
    return runs


def runs_table(runs: list[Progress], home: Path) -> str:
    """One line for each run."""
    rows = [[run.run_id, run.state, run.position, _time(run.begun)] for run in runs]
    return table_text(f"Runs in {home}", ["Run", "State", "Step", "Since"], rows)


def text(run: Progress) -> str:
    """The steps of a run as a table, why one failed, and how far the run is."""
    rows = [[step, *_cells(note)] for step, note in run.steps.items()]
    headings = ["Step", "State", "Since", *NUMBERS, "Result"]
    lines = [table_text(run.run_id, headings, rows, numbers=NUMBERS)]
    # Reasons are longer than a cell of the table.
    lines += [f"{step}: {note.error}" for step, note in run.steps.items() if note.error]
    if run.newest_line:
        lines.append(run.newest_line)
    lines.append(
        f"{run.run_id}: {run.state}, {run.position}; {run.folder / 'log.txt'} has everything it has printed"
    )
    return "\n".join(lines)


def document(run: Progress) -> dict[str, Any]:
    """The run as JSON."""
    steps = [{"step": step, **asdict(note)} for step, note in run.steps.items()]
    about_run = {
        "run_id": run.run_id,
        "state": run.state,
        "folder": str(run.folder),
        "begun": run.begun,
    }
    left = run.seconds_left(time.time()) if run.state == progress.RUNNING else None
    return {
        **about_run,
        "step": run.number,
        "of": len(run.steps),
        "seconds_left": left,
        "steps": steps,
    }


def _cells(note: Note) -> list[str]:
    """A step's line after its name."""
    seconds = "" if note.seconds is None or note.taken_over_from else f"{note.seconds:.0f}"
    accuracy = "" if note.accuracy is None else f"{note.accuracy:.3f}"
    origin = f"taken over from {note.taken_over_from}" if note.taken_over_from else ""
    result = ", ".join(filter(None, [note.verdict, note.summary, origin]))
    return [note.state, _time(note.since) if note.since else "", seconds, accuracy, result]


def _time(moment: float) -> str:
    """The local time, with the date of another day."""
    then = datetime.fromtimestamp(moment)
    form = "%H:%M:%S" if then.date() == datetime.now().date() else "%Y-%m-%d %H:%M"
    return then.strftime(form)
