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
- `memory_bytes` and `cpu_s` hold per process, the checker's included. The sizes of scratch files and of what is
  printed are polled every 50 ms, so a burst can pass their limits for that long (each file ends at `file_bytes`), and
  deleted but open files (64 at most) are not in the total.

What candidates and tests cannot do here: asyncio and sockets, subprocesses, threads, subclassing a candidate's class in
the tests, comparing with `is`, `in` on the candidate's own container types, `with` on its objects, capturing what the
candidate prints, and extension modules that need a shared library (ssl, sqlite3, bz2, lzma). An object of a subclass of
a builtin type (IntEnum, a str of its own) never equals the plain value.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
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

# of a container: microseconds of CPU time in each period, and the period
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_MAX_SOURCE = 1_000_000  # characters
_POLL_S = 0.05  # seconds between two checks of what has no kernel limit
_EXIT_S = 0.2  # seconds for the candidate's own end, whose exit code says why
_DETAIL = 2000  # characters
_REPORT = 65536  # bytes that the checker may report
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


def require_support() -> None:
    """Raise WorkError where this kernel cannot confine a process."""
    reason = lockdown.missing_support()
    if reason:
        raise WorkError(
            f"model-written code is not run: {reason}. Run this step on a kernel that has both"
        )


def run_tests(candidate: str, tests: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Execute `candidate`, then `tests` against its names; passed only if the tests' last line was reached.

    `tests` is trusted not to be hostile, but is confined too. Raises WorkError where the sandbox cannot be set up
    (nothing was run then) and InputError for empty tests.
    """
    if not tests.strip():
        raise InputError(
            "empty, so every candidate would pass. Give at least one assert", field="tests"
        )
    require_support()
    if len(candidate) > _MAX_SOURCE:
        return Outcome(
            False,
            "failed",
            f"the candidate has {len(candidate)} characters, more than {_MAX_SOURCE}",
        )
    with tempfile.TemporaryDirectory(prefix="ptl-sandbox-") as folder:
        output = Path(folder, "output")  # beside the scratch folder: nobody can read it
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        with _running_children(candidate, tests, limits, scratch, output) as (suspect, report):
            lines, limit = _follow(report, limits, scratch, output)
            # The exit code is of use only where the candidate's process ended first.
            if not limit and b'"gone"' in lines[-1]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    suspect.wait(_EXIT_S)
        with output.open("rb") as file:
            printed = file.read(_DETAIL).decode("utf-8", "replace")
    if limit:
        return _not_passed(*limit, printed)
    return _judge(lines, suspect.returncode, printed, limits)


def run_many(pairs: Iterable[tuple[str, str]], limits: Limits = DEFAULT_LIMITS) -> list[Outcome]:
    """Run each (candidate, tests) pair, one on each usable core; outcomes are in the order of the pairs."""
    require_support()
    with ThreadPoolExecutor(_cores()) as pool:
        return list(pool.map(lambda pair: run_tests(pair[0], pair[1], limits), pairs))


def _cores() -> int:
    """Those that this process may use: in a pod with a limit fewer than the machine has."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
        quota, period = map(int, CPU_LIMIT.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


@contextlib.contextmanager
def _running_children(
    candidate: str, tests: str, limits: Limits, scratch: Path, output: Path
) -> Iterator[tuple[Process, FileIO]]:
    """Start both processes; yields the candidate's and the report. They are dead when the block ends."""
    with contextlib.ExitStack() as stack:
        # Both children print to the same file, which they cannot read; only the checker has the pipe of the report.
        printed = stack.enter_context(FileIO(output, "a"))
        questions, to_candidate = _open_pipe(stack)
        answers, to_checker = _open_pipe(stack)
        report, to_report = _open_pipe(stack)
        suspect = _start_child(
            "candidate", candidate, [questions, to_checker], printed, limits, scratch
        )
        stack.callback(_kill, suspect)
        checker = _start_child(
            "checker", tests, [answers, to_candidate, to_report], printed, limits, scratch
        )
        stack.callback(_kill, checker)
        # Else no pipe would end when a child does.
        for end in (questions, to_candidate, answers, to_checker, to_report):
            end.close()
        yield suspect, report


def _open_pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """The reading and the writing end of a new pipe, which the stack closes."""
    reading, writing = os.pipe()
    return stack.enter_context(FileIO(reading, "r")), stack.enter_context(FileIO(writing, "w"))


def _kill(child: Process) -> None:
    child.kill()
    child.wait()


def _start_child(
    role: str, source: str, pipes: list[FileIO], output: FileIO, limits: Limits, scratch: Path
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


def _follow(
    report: FileIO, limits: Limits, scratch: Path, output: Path
) -> tuple[list[bytes], tuple[str, str] | None]:
    """The lines that the checker reports until it ends, or the limit that was passed before: status and detail."""
    received = b""
    deadline = time.monotonic() + limits.wall_s
    poll = select.poll()
    poll.register(report, select.POLLIN)
    while True:
        chunk = os.read(report.fileno(), _REPORT) if poll.poll(1000 * _POLL_S) else None
        # A limit that was passed is stronger than the report.
        limit = _passed_limit(limits, scratch, output)
        if limit is None and chunk != b"" and time.monotonic() >= deadline:
            limit = "timeout", f"not done after {limits.wall_s} s"
        if limit or chunk == b"":
            return received.splitlines() or [b""], limit
        received = (received + (chunk or b""))[:_REPORT]


def _passed_limit(limits: Limits, scratch: Path, output: Path) -> tuple[str, str] | None:
    """The limit that what was printed or the files together exceed, which no kernel limit covers."""
    if output.stat().st_size > limits.output_bytes:
        return "output_limit", f"printed more than {limits.output_bytes} bytes"
    sizes = []
    # Flat: the children can make no folder.
    for entry in os.scandir(scratch):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            sizes.append(entry.stat(follow_symlinks=False).st_size)
    if sum(sizes) > limits.file_bytes or len(sizes) > _MAX_FILES:
        text = f"{len(sizes)} files of {sum(sizes)} bytes; allowed are {_MAX_FILES} of {limits.file_bytes}"
        return "file_limit", text
    return None


def _judge(lines: list[bytes], exit_code: int, printed: str, limits: Limits) -> Outcome:
    """Turn the checker's report into the outcome; WorkError where a child could not be locked down."""
    if not lines[0]:
        raise _setup_error(printed or "no message")
    # The first line says that the lock-down is done, the second how the tests ended.
    if len(lines) < 2:
        return _not_passed(
            "killed", "the tests' own process ended early (memory or CPU limit?)", printed
        )
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
