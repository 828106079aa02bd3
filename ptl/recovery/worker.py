"""One of the processes that train together: launch.py starts it with a job, and reads its report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path

from ptl.errors import PtlError, explained_imports
from ptl.processes import die_with_tied
from ptl.recovery.job import REPORT
from ptl.recovery.launch import ERROR_FILE, METRICS, REPORT_FILE
from ptl.recovery.recover import RECOVERIES
from ptl.storage import local_files


def main(job_file: Path) -> None:
    """Train as the job says; the first process of a machine writes the report, and whichever fails first its error."""
    die_with_tied()
    if os.environ.get("RANK", "0") == "0":
        print(
            "all training processes have started: importing libraries, loading the model",
            flush=True,
        )
    src, dst, settings, job = pickle.loads(job_file.read_bytes())
    job = dataclasses.replace(job, on_log=_print_metrics)
    try:
        with explained_imports():
            report = RECOVERIES[settings.method](src, dst, settings, job)
    except PtlError as error:
        # the launching process raises it again; what follows in the other processes is its consequence
        parts = {**vars(error), "exit_code": error.exit_code}
        with contextlib.suppress(FileExistsError), (job.scratch / ERROR_FILE).open("x") as file:
            json.dump(parts, file)
        raise
    # the others have the same numbers
    if os.environ.get("LOCAL_RANK", "0") == "0":
        local_files.replace(job.scratch / REPORT_FILE, REPORT.dump_json(report))


def _print_metrics(metrics: dict[str, float], step: int) -> None:
    """A line for the launching process, in one write and on a line of its own: all processes share its pipe."""
    sys.stdout.flush()
    os.write(1, f"\n{METRICS}{json.dumps([metrics, step])}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
