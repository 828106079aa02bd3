"""What a rehearsal says: before it which fields are smaller than in the run, after it what it has shown."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from ptl.config.rehearsal import changes, left_out, rehearsal
from ptl.config.run import Config
from ptl.local.run_directory import RunDir
from ptl.log import table_text


def announced(config: Config, gpus: int | None) -> tuple[Config, list[str]]:
    """The rehearsal of a run, whose differences are printed, and what of the run it leaves out.

    `gpus` are those of this machine; None: where the run itself will be, on a cluster.
    """
    rehearsed = rehearsal(config, gpus)
    rows = [[field, _text(before), _text(after)] for field, before, after in changes(config, rehearsed)]
    title = f"Rehearsal of {config.name}: every step, with less work"
    print(table_text(title, ["Field", "Run", "Rehearsal"], rows, numbers=("Run", "Rehearsal")))
    return rehearsed, left_out(config, rehearsed)


def _text(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "default" if value is None else str(value)


def options(sets: Sequence[str]) -> list[str]:
    """The overrides of a command, to be repeated in the next one."""
    return [word for entry in sets for word in ("--set", entry)]


def conclude(directory: RunDir, not_rehearsed: Sequence[str], arguments: Sequence[str]) -> None:
    """Print what the rehearsal has shown, and what comes next; `arguments` are those of a submit."""
    result = json.loads(directory.result.read_text())
    skipped = [step["step"] for step in result["not_needed"]]
    print("\nRehearsal: every step of the run works here. The numbers above mean nothing: hardly anything was trained.")
    if skipped:
        print(f"Not rehearsed, because the loop had ended: {', '.join(skipped)}.")
    print_left_out(not_rehearsed)
    print("Next, the run itself: here by the same command without --rehearse, on Kubeflow by")
    print(f"  ptl submit {shlex.join(arguments)}")


def print_left_out(parts: Sequence[str]) -> None:
    """Say what of a run its rehearsal does not try."""
    if parts:
        print(f"Not rehearsed: {', '.join(parts)}.")
