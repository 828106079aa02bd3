"""`ptl gc`: list which checkpoints can go, and delete them when told to."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ptl import garbage, inventory, runs
from ptl.cli_options import Home, Servers


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("gc")(gc)


def gc(
    experiment: Annotated[list[str], typer.Option(help="MLflow experiment; none: all with runs")] = [],  # noqa: B006
    run: Annotated[list[str], typer.Option(help="only this run; its checkpoints go even if it is not finished")] = [],  # noqa: B006
    older_than: Annotated[float, typer.Option(min=0, help="days since the last write; nothing younger goes")] = 7.0,
    keep_last: Annotated[int, typer.Option(min=0, help="newest finished runs per experiment that keep all")] = 0,
    dense: Annotated[bool, typer.Option("--dense", help="imported models of finished runs go too")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="delete; without it nothing is changed")] = False,
    s3: Servers = False,
    home: Home = Path(".ptl"),
) -> None:
    """List the checkpoints that nobody needs any more, with their bytes; --delete removes them.

    Final checkpoints, registered versions and what an unfinished run needs stay, and so do all records and scores.
    """
    runs.reach(home.absolute(), s3)
    found = list(inventory.experiments(experiment))
    garbage.check_runs(run, found)
    rules = garbage.Rules(older_than, keep_last, tuple(run), dense)
    now = time.time()
    count = total = 0
    for held in found:
        verdicts = garbage.apply_rules(held, rules, now)
        _show(held, verdicts)
        for verdict in (each for each in verdicts if each.deletable):
            if not delete or garbage.delete(held, verdict):
                count, total = count + 1, total + verdict.stored.bytes
    said = f"{count} items, {size(total)} ({total:,} bytes)"
    print(f"deleted: {said}" if delete else f"can go: {said}; nothing was deleted, --delete does it")


def _show(held: Any, verdicts: list[Any]) -> None:
    """For each run one line for everything that can go, and one for each reason to keep the rest."""
    print(f"experiment {held.name}, in {held.location}")
    by_run: dict[str, list[Any]] = defaultdict(list)
    for verdict in sorted(verdicts, key=lambda each: each.stored.changed):
        by_run[verdict.stored.run].append(verdict)
    for run, found in by_run.items():
        print(f"  run {run}")
        for verdict in (each for each in found if each.deletable):
            stored = verdict.stored
            days = (time.time() - stored.changed) / garbage.DAY
            print(f"    can go {size(stored.bytes):>9} {stored.step:16} {days:6.1f} days  {verdict.reason}")
        kept: dict[str, int] = defaultdict(int)
        for verdict in (each for each in found if not each.deletable):
            kept[verdict.reason] += verdict.stored.bytes
        for why, total in kept.items():
            print(f"    kept   {size(total):>9} {why}")


def size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
