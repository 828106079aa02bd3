"""`ptl gc`: list the checkpoints that nobody needs any more, and delete them with --delete."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from ptl import processes
from ptl.cli.options import HOME, Home, Servers
from ptl.lineage import locate, retention
from ptl.lineage.retention import StoredFiles
from ptl.local import runs
from ptl.units import size


def gc(
    experiment: Annotated[list[str], typer.Option(help="MLflow experiment; default: all that have runs")] = [],  # noqa: B006
    run: Annotated[
        list[str], typer.Option(help="only this run; includes its checkpoints even if it is unfinished")
    ] = [],  # noqa: B006
    older_than: Annotated[float, typer.Option(min=0, help="days since the last write; anything newer is kept")] = 7.0,
    delete: Annotated[bool, typer.Option("--delete", help="delete; without this option nothing is changed")] = False,
    s3: Servers = False,
    home: Home = HOME,
) -> None:
    """List the checkpoints that are no longer needed, with their sizes; --delete removes them.

    Final checkpoints, exports, registered versions and what an unfinished run needs are kept, as are all records and
    scores.
    """
    runs.reach(home.absolute(), s3)
    removed: list[StoredFiles] = []
    # Wrong names are refused before anything is deleted.
    given_up = [locate.find_run(name)[0].id for name in run]
    experiments = retention.inventory(experiment, given_up, older_than)
    with contextlib.ExitStack() as stack:
        for files in experiments:
            print(f"experiment {files.name}, in {files.location}")
            _print_list(files.stored)
            unneeded = [stored for stored in files.stored if not stored.needed]
            removed += unneeded
            if delete:
                _hold(stack, home, {stored.run for stored in unneeded})
                for stored in unneeded:
                    retention.delete(files, stored)
    num_bytes = sum(stored.bytes for stored in removed)
    summary = f"{len(removed)} items, {size(num_bytes)} ({num_bytes:,} bytes)"
    print(f"deleted: {summary}" if delete else f"can go: {summary}; nothing was deleted, --delete does it")


def _hold(stack: contextlib.ExitStack, home: Path, run_ids: set[str]) -> None:
    """Take the locks of runs of this machine. Raises InputError for one that is at work."""
    for run_id in sorted(run_ids):
        lock = home.absolute() / "runs" / run_id / "lock"
        if lock.exists():
            stack.enter_context(processes.exclusive(lock, f"run {run_id}", remedy="end it first, or wait for it"))


def _print_list(stored: list[StoredFiles]) -> None:
    """For each run one line for everything that can go, and one for each reason to keep the rest."""
    # The oldest first in each run.
    for run_id, run_files in groupby(sorted(stored, key=attrgetter("run", "changed")), attrgetter("run")):
        print(f"  run {run_id}")
        kept_bytes: Counter[str] = Counter()  # by reason
        for files in run_files:
            if files.needed:
                kept_bytes[files.needed] += files.bytes
                continue
            days = (time.time() - files.changed) / retention.DAY
            print(f"    can go {size(files.bytes):>9} {files.step:16} {days:6.1f} days")
        for reason, num_bytes in kept_bytes.items():
            print(f"    kept   {size(num_bytes):>9} {reason}")
