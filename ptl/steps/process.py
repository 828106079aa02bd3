"""The process that does a step's work: ptl.steps.supervisor starts it with a call, and reads how it ended."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from ptl import processes
from ptl.address import without_login
from ptl.errors import PtlError, explained_imports
from ptl.steps import bars
from ptl.steps.attempts import Failure, NoAttemptLeftError
from ptl.storage import local_files

LESS_MEMORY = "lower calibration.batch_size or evaluate.batch_size, or raise recover.accumulation (`ptl plan`)"
WAIT = 30  # seconds for an earlier process of the same step to end


def main(path: Path, parent: int) -> None:
    """Do the work of the call in `path`; outputs and failure are written beside it."""
    processes.die_with(parent)
    call = json.loads(path.read_text())
    try:
        path.with_name("outputs.json").write_text(json.dumps(work(call)))
    except Exception as error:
        failure = failure_of(error)
        # whose room on the disk was taken before the work
        with path.with_name("failure.json").open("r+") as file:
            json.dump(dataclasses.asdict(failure), file)
        sys.exit(failure.exit_code)


def failure_of(error: Exception) -> Failure:
    """The failure of an attempt that ended with this error; one that is none of ours is printed with its traceback."""
    if isinstance(error, PtlError):
        return Failure(str(error), error.exit_code, isinstance(error, NoAttemptLeftError))
    # A bug, or a library.
    traceback.print_exc()
    if isinstance(error, OSError) and error.errno in local_files.FULL:
        return Failure(str(local_files.no_space(error)))
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        first_line = str(error).partition("\n")[0].rstrip(".")
        return Failure(f"{first_line}; {LESS_MEMORY}")
    return Failure(without_login(f"{type(error).__name__}: {error}"))


@explained_imports()
def work(call: dict[str, Any]) -> dict[str, Any]:
    """Do the step of a call as `Call.load` reads it; returns the metadata of its outputs."""
    from ptl.local import progress
    from ptl.steps import table
    from ptl.steps.call import Call
    from ptl.steps.step import scratch

    step = Call.load(call)
    bars.name(step.step)
    # A step of an earlier command ends with it; one that does not must not write into the same folder.
    with processes.exclusive(scratch(f"{step.step}.lock"), f"step {step.step}", wait=WAIT):
        progress.note(step.step, progress.RUNNING)
        table.STEPS[step.stage](step)
    return {name: output.metadata for name, output in step.outputs.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
