"""`ptl gc`: list the checkpoints that nobody needs any more, and delete them with --delete."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from ptl import processes
from ptl.cli.options import HOME, Home, Servers
from ptl.lineage import inventory, retention
from ptl.lineage.inventory import ExperimentInventory
from ptl.lineage.retention import Retention
from ptl.local import runs
from ptl.units import size


def gc(
    experiment: Annotated[list[str], typer.Option(help="MLflow experiment; default: all that have runs")] = [],  # noqa: B006
    run: Annotated[
        list[str], typer.Option(help="only this run; includes its checkpoints even if it is unfinished")
    ] = [],  # noqa: B006
    older_than: Annotated[float, typer.Option(min=0, help="days since the last write; anything newer is kept")] = 7.0,
    keep_last: Annotated[
        int, typer.Option(min=0, help="newest finished runs of each experiment that keep all checkpoints")
    ] = 0,
    dense: Annotated[bool, typer.Option("--dense", help="include the imported models of finished runs")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="delete; without this option nothing is changed")] = False,
    s3: Servers = False,
    home: Home = HOME,
) -> None:
    """List the checkpoints that are no longer needed, with their sizes; --delete removes them.

    Final checkpoints, registered versions and what an unfinished run needs are kept, as are all records and scores.
    """
    runs.reach(home.absolute(), s3)
    experiments = list(inventory.experiments(experiment))
    # Wrong names are refused before anything is deleted.
    retention.check_runs(run, experiments)
    with contextlib.ExitStack() as stack:
        if delete:
            known = [each for stored in experiments for each in stored.runs.values()]
            _hold(stack, home, [each.id for each in known if each.id in run or each.mlflow_id in run])
        _collect(experiments, retention.Rules(older_than, keep_last, tuple(run), dense), delete)


def _hold(stack: contextlib.ExitStack, home: Path, run_ids: list[str]) -> None:
    """Take the locks of runs of this machine. Raises InputError for one that is at work."""
    for run_id in run_ids:
        lock = home.absolute() / "runs" / run_id / "lock"
        if lock.exists():
            stack.enter_context(processes.exclusive(lock, f"run {run_id}", remedy="end it first, or wait for it"))


def _collect(experiments: list[ExperimentInventory], rules: retention.Rules, delete: bool) -> None:
    """Print what can go and what stays; with `delete` it goes."""
    now = time.time()
    removed_bytes: list[int] = []  # of each checkpoint
    for stored_experiment in experiments:
        retentions = retention.apply_rules(stored_experiment, rules, now)
        print(f"experiment {stored_experiment.name}, in {stored_experiment.location}")
        _print_verdicts(retentions, now)
        deletable = [judged for judged in retentions if judged.deletable]
        if delete:  # which may find that a checkpoint is needed by now
            deletable = [judged for judged in deletable if retention.delete(stored_experiment, judged)]
        removed_bytes += [judged.stored.bytes for judged in deletable]
    num_bytes = sum(removed_bytes)
    summary = f"{len(removed_bytes)} items, {size(num_bytes)} ({num_bytes:,} bytes)"
    print(f"deleted: {summary}" if delete else f"can go: {summary}; nothing was deleted, --delete does it")


def _print_verdicts(retentions: list[Retention], now: float) -> None:
    """For each run one line for everything that can go, and one for each reason to keep the rest."""
    # The oldest first, in each run too.
    by_run: dict[str, list[Retention]] = defaultdict(list)
    for judged in sorted(retentions, key=attrgetter("stored.changed")):
        by_run[judged.stored.run].append(judged)
    for run_id, run_verdicts in by_run.items():
        print(f"  run {run_id}")
        kept_bytes: dict[str, int] = defaultdict(int)  # by reason
        for judged in run_verdicts:
            stored = judged.stored
            if judged.deletable:
                days = (now - stored.changed) / retention.DAY
                print(f"    can go {size(stored.bytes):>9} {stored.step:16} {days:6.1f} days  {judged.reason}")
            else:
                kept_bytes[judged.reason] += stored.bytes
        for reason, num_bytes in kept_bytes.items():
            print(f"    kept   {size(num_bytes):>9} {reason}")
