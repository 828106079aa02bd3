"""The process of every component: it starts the step's work in a process of its own, and again after that has died.

It imports neither torch nor MLflow, so a crash of the work, an error of CUDA or NCCL, a signal or a hang leaves it
alive. It never tries again after an input error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptl import fork_server, processes
from ptl.log import say
from ptl.steps import mounts
from ptl.steps.attempts import NO_SPACE, Failure, Policy, on_a_cluster, policy
from ptl.storage import local_files

# Artifacts that a step reads; it writes all others.
INPUTS = ("model", "dense", "fallback", "final", "control")
PROCESS = "ptl.steps.process"  # the module that does the work
Work = subprocess.Popen[bytes] | fork_server.Forked
GRACE = 20  # seconds between SIGTERM and SIGKILL, where the pod lasts so long


def run(names: dict[str, Any]) -> None:
    """The body of every component: `names` are its locals, that is its arguments, and this module's own name.

    Ends the process with the step's exit code where it fails: 2 for an input error, 1 otherwise.
    """
    arguments = dict(names)
    arguments.pop("supervisor", None)
    step = str(arguments["step"])
    for warning in mounts.load():
        say(step, warning)
    # All attempts in this pod are of one launch; the work's process inherits its name.
    os.environ.setdefault("PTL_LAUNCH", uuid.uuid4().hex)
    # A command that is killed takes the steps that it started with it.
    processes.follow_lifeline()
    # The work's process reads its call from a file, and writes its outputs or its failure beside it.
    try:
        with tempfile.TemporaryDirectory(prefix="ptl-step-") as folder:
            call = Path(folder, "call.json")
            call.write_text(json.dumps(_call_of(arguments)))
            failure = _until_done(call, step, policy())
            if failure is None:
                # KFP keeps it with its artifacts; their files are written already.
                for name, metadata in json.loads(call.with_name("outputs.json").read_text()).items():
                    arguments[name].metadata.update(metadata)
    except OSError as error:
        if error.errno not in local_files.FULL:
            raise
        failure = Failure(str(local_files.no_space(error)))
    if failure is not None:
        _give_up(arguments, failure)


def _until_done(call: Path, step: str, plan: Policy) -> Failure | None:
    """Try as often as the policy allows; returns why the last attempt failed, or None."""
    # The last attempt is followed by no pause.
    for retry in range(plan.retries):
        failure = _attempt(call, plan.timeout)
        if failure is None or failure.final:
            return failure
        pause = plan.pause * 2**retry
        say(step, f"failed: {failure.reason}; the next attempt begins in {pause:g} s")
        time.sleep(pause)
    return _attempt(call, plan.timeout)


def _call_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call for the process that does the work: plain values, and the files of its artifacts."""
    call: dict[str, Any] = {"settings": {}, "inputs": {}, "outputs": {}}
    for name, value in arguments.items():
        if hasattr(value, "metadata"):
            kind = "inputs" if name in INPUTS else "outputs"
            call[kind][name] = value.path
        # None: an optional artifact that the pipeline does not have.
        elif value is not None:
            call["settings"][name] = value
    return call


def _attempt(call: Path, timeout: float | None) -> Failure | None:
    """Do the work once, in a process group of its own; None when it is done."""
    failure_file = call.with_name("failure.json")
    failure_file.unlink(missing_ok=True)
    # A session of its own: a signal to this process is passed on, and all of the work's processes end together.
    process = fork_server.start(PROCESS, str(call)) or subprocess.Popen(
        [sys.executable, "-m", PROCESS, str(call), str(os.getpid())],
        start_new_session=True,
    )
    try:
        with _ending_together(process):
            exit_code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return Failure(f"it did not end within {timeout:g} s (resources.timeout)")
    finally:
        # A crash leaves launchers, workers and loaders behind, which hold the GPU and this process's output.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if exit_code == 0:
        return None
    if exit_code == NO_SPACE:
        return Failure(str(local_files.no_space(OSError(exit_code, os.strerror(exit_code), failure_file))))
    # An error that was raised has left its reason in a file.
    with contextlib.suppress(FileNotFoundError, ValueError):  # it died before it wrote why, or while it did
        return Failure(**json.loads(failure_file.read_text()))
    return Failure(_unexplained(exit_code))


def _unexplained(exit_code: int) -> str:
    """How a process ended that has not written why; a negative code is the signal that killed it."""
    if exit_code > 0:
        return f"its process ended with exit code {exit_code} and without a word"
    # SIGSEGV or SIGABRT, for example: what the code has printed is in the log above.
    name = signal.Signals(-exit_code).name
    if name != "SIGKILL":
        return f"its process was killed by {name}"
    remedy = "raise resources.memory, or lower the batch size" if on_a_cluster() else "free memory"
    return f"its process was killed by SIGKILL (what the kernel does when memory is used up: {remedy})"


@contextlib.contextmanager
def _ending_together(process: Work) -> Iterator[None]:
    """Whatever ends the wait ends the work: a pod that is deleted gets SIGTERM, a terminal sends SIGINT."""
    # Only while the work runs: afterwards this process ends as any other does.
    with processes.handling_signals(processes.end_by_signal):
        try:
            yield
        except BaseException:
            _end(process)
            raise


def _end(process: Work) -> None:
    """SIGTERM to the work and all that it started, SIGKILL to what remains after a while (or when the pod ends)."""
    # The group, not the process: launchers and workers have children of their own.
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _give_up(arguments: dict[str, Any], failure: Failure) -> None:
    """Report a failure wherever somebody may look, and end the process where the run must end with it."""
    from ptl.steps import failure as reports

    step = str(arguments["step"])
    print(f"error: {step}: {failure.reason}", file=sys.stderr, flush=True)
    ends_run = not _can_do_without(step)
    if ends_run:
        reports.leave_for_runner(step, failure)
    reports.announce(step, str(arguments["experiment"]), failure)
    if ends_run:
        sys.exit(failure.exit_code)
    reports.pass_on(step, failure.reason, arguments)


def _can_do_without(step: str) -> bool:
    """Whether a run reaches its report without a step: any without an export, and on a cluster without its control.

    On one machine somebody sees the control fail, and the same command resumes it.
    """
    return step.startswith("export-") or (step.startswith("control-") and on_a_cluster())
