"""One of the processes that train together: launch.py starts it with a job, and reads its report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ptl.config.recover import RecoverStage
from ptl.errors import PtlError, explained_imports
from ptl.processes import die_with_tied
from ptl.recovery.launch import CHECKPOINT, ERROR_FILE, HANDOVER, JOB, METRICS, REPORT_FILE
from ptl.recovery.recover import RECOVERIES
from ptl.storage import local_files

POLL = 0.05  # seconds


def main(job_file: Path) -> None:
    """Train as the job says; the first process of a machine writes the report, and whichever fails first its error."""
    die_with_tied()
    if os.environ.get("RANK", "0") == "0":
        print("all training processes have started: importing libraries, loading the model", flush=True)
    fields = json.loads(job_file.read_text())
    settings = RecoverStage.model_validate(fields["settings"])
    # the job's functions write to the launching process
    functions: dict[str, Any] = {"on_log": _print_metrics}
    if fields["stores_checkpoints"]:
        functions["save_checkpoint"] = _hand_over
    job = JOB.validate_python(fields["job"] | functions)
    try:
        with explained_imports():
            report = RECOVERIES[settings.method](Path(fields["src"]), Path(fields["dst"]), settings, job)
    except PtlError as error:
        # the launching process raises it again; what follows in the other processes is its consequence
        parts = {**vars(error), "exit_code": error.exit_code}
        with contextlib.suppress(FileExistsError), (job.scratch / ERROR_FILE).open("x") as file:
            json.dump(parts, file)
        raise
    # the others have the same numbers
    if os.environ.get("LOCAL_RANK", "0") == "0":
        local_files.replace(job.scratch / REPORT_FILE, json.dumps(dataclasses.asdict(report)).encode())


def _print_metrics(metrics: dict[str, float], step: int) -> None:
    _send(METRICS, [metrics, step])


def _hand_over(folder: Path) -> None:
    """Have the launching process store a training checkpoint, and wait for it: the Trainer deletes older ones."""
    handover = folder.parent / HANDOVER
    handover.touch()
    _send(CHECKPOINT, str(folder))
    while handover.exists():
        time.sleep(POLL)


def _send(mark: str, value: Any) -> None:
    """A line for the launching process, in one write and on a line of its own: all processes share its pipe."""
    sys.stdout.flush()
    os.write(1, f"\n{mark}{json.dumps(value)}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
