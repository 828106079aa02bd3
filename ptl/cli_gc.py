"""`ptl gc`: list which checkpoints can go, and delete them when told to."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ptl.errors import InputError


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
    s3: Annotated[bool, typer.Option("--s3", help="the runs of `ptl run --s3`: `ptl up`'s servers")] = False,
    home: Annotated[Path, typer.Option("--home", help="where local runs lie")] = Path(".ptl"),
) -> None:
    """List the checkpoints that nobody needs any more, with their bytes; --delete removes them.

    Final checkpoints, registered versions and what an unfinished run needs stay, and so do all records and scores.
    """
    from ptl import garbage, inventory

    _reach(home.absolute(), s3)
    found = list(inventory.experiments(experiment))
    garbage.check_runs(run, found)
    rules = garbage.Rules(older_than, keep_last, tuple(run), dense)
    now = time.time()
    count = total = 0
    for held in found:
        verdicts = garbage.decide(held, rules, now)
        _show(held, verdicts)
        for verdict in (each for each in verdicts if each.goes):
            if not delete or garbage.delete(held, verdict):
                count, total = count + 1, total + verdict.stored.bytes
    said = f"{count} items, {size(total)} ({total:,} bytes)"
    print(f"deleted: {said}" if delete else f"can go: {said}; nothing was deleted, --delete does it")


def _reach(home: Path, s3: bool) -> None:
    """The environment that leads to MLflow: the caller's own, `ptl up`'s servers, or the database of local runs."""
    from ptl import runs

    if s3:
        if not (home / "stack").is_dir():
            raise InputError(f"--s3: no `ptl up` was ever made in {home}; give --home, or leave --s3 out")
        runs.use(runs.start_servers(home))
    elif not os.environ.get("MLFLOW_TRACKING_URI"):
        database = home / "mlflow.db"
        if not database.is_file():
            more = "; --s3 is for the runs of its servers" if (home / "stack").is_dir() else ""
            raise InputError(f"--home: no local runs in {home} (no {database.name}){more}, or set MLFLOW_TRACKING_URI")
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{database}"


def _show(held: Any, verdicts: list[Any]) -> None:
    """A table of what can go, and one line for each reason to keep the rest."""
    from rich.console import Console
    from rich.table import Table

    goes = [verdict for verdict in verdicts if verdict.goes]
    console = Console(highlight=False)
    console.print(f"Experiment {held.name}: {len(held.runs)} runs in {held.root.removesuffix('/ptl')}", soft_wrap=True)
    table = Table("Run", "Step", "Why it can go", "Size", "Days old")
    for verdict in sorted(goes, key=lambda each: (each.stored.run, each.stored.changed)):
        stored = verdict.stored
        days = f"{(time.time() - stored.changed) / 86400:.1f}"
        table.add_row(stored.run, stored.step, verdict.why, size(stored.bytes), days)
    if goes:
        console.print(table)
    kept: dict[str, list[int]] = defaultdict(list)
    for verdict in verdicts:
        if not verdict.goes:
            kept[f"{verdict.stored.run}: {verdict.why}"].append(verdict.stored.bytes)
    for why, sizes in sorted(kept.items()):
        console.print(f"  kept: {size(sum(sizes))}, {why}", soft_wrap=True)


def size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
