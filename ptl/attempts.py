"""Attempts of a step: a small parent starts the work in a process of its own, and again after it died.

The parent is the process of the component. It imports neither torch nor MLflow, so a crash of the work, an error of
CUDA or NCCL, a signal or a hang leaves it alive. It never tries again after an input error. Attempts are counted in
the store: those in one pod, in pods that Argo starts anew, and those of a local runner together are `retries` + 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from typing import Any, NoReturn

from ptl import mounts
from ptl.errors import WorkError
from ptl.log import say

INPUTS = ("model", "scored", "fallback", "final", "control")  # artifacts that a step reads; it writes all others
RETRIES, RETRY_WAIT = 2, 60  # on a cluster, unless the config says otherwise; seconds
PROCESS = "ptl.step_process"  # the module that does the work
GRACE = 20  # seconds between SIGTERM and SIGKILL
INPUT_ERROR = 2


class NoAttemptLeftError(WorkError):
    """The step has used all of its attempts; it is not tried again until somebody asks for it."""


class LoopFailedError(WorkError):
    """A step of the control has nothing to be compared with until the loop's failure is overcome."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How often a step is tried, and for how long. The compiled pipeline sets the variables of the pod."""

    retries: int
    pause: float  # seconds before the first further attempt; doubled each time
    timeout: float | None  # seconds for one attempt

    @property
    def attempts(self) -> int:
        """All attempts, the first one included."""
        return self.retries + 1


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why an attempt failed, and whether another one may follow."""

    reason: str
    exit_code: int = 1
    final: bool = False
    exhausted: bool = False  # earlier attempts have used all, and the last of them has reported why


def policy() -> Policy:
    """What this pod's or process's environment asks for."""
    retries, pause = (RETRIES, RETRY_WAIT) if on_a_cluster() else (0, 1)
    timeout = os.environ.get("PTL_TIMEOUT")
    return Policy(
        int(os.environ.get("PTL_RETRIES") or retries),
        float(os.environ.get("PTL_RETRY_WAIT") or pause),
        float(timeout) if timeout else None,
    )


def on_a_cluster() -> bool:
    """Whether Kubeflow started this step; a local runner names the run by PTL_RUN_ID."""
    return bool(os.environ.get("KFP_RUN_ID")) and not os.environ.get("PTL_RUN_ID")


def run(names: dict[str, Any]) -> None:
    """The body of every component: `names` are its locals, that is its arguments, and this module's own name.

    Ends the process with the step's exit code where it fails: 2 for an input error, 1 otherwise.
    """
    arguments = {name: value for name, value in names.items() if name != "attempts"}
    step = str(arguments["step"])
    for warning in mounts.load():
        say(step, warning)
    os.environ.setdefault("PTL_LAUNCH", uuid.uuid4().hex)
    with tempfile.TemporaryDirectory(prefix="ptl-step-") as folder:
        call = Path(folder, "call.json")
        call.write_text(json.dumps(_dump(arguments)))
        failure = _until_done(call, step, policy())
        if failure is None:
            _take_outputs(arguments, call)
    if failure is not None:
        _give_up(arguments, failure)


def _until_done(call: Path, step: str, plan: Policy) -> Failure | None:
    """Try as often as the policy allows; returns why the last attempt failed, or None."""
    number = 1
    while (failure := _attempt(call, plan.timeout)) is not None:
        if failure.final or number == plan.attempts:
            return failure
        pause = plan.pause * 2 ** (number - 1)
        say(step, f"failed: {failure.reason}; the next attempt begins in {pause:g} s")
        time.sleep(pause)
        number += 1
    return None


def _dump(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call for the process that does the work: plain values, and where its artifacts are."""
    artifacts = {name: value.path for name, value in arguments.items() if hasattr(value, "metadata")}
    return {
        "settings": {name: value for name, value in arguments.items() if name not in artifacts and value is not None},
        "inputs": {name: path for name, path in artifacts.items() if name in INPUTS},
        "outputs": {name: path for name, path in artifacts.items() if name not in INPUTS},
    }


