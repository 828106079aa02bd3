"""Processes that end together, and work that one process does at a time, whatever kills them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from ptl.errors import InputError

LIFELINE = "PTL_LIFELINE"  # a file that the command which started this process keeps locked as long as it runs
TIED = "PTL_TIED"  # id of the process that `tied` started, for the processes that it starts
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def exclusive(path: Path, what: str, *, wait: float = 0.0, remedy: str = "") -> Iterator[None]:
    """Hold the lock file at `path`; the system frees it when this process ends, however it ends.

    Raises InputError, naming the process that holds it, when it is not free within `wait` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + wait
        while not _taken(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                pid, _, namespace = file.read().partition(" ")
                here = namespace == _namespace()
                who, end = (f"id {pid}", f"kill {pid}") if here else ("in another container", "remove its container")
                remedy = remedy or f"wait for it, or end it ({end}) and run the same command again"
                raise InputError(f"{what}: another process executes it (process {who}); {remedy}")
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"{os.getpid()} {_namespace()}")
        file.flush()
        yield


def _namespace() -> str:
    """In which process ids have their meaning: a container has one of its own."""
    return str(Path("/proc/self/ns/pid").readlink()) if sys.platform == "linux" else ""


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def lifeline(path: Path) -> Iterator[None]:
    """Keep `path` locked for processes that follow it (`follow_lifeline`); they end when this block or process does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
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
        threading.Thread(target=_follow, args=(Path(path),), daemon=True).start()


def _follow(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    os.kill(os.getpid(), signal.SIGTERM)


def die_with(parent: int) -> None:
    """Have the system kill this process when its parent, process `parent`, dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this one has ended")


def tied(command: list[str]) -> list[str]:
    """A command whose process is killed when this one dies; the death signal outlives exec.

    What it starts calls `die_with_tied`: the signal reaches children, not their children.
    """
    return [sys.executable, "-m", "ptl.processes", str(os.getpid()), *command]


def die_with_tied() -> None:
    """Have the system kill this process when the `tied` process that started it dies."""
    if TIED in os.environ:
        die_with(int(os.environ[TIED]))


@contextlib.contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a command alike: a sentence with `advice`, and exit code 128 + the signal's number."""

    def stop(number: int, _frame: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
        print(f"\ninterrupted by {number.name}: {advice}", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_time(pid: int) -> str:
    """When a process started, as the system reports it; empty when there is none (or only its zombie)."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if fields[0] == "Z" else f"{boot}-{fields[19]}"
    return subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.environ[TIED] = str(os.getpid())
    os.execvp(sys.argv[2], sys.argv[2:])
