"""Processes that end together, and work that one process does at a time, whatever kills them.

Also how often a step is tried, without pydantic: the process that starts a step's attempts is kept small.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

from ptl.errors import InputError

Environment = dict[str, str]  # of a process, by the variables' names

# a file that the command which started this process keeps locked as long as it runs
LIFELINE = "PTL_LIFELINE"
TIED = "PTL_TIED"  # id of the process that `tied` started, for the processes that it starts
PR_SET_PDEATHSIG = 1  # of prctl(2)
GRACE = 10  # seconds between SIGTERM and SIGKILL

# Of a step on a cluster, unless the config says otherwise.
RETRIES = 2  # further attempts
RETRY_WAIT = 60  # seconds before the first of them


def on_a_cluster() -> bool:
    """Whether Kubeflow started this step; a local runner names the run by PTL_RUN_ID."""
    return bool(os.environ.get("KFP_RUN_ID")) and not os.environ.get("PTL_RUN_ID")


@contextlib.contextmanager
def exclusive(path: Path, work: str, *, wait: float = 0.0, remedy: str = "") -> Iterator[None]:
    """Hold the lock file at `path`; the system frees it when this process ends, however it ends.

    Raises InputError, naming `work` and the process that holds it, when it is not free within `wait` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    with path.open("a+") as file:
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise _held_by_another(file, work, remedy)
            time.sleep(0.05)
        # For the error of those who come later.
        file.truncate(0)
        file.write(f"{os.getpid()} {_pid_namespace()}")
        file.flush()
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"{file.name} cannot be locked: {error.strerror}",
            remedy="choose a folder on a file system with locks",
        ) from error
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file at `path`. Only for files whose locks are waited for: asking is a lock."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _held_by_another(file: IO[str], work: str, remedy: str) -> InputError:
    """The error that names the holder of a lock file, by what the holder wrote into it."""
    file.seek(0)
    pid, _, namespace = file.read().partition(" ")
    # An id from another container or machine may belong to an unrelated process here.
    if namespace == _pid_namespace():
        holder = f"id {pid}"
        command = f"kill {pid}"
    else:
        holder = "in another container, or on another machine"
        command = "remove its container"
    return InputError(
        f"another process executes it (process {holder})",
        field=work,
        remedy=remedy or f"wait for it, or end it ({command}) and run the same command again",
    )


def _pid_namespace() -> str:
    """In which process ids have their meaning: a container has one of its own, which many machines number alike."""
    namespace = str(Path("/proc/self/ns/pid").readlink()) if sys.platform == "linux" else ""
    return f"{namespace} {socket.gethostname()}"


@contextlib.contextmanager
def lifeline(path: Path) -> Iterator[None]:
    """Keep `path` locked for processes that follow it (`follow_lifeline`); they end when this block or process does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever opens it before it is removed gets the lock when it is closed.
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def follow_lifeline() -> None:
    """Send this process SIGTERM as soon as the command that started it ends, even by kill -9.

    A parent's death signal does not do: between the two are a shell, or a container's engine.
    """
    path = os.environ.get(LIFELINE)
    if path:
        threading.Thread(target=_end_with_lifeline, args=(Path(path),), daemon=True).start()


def _end_with_lifeline(path: Path) -> None:
    # A file that is gone means that the command has ended already.
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    os.kill(os.getpid(), signal.SIGTERM)


def die_with(parent: int) -> None:
    """Have the system kill this process when its parent, process `parent`, dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before the call.
    if os.getppid() != parent:
        sys.exit("the process that started this one has ended")


def tied(command: list[str]) -> list[str]:
    """A command whose process is killed when this one dies; the death signal outlives exec.

    What it starts calls `die_with_tied`: the signal reaches children, not their children.
    """
    return [sys.executable, "-m", "ptl.processes", str(os.getpid()), *command]


def die_with_tied() -> None:
    """Have the system kill this process when the `tied` process that started it dies."""
    parent = os.environ.get(TIED)
    if parent is not None:
        die_with(int(parent))


def followed(command: list[str], environment: Environment, on_line: Callable[[str], None]) -> int:
    """Run a `tied` command to its end, each line of its output to `on_line`; its exit code.

    Whatever ends this ends the command, also an `on_line` that fails.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        tied(command), **pipes, env=environment, encoding="utf-8", errors="replace"
    )
    assert process.stdout is not None
    try:
        with process.stdout as lines:
            for line in lines:
                on_line(line)
        return process.wait()
    except BaseException:
        # On SIGTERM a launcher ends its processes.
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


@contextlib.contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a command alike: a sentence with `advice`, and exit code 128 + the signal's number."""

    def interrupt(number: int) -> NoReturn:
        raise KeyboardInterrupt(number)

    # SIGTERM would end the command without its clean-up.
    with handling_signals(interrupt):
        try:
            yield
        except KeyboardInterrupt as error:
            # Libraries raise it themselves, without a number.
            number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
            print(f"\ninterrupted by {number.name}: {advice}", file=sys.stderr)
            raise SystemExit(128 + number) from None


def end_by_signal(number: int) -> NoReturn:
    """A handler for `handling_signals`: it leaves by the exit code of a process that the signal has ended."""
    raise SystemExit(128 + number)  # not more: the wait that is interrupted may hold a lock


@contextlib.contextmanager
def handling_signals(handler: Callable[[int], NoReturn]) -> Iterator[None]:
    """Call `handler` with the signal's number for SIGINT and SIGTERM, as long as the block runs."""
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda number, _frame: handler(number))
    try:
        yield
    finally:
        for number, earlier_handler in previous.items():
            signal.signal(number, earlier_handler)


def start_time(pid: int) -> str:
    """Seconds from the system's start to that of a process; empty when there is none (or only its zombie).

    Not as a date: that changes when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        seconds = process.create_time() - psutil.boot_time()
    except psutil.NoSuchProcess:
        return ""
    return f"{seconds:.2f}"


def on_gpus(asked: int | None, stage: str) -> int:
    """How many processes a stage has on this machine: what its config asks for, else one for each GPU.

    Raises InputError for more processes than GPUs, of machines that have any.
    """
    import torch

    gpus = torch.cuda.device_count()
    if asked and 0 < gpus < asked:
        raise InputError(
            f"{asked} processes, and this machine has {gpus} GPUs",
            field=f"{stage}.processes",
            remedy=f"lower it, or raise resources.steps.{stage}.accelerators",
        )
    return asked or max(1, gpus)


if __name__ == "__main__":
    # Started by a `tied` command: PARENT COMMAND...
    die_with(int(sys.argv[1]))
    os.environ[TIED] = str(os.getpid())
    os.execvp(sys.argv[2], sys.argv[2:])
