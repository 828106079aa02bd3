"""What a rehearsal says: before it which fields are smaller than in the run, after it what it has shown."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptl.cli.options import HOME
from ptl.config.rehearsal import Change, changes, left_out, rehearsal
from ptl.config.run import Config
from ptl.errors import WorkError
from ptl.local.run_directory import RunDir
from ptl.preflight import gpus


def here(config: Config) -> tuple[Config, list[str]]:
    """The rehearsal of a run on this machine, which is announced; and what of the run it leaves out."""
    return _announced(config, gpus.visible())


def on_cluster(config: Config) -> Config:
    """The rehearsal of a run where the run itself will be; it is announced with all that it leaves out."""
    rehearsed, not_rehearsed = _announced(config, None)
    _print_left_out(not_rehearsed)
    print("Its numbers will mean nothing. When it has succeeded, submit without --rehearse.")
    return rehearsed


def _announced(config: Config, num_gpus: int | None) -> tuple[Config, list[str]]:
    from rich.console import Console

    rehearsed = rehearsal(config, num_gpus)
    differences = changes(config, rehearsed)
    Console().print(_table(config.name, differences))
    return rehearsed, left_out(config, rehearsed)


def _table(name: str, differences: Sequence[Change]) -> Any:
    from rich.table import Table

    table = Table(title=f"Rehearsal of {name}: every step, with less work", title_justify="left")
    table.add_column("Field")
    table.add_column("Run", justify="right")
    table.add_column("Rehearsal", justify="right")
    for change in differences:
        table.add_row(change.field, _cell(change.run), _cell(change.rehearsal))
    return table


def _cell(values: Sequence[Any]) -> str:
    from rich.markup import escape

    return escape(", ".join(_text(value) for value in values))


def _text(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def options(sets: Sequence[str]) -> list[str]:
    """The overrides of a command, to be repeated in the next one."""
    return [word for entry in sets for word in ("--set", entry)]


def where(s3: bool, runner: str, home: Path) -> list[str]:
    """The options of `ptl run` that say where a run is executed and kept."""
    words = ["--s3"] if s3 else []
    if runner != "subprocess":
        words += ["--runner", runner]
    if home != HOME:
        words += ["--home", str(home)]
    return words


def conclude(
    directory: RunDir, not_rehearsed: Sequence[str], arguments: Sequence[str], run_options: Sequence[str]
) -> None:
    """Print what the rehearsal has shown, and what comes next; `arguments` and `run_options` are the command's own.

    Raises WorkError where the control arm failed: on a cluster a run ends without it, after all its hours.
    """
    result = json.loads(directory.result.read_text())
    if result["control_failed"]:
        steps = ", ".join(row["step"] for row in result["not_finished"]) or "control"
        raise WorkError(
            f"{steps} did not finish: {result['control_failed']}",
            field="the rehearsal",
            remedy="fix it and run the same command again",
        )
    skipped = [step["step"] for step in result["not_needed"]]
    print("\nRehearsal: every step of the run works here. The numbers above mean nothing: hardly anything was trained.")
    if skipped:
        print(f"Not rehearsed, because the loop had ended: {', '.join(skipped)}.")
    _print_left_out(not_rehearsed)
    print("Next, the run itself, on Kubeflow or on this machine:")
    print(f"  ptl submit {shlex.join(arguments)}\n  ptl run {shlex.join([*arguments, *run_options])}")


def _print_left_out(parts: Sequence[str]) -> None:
    if parts:
        print(f"Not rehearsed: {', '.join(parts)}.")
