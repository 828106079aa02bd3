"""Run model-written Python code against tests, in child processes under Landlock, seccomp and resource limits.

Two processes for each candidate (`ptl.sandbox.child`, `ptl.sandbox.checker`): one executes the candidate, the other the
tests. The tests call the candidate by messages over a pipe and get plain values back, and only the checker's process
holds the pipe on which "passed" is reported, after the last line of the tests. The candidate never sees the tests, so
there is no marker to forge, no frame to read and no assert to patch: exiting early, printing, `sys.exit`, atexit,
patched builtins or objects whose `__eq__` says True only change the candidate's own process.

Each child: no network, no exec, no fork, no signal or ptrace to others, no environment; it reads the standard library
(not site-packages) and a flat scratch folder, and writes only there, all enforced by the kernel (lockdown.py) before
the first line of the candidate. Where the kernel lacks Landlock or seccomp nothing runs: `WorkError`.

What it cannot guarantee
- Weak tests pass weak code. A test that only asks the candidate's own objects (`assert obj.is_valid()`), or calls a
  helper that the candidate may redefine (`poly` in HumanEval/32), believes the answer. Standard modules and builtins of
  the tests cannot be replaced, except builtins where the tests ask the candidate for nothing else (MBPP has functions
  called `sum`).
- An argument that the candidate changes in place changes for the tests too, as in one process.
- Metadata stays visible: `os.stat` works on any path (existence, size, times), and so do pid, uid, host name and the
  names, not the content, in the standard library's folder.
- A hole in the kernel's Landlock or seccomp, or in Python's own JSON parser and types that decode answers, is a hole.
- `memory_bytes` and `cpu_s` hold per process, the checker's included. The total of scratch files is polled every
  50 ms, so a burst can pass the limit for that long, and deleted but open files (64 at most) are not in the total.

What candidates and tests cannot do here: asyncio and sockets, subprocesses, threads, subclassing a candidate's class in
the tests, comparing with `is`, `in` on the candidate's own container types, `with` on its objects, capturing what the
candidate prints, and extension modules that need a shared library (ssl, sqlite3, bz2, lzma). An object of a subclass of
a builtin type (IntEnum, a str of its own) never equals the plain value.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ptl.errors import InputError, WorkError
from ptl.sandbox import lockdown

Process = subprocess.Popen[bytes]

_MAX_SOURCE = 1_000_000  # characters
_POLL_S = 0.05  # seconds between two checks of what has no kernel limit
_EXIT_S = 0.2  # seconds for the candidate's own end, whose exit code says why
_DETAIL = 2000  # characters
_REPORT = 65536  # bytes that the checker may report
_CHUNK = 65536  # bytes of one read
_MAX_FILES = 64  # in the scratch folder
# Stub packages: the children import three files of this folder, and nothing of an __init__ or of site-packages.
_BOOT = """
import sys
for name in ("ptl", "ptl.sandbox"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [{folder!r}]
from ptl.sandbox.child import main
main()
"""


@dataclass(frozen=True)
class Limits:
    """What one candidate may use; each process has its own cpu_s and memory_bytes."""

    # From the start of the processes to the end of the tests; many times cpu_s, so that on a busy machine a right
    # program is not ended before it has had its CPU time.
    wall_s: float = 60.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20  # address space, the interpreter's own ~30 MB included
    output_bytes: int = 64 << 10  # standard output and error together
    file_bytes: int = 1 << 20  # all files in the scratch folder together, at most 64 of them


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How one candidate did."""

    passed: bool
    status: str  # passed | failed | timeout | killed | output_limit | file_limit
    detail: str  # may quote the candidate: show it as text, never act on it


@dataclass(frozen=True)
class _Children:
    """The two processes, and the reading ends of their pipes."""

    candidate: Process
    checker: Process
    output: FileIO  # what both print
    report: FileIO  # of the checker alone


@dataclass
class _Observation:
    """What the parent has seen of the two children."""

    output: bytes = b""  # its beginning
    output_size: int = 0  # bytes in all
    report: bytes = b""
    status: str = ""  # set by the parent when it ends the run: stronger than any report
    detail: str = ""


def require_support() -> None:
    """Raise WorkError where this kernel cannot confine a process."""
    reason = lockdown.missing_support()
    if reason:
        raise WorkError(f"model-written code is not run: {reason}. Run this step on a kernel that has both")


def run_tests(candidate: str, tests: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Execute `candidate`, then `tests` against its names; passed only if the tests' last line was reached.

    `tests` is trusted not to be hostile, but is confined too. Raises WorkError where the sandbox cannot be set up
    (nothing was run then) and InputError for empty tests.
    """
    if not tests.strip():
        raise InputError("empty, so every candidate would pass. Give at least one assert", field="tests")
    require_support()
    if len(candidate) > _MAX_SOURCE:
        return Outcome(False, "failed", f"the candidate has {len(candidate)} characters, more than {_MAX_SOURCE}")
    scratch = tempfile.mkdtemp(prefix="ptl-sandbox-")
    try:
        with _running_children(candidate, tests, limits, scratch) as children:
            observation = _observe(children, limits, scratch)
            # The exit code is of use only where the candidate's process ended first.
            is_over = observation.status or b'"passed"' in observation.report
            with contextlib.suppress(subprocess.TimeoutExpired):
                children.candidate.wait(0 if is_over else _EXIT_S)
        return _judge(observation, children.candidate.returncode, limits)
    finally:
        shutil.rmtree(scratch)  # flat: the children can make no folder or link


def run_many(pairs: Iterable[tuple[str, str]], limits: Limits = DEFAULT_LIMITS) -> list[Outcome]:
    """Run each (candidate, tests) pair, one on each usable core; outcomes are in the order of the pairs."""
    require_support()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda pair: run_tests(pair[0], pair[1], limits), pairs))


@contextlib.contextmanager
def _running_children(candidate: str, tests: str, limits: Limits, scratch: str) -> Iterator[_Children]:
    """Start both processes; they are dead and their pipes closed when the block ends."""
    with contextlib.ExitStack() as stack:
        # Both children print to the same pipe; only the checker has the one of the report.
        questions, to_candidate = _open_pipe(stack)
        answers, to_checker = _open_pipe(stack)
        output, to_output = _open_pipe(stack)
        report, to_report = _open_pipe(stack)
        suspect = _start_child("candidate", candidate, [questions, to_checker], to_output, limits, scratch)
        stack.callback(_kill, suspect)
        checker = _start_child("checker", tests, [answers, to_candidate, to_report], to_output, limits, scratch)
        stack.callback(_kill, checker)
        # Else no pipe would end when a child does.
        for end in (questions, to_candidate, answers, to_checker, to_output, to_report):
            end.close()
        yield _Children(suspect, checker, output, report)


def _open_pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """The reading and the writing end of a new pipe, which the stack closes."""
    reading, writing = os.pipe()
    return stack.enter_context(FileIO(reading, "r")), stack.enter_context(FileIO(writing, "w"))


def _kill(child: Process) -> None:
    child.kill()
    child.wait()


def _start_child(
    role: str,
    source: str,
    pipes: list[FileIO],
    output: FileIO,
    limits: Limits,
    scratch: str,
) -> Process:
    """Start one of the two with the descriptors of its pipes; the rest of its order comes by its standard input."""
    descriptors = [pipe.fileno() for pipe in pipes]
    # -P, -s and -S: neither the working directory nor site-packages is on the path.
    boot = _BOOT.format(folder=str(Path(__file__).resolve().parent))
    child = subprocess.Popen(
        [sys.executable, "-u", "-P", "-s", "-S", "-X", "utf8", "-c", boot],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=descriptors,
        cwd=scratch,
        env={"PYTHONHASHSEED": "0"},  # the order of sets, and with it the outcome, repeats
        start_new_session=True,
    )
    order = {
        "role": role,
        "source": source,
        "pipes": descriptors,
        "parent": os.getpid(),
        "limits": {
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
        },
    }
    assert child.stdin is not None
    # A child that died is seen by its missing report.
    with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
        stdin.write(json.dumps(order).encode())
    return child


def _observe(children: _Children, limits: Limits, scratch: str) -> _Observation:
    """Read both pipes until the checker's end of the report closes or a limit is passed."""
    observation = _Observation()
    deadline = time.monotonic() + limits.wall_s
    next_poll = time.monotonic() + _POLL_S
    with selectors.DefaultSelector() as selector:
        selector.register(children.output, selectors.EVENT_READ)
        selector.register(children.report, selectors.EVENT_READ)
        while not observation.status:
            pause = min(deadline, next_poll) - time.monotonic()
            events = selector.select(max(0.0, pause))
            ready = [key.fileobj for key, _ in events]
            # The output first: a limit that it passes is stronger than the report.
            if children.output in ready and not _take_output(observation, children, limits):
                selector.unregister(children.output)
            if children.report in ready and not _take_report(observation, children, limits):
                break
            now = time.monotonic()
            if observation.status:
                break
            if now >= deadline:
                observation.status = "timeout"
                observation.detail = f"not done after {limits.wall_s} s"
            elif now >= next_poll:
                next_poll = now + _POLL_S
                _poll_files(observation, limits, scratch)
    return observation


def _take_output(observation: _Observation, children: _Children, limits: Limits) -> bool:
    """Read what was printed; False where both children have closed their output."""
    chunk = os.read(children.output.fileno(), limits.output_bytes + _CHUNK)
    observation.output_size += len(chunk)
    observation.output = (observation.output + chunk)[:_DETAIL]
    if observation.output_size > limits.output_bytes:
        observation.status = "output_limit"
        observation.detail = f"printed more than {limits.output_bytes} bytes"
    return bool(chunk)


def _take_report(observation: _Observation, children: _Children, limits: Limits) -> bool:
    """Read what the checker reports; False where it has ended."""
    chunk = os.read(children.report.fileno(), _CHUNK)
    observation.report = (observation.report + chunk)[:_REPORT]
    if not chunk:
        # What was printed before the report counts, so that the outcome does not depend on which was read first.
        os.set_blocking(children.output.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            _take_output(observation, children, limits)
    return bool(chunk)


def _poll_files(observation: _Observation, limits: Limits, scratch: str) -> None:
    """The scratch folder's total, which no kernel limit covers."""
    sizes = []
    # Flat: the children can make no folder.
    for entry in os.scandir(scratch):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            sizes.append(entry.stat(follow_symlinks=False).st_size)
    num_bytes = sum(sizes)
    if num_bytes > limits.file_bytes or len(sizes) > _MAX_FILES:
        observation.status = "file_limit"
        observation.detail = f"{len(sizes)} files of {num_bytes} bytes; allowed are {_MAX_FILES} of {limits.file_bytes}"


def _judge(observation: _Observation, exit_code: int, limits: Limits) -> Outcome:
    """Turn what was seen into the outcome; WorkError where a child could not be locked down."""
    printed = observation.output.decode("utf-8", "replace")
    if observation.status:
        return _not_passed(observation.status, observation.detail, printed)
    lines = observation.report.splitlines()
    if not lines:
        raise _setup_error(printed or "no message")
    # The first line says that the lock-down is done, the second how the tests ended.
    if len(lines) < 2:
        return _not_passed("killed", "the tests' own process ended early (memory or CPU limit?)", printed)

    verdict: dict[str, str] = json.loads(lines[1])
    status = verdict["status"]
    detail = verdict["detail"]
    if status == "passed":
        return Outcome(True, "passed", "")
    if status == "setup_failed":
        raise _setup_error(printed or detail)
    # Where the candidate's process ended, its exit code says why.
    if status != "gone":
        return _not_passed("failed", detail, printed)
    if exit_code == -signal.SIGXCPU:
        return _not_passed("timeout", f"more than {limits.cpu_s} s of CPU time", printed)
    if exit_code < 0:
        return _not_passed("killed", f"{detail} (signal {-exit_code})", printed)
    return _not_passed("failed", f"{detail} (exit code {exit_code})", printed)


def _setup_error(reason: str) -> WorkError:
    return WorkError(f"the sandbox could not be set up, so no code was run: {reason[:_DETAIL]}")


def _not_passed(status: str, detail: str, printed: str) -> Outcome:
    text = f"{detail}\noutput:\n{printed}" if printed else detail
    return Outcome(False, status, text[:_DETAIL])