def _attempt(call: Path, timeout: float | None) -> Failure | None:
    """Do the work once, in a process group of its own; None when it is done."""
    answer = call.with_name("failure.json")
    answer.unlink(missing_ok=True)
    # A session of its own: a signal to this process is passed on, and all of the work's processes end together.
    command = [sys.executable, "-m", PROCESS, str(call), str(os.getpid())]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        with _ending_together(process):
            code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return Failure(f"it did not end within {timeout:g} s (resources.timeout)")
    finally:  # a crash leaves launchers, workers and loaders behind, which hold the GPU and this process's output
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if code == 0:
        return None
    if answer.is_file():
        return Failure(**json.loads(answer.read_text()))
    return Failure(_death(code))


def _death(code: int) -> str:
    if code > 0:
        return f"its process ended with exit code {code} and without a word"
    name = signal.Signals(-code).name
    memory = " (what the kernel does when memory is used up: raise resources.memory, or lower the batch size)"
    return f"its process was killed by {name}{memory * (name == 'SIGKILL')}"


@contextlib.contextmanager
def _ending_together(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever ends the wait ends the work: a pod that is deleted gets SIGTERM, a terminal sends SIGINT."""

    def stop(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)  # not more: the interrupted wait holds a lock

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except BaseException:
        _end(process)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the work and all that it started, SIGKILL to what is left after a while (or when the pod ends)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _take_outputs(arguments: dict[str, Any], call: Path) -> None:
    """Metadata of the outputs, which KFP keeps with its artifacts; their files are written already."""
    for name, metadata in json.loads(call.with_name("outputs.json").read_text()).items():
        arguments[name].metadata.update(metadata)


def _give_up(arguments: dict[str, Any], failure: Failure) -> None:
    """Report a failure wherever somebody may look, and end the process; but a failed control must not end the loop."""
    from ptl import failure as reports

    step = str(arguments["step"])
    print(f"error: {step}: {failure.reason}", file=sys.stderr, flush=True)
    loop_failed = reports.announce(step, str(arguments["experiment"]), failure)
    if step.startswith("control-") and not loop_failed:
        reports.pass_on(step, failure.reason, arguments)
    else:
        sys.exit(failure.exit_code)


def claim(root: str, run: str, step: str) -> int:
    """Count an attempt of a step in the store; returns its number in this launch, from 1.

    A launch begins when somebody starts or retries the run; Argo's further pods continue it. Raises NoAttemptLeftError.
    """
    from ptl import store

    launch = _launch()
    mine = {"launch": launch, "id": uuid.uuid4().hex}
    earlier: list[str | None] = []
    while True:
        name = f"{step}.attempt-{len(earlier) + 1}"
        won = json.loads(store.claim(root, run, name, json.dumps(mine)))
        if won["id"] == mine["id"]:
            break
        earlier.append(won["launch"])
        if launch is None:
            mine["launch"] = won["launch"]
    number = earlier.count(mine["launch"]) + 1
    allowed = policy().attempts
    if number > allowed:
        raise NoAttemptLeftError(
            f"all {allowed} attempts were used (resources.retries: {allowed - 1}); `ptl retry` or Kubeflow's Retry "
            "gives it new ones, from what is finished"
        )
    return number


def _launch() -> str | None:
    """What tells one launch from another; None: this pod continues the launch before it.

    Argo numbers its attempts at every level of the workflow, `run(0).root(0).prune-1(0).executor(1)`, and begins anew
    at 0 when a run is retried by a person.
    """
    if not on_a_cluster():
        return os.environ.get("PTL_LAUNCH") or uuid.uuid4().hex  # called by hand: each call is a launch
    node = os.environ.get("PTL_ARGO_NODE") or f"({os.environ.get('KFP_RETRY_INDEX') or 0})"
    first = all(part.startswith("0)") for part in node.split("(")[1:])
    return os.environ.get("KFP_POD_UID") or os.environ.get("PTL_LAUNCH") if first else None
