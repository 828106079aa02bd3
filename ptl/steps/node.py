"""One node of a TrainJob: it does its part of a recover step. The first one publishes, commits and reports the result.

JobSet starts all nodes again when one of them fails, unless its exit code says that the input is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from ptl import processes
from ptl.log import say
from ptl.recovery.job import machines
from ptl.steps import mounts, process, trainjob


def main() -> None:
    """Do the step of the call in the environment; a failure is this container's last words."""
    call = json.loads(os.environ.pop(trainjob.CALL))
    step = call["settings"]["step"]
    group = machines()
    # Whoever waits for the first line of training sees what it waits for.
    say(step, f"node {group.rank} of {group.count} (from 0): importing libraries")
    for warning in mounts.load():
        say(step, warning)
    try:
        # The first process of a container ignores a signal that it does not handle.
        with (
            processes.handling_signals(processes.end_by_signal),
            tempfile.TemporaryDirectory(prefix="ptl-node-") as folder,
        ):
            process.work({**call, "outputs": {"out": f"{folder}/out"}})
    except Exception as error:
        failure = process.failure_of(error)
        print(f"error: {step}: {failure.reason}", file=sys.stderr, flush=True)
        # Outside of Kubernetes there is nobody to read them.
        with contextlib.suppress(OSError):
            words = trainjob.last_words(failure.reason, failure.exit_code)
            Path(os.environ.get("PTL_TERMINATION_LOG", trainjob.TERMINATION_LOG)).write_text(words)
        sys.exit(failure.exit_code)


if __name__ == "__main__":
    main()
