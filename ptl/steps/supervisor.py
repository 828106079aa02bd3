"""The process of every component: it starts the step's work in a process of its own, and again after that has died.

It imports neither torch nor MLflow, so a crash of the work, an error of CUDA or NCCL, a signal or a hang leaves it
alive. It never tries again after an input error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ptl import processes
from ptl.config.dag import kind_of
from ptl.log import say
from ptl.steps import mounts
from ptl.steps.attempts import Failure, Policy, policy
from ptl.storage import local_files

PROCESS = "ptl.steps.process"  # the module that does the work
FAILURE_BYTES = 65536  # reserved for the reason of a failure, as the disk may be full by then
GRACE = 20  # seconds between SIGTERM and SIGKILL, where the pod lasts so long
# whether this process has imported what the work needs, so that a fork of it may do the work
forks = False

# Waits for the work, at most for a number of seconds; returns its exit code, negative for a signal, or raises
# subprocess.TimeoutExpired.
Wait = Callable[[float | None], int]


def run(given: Mapping[str, Any], outputs: Collection[str] = ()) -> None:
    """The body of every component, given its local variables and which of its artifacts are outputs.

    Ends the process with the step's exit code where it fails: 2 for an input error, 1 otherwise.
    """
    step = given["step"]
    for warning in mounts.load():
        say(step, warning)
    # All attempts in this pod are of one launch; the work's process inherits its name.
    os.environ.setdefault("PTL_LAUNCH", uuid.uuid4().hex)
    # A command that is killed takes the steps that it started with it.
    processes.follow_lifeline()
    # Neither an artifact that the pipeline lacks, nor this function, which the body has imported.
    given = {name: value for name, value in given.items() if value is not None and value is not run}
    paths = {name: artifact.path for name, artifact in given.items() if hasattr(artifact, "path")}
    call = {
        "settings": {name: value for name, value in given.items() if name not in paths},
        # Of an artifact only the file is read: it holds the pointer.
        "inputs": {
            name: Path(path).read_text() for name, path in paths.items() if name not in outputs
        },
        "outputs": {name: paths[name] for name in outputs},
    }
    # The work's process reads its call from a file, and writes its outputs or its failure beside it.
    try:
        with tempfile.TemporaryDirectory(prefix="ptl-step-") as folder:
            path = Path(folder, "call.json")
            path.write_text(json.dumps(call))
            failure = _until_done(path, step, policy())
            if failure is None:
                # KFP keeps it with its artifacts; their files are written already.
                for name, metadata in json.loads(
                    path.with_name("outputs.json").read_text()
                ).items():
                    given[name].metadata.update(metadata)
                return
    except OSError as error:
        if error.errno not in local_files.FULL:
            raise
        failure = Failure(str(local_files.no_space(error)))
    print(f"error: {step}: {failure.reason}", file=sys.stderr, flush=True)
    from ptl.steps.records import give_up

    give_up(call, failure, {name: given[name] for name in outputs})


def _until_done(call: Path, step: str, plan: Policy) -> Failure | None:
    """Try as often as the policy allows; returns why the last attempt failed, or None."""
    # The last attempt is followed by no pause.
    for retry in range(plan.retries):
        failure = _attempt(call, step, plan.timeout)
        if failure is None or failure.final:
            return failure
        pause = plan.pause * 2**retry
        say(step, f"failed: {failure.reason}; the next attempt begins in {pause:g} s")
        time.sleep(pause)
        mounts.load()
    return _attempt(call, step, plan.timeout)


def _attempt(call: Path, step: str, timeout: float | None) -> Failure | None:
    """Do the work once, in a process group of its own; None when it is done."""
    failure_file = call.with_name("failure.json")
    failure_file.write_text(" " * FAILURE_BYTES)
    group, wait = _start(call)
    with processes.handling_signals(processes.end_by_signal):
        # Whatever ends the wait ends the work: a pod that is deleted gets SIGTERM, a terminal sends SIGINT.
        try:
            exit_code = wait(timeout)
        except BaseException as end:
            _signal_group(group, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                wait(GRACE)
            if isinstance(end, subprocess.TimeoutExpired):
                return Failure(f"it did not end within {timeout:g} s (resources.timeout)")
            raise
        finally:
            # A crash leaves launchers, workers and loaders behind, which hold the GPU and this process's output.
            _signal_group(group, signal.SIGKILL)
    if exit_code == 0:
        return None
    # An error that was raised has left its reason in a file.
    with contextlib.suppress(ValueError):  # it died before it wrote why, or while it did
        return Failure(**json.loads(failure_file.read_text()))
    return Failure(_unexplained(exit_code, step))


def _start(call: Path) -> tuple[int, Wait]:
    """Start the work: its process group, to which a signal reaches all of its processes, and how to wait for it."""
    arguments = [PROCESS, str(call), str(os.getpid())]
    if not forks:
        popen = subprocess.Popen([sys.executable, "-m", *arguments], start_new_session=True)
        return popen.pid, popen.wait
    fork = multiprocessing.get_context("fork").Process(target=_be_work, args=(arguments,))
    fork.start()

    def wait(timeout: float | None) -> int:
        fork.join(timeout)
        if fork.exitcode is None:
            raise subprocess.TimeoutExpired(PROCESS, timeout or 0)
        return fork.exitcode

    return fork.pid or 0, wait


def _be_work(arguments: list[str]) -> None:
    """Be the process of the work, without what KFP's executor has done to this one."""
    os.setsid()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    sys.argv = arguments
    runpy.run_module(PROCESS, run_name="__main__", alter_sys=True)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _unexplained(exit_code: int, step: str) -> str:
    """How a process ended that has not written why; a negative code is the signal that killed it."""
    if exit_code > 0:
        return f"its process ended with exit code {exit_code} and without a word"
    # SIGSEGV or SIGABRT, for example: what the code has printed is in the log above.
    name = signal.Signals(-exit_code).name
    if name != "SIGKILL":
        return f"its process was killed by {name}"
    remedy = "free memory"
    if processes.on_a_cluster():
        # This field decides for the step whether it is set or not; a retry has the memory of the compiled pipeline.
        remedy = f"raise resources.steps.{kind_of(step)}.memory, or lower the batch size, and submit again"
    return (
        f"its process was killed by SIGKILL (what the kernel does when memory is used up: {remedy})"
    )
