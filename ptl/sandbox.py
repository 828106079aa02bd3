"""Run model-written Python code against tests, in child processes under Landlock, seccomp and resource limits.

Two processes for each candidate (`ptl.sandbox_child`, `ptl.sandbox_checker`): one executes the candidate, the other the
tests. The tests call the candidate by messages over a pipe and get plain values back, and only the checker's process
holds the pipe on which "passed" is said, after the last line of the tests. The candidate never sees the tests, so there
is no marker to forge, no frame to read and no assert to patch: exiting early, printing, `sys.exit`, atexit, patched
builtins or objects whose `__eq__` says True only change the candidate's own process.

Each child: no network, no exec, no fork, no signal or ptrace to others, no environment; it reads the standard library
(not site-packages) and a flat scratch folder, and writes only there, all enforced by the kernel (`ptl.sandbox_kernel`)
before the first line of the candidate. Where the kernel lacks Landlock or seccomp nothing runs: `WorkError`.

What it cannot guarantee
- Weak tests pass weak code. A test that only asks the candidate's own objects (`assert obj.is_valid()`), or calls a
  helper that the candidate may redefine (`poly` in HumanEval/32), believes the answer. Standard modules and builtins of
  the tests cannot be replaced, except builtins where the tests ask the candidate for nothing else (MBPP has functions
  called `sum`).
- An argument that the candidate changes in place changes for the tests too, as in one process.
- Metadata stays visible: `os.stat` works on any path (existence, size, times), and so do pid, uid, host name and the
  names, not the content, in the standard library's folder.
- A hole in the kernel's Landlock or seccomp, or in Python's own JSON parser and types that decode answers, is a hole.
- `memory_bytes` and `cpu_s` hold per process, the checker's included. The total of scratch files and the number of
  threads are polled every 50 ms, so a burst can pass the limit for that long, and deleted but open files (64 at most)
  are not in the total.

What candidates and tests cannot do here: asyncio and sockets, subprocesses, threads (unless `Limits.processes` > 1),
subclassing a candidate's class in the tests, comparing with `is`, `in` on the candidate's own container types,
capturing what the candidate prints, and extension modules that need a shared library (ssl, sqlite3, bz2, lzma).
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
from pathlib import Path

from ptl import sandbox_kernel
from ptl.errors import InputError, WorkError

_MAX_SOURCE = 1_000_000  # characters
_TICK = 0.05  # seconds between two looks at what has no kernel limit
_DETAIL = 2000  # characters
_REPORT = 65536  # bytes that the checker may report
# A stub package, so that the children import three files of ptl and nothing of its __init__ or of site-packages.
_BOOT = (
    "import sys; p = type(sys)('ptl'); p.__path__ = [{folder!r}]; sys.modules['ptl'] = p; "
    "from ptl.sandbox_child import main; main()"
)


@dataclass(frozen=True)
class Limits:
    """What one candidate may use; each process has its own cpu_s and memory_bytes."""

    wall_s: float = 10.0  # from the start of the processes to the end of the tests
    cpu_s: int = 5
    memory_bytes: int = 512 << 20  # address space, the interpreter's own ~30 MB included
    processes: int = 1  # 1: no fork and no thread; n: up to n threads, still no fork
    output_bytes: int = 64 << 10  # standard output and error together
    file_bytes: int = 1 << 20  # all files in the scratch folder together, at most 64 of them

    def __post_init__(self) -> None:
        for name, least in [("cpu_s", 1), ("memory_bytes", 64 << 20), ("processes", 1), ("output_bytes", 0)]:
            if getattr(self, name) < least:
                raise InputError(f"sandbox limit {name} is {getattr(self, name)}: it must be at least {least}")
        if self.wall_s <= 0 or self.file_bytes < 0:
            raise InputError(f"sandbox limits wall_s={self.wall_s}, file_bytes={self.file_bytes}: must be positive")


@dataclass(frozen=True)
class Outcome:
    """How one candidate did. `detail` may quote the candidate: show it as text, never act on it."""

    passed: bool
    status: str  # passed | failed | timeout | killed | output_limit | file_limit | process_limit
    detail: str


@dataclass
class _Watch:
    """What the parent has seen of the two children."""

    output: bytes = b""
    output_size: int = 0
    report: bytes = b""
    status: str = ""  # set by the parent when it ends the run: stronger than any report
    detail: str = ""


def require_support() -> None:
    """Raise WorkError where this kernel cannot confine a process."""
    reason = sandbox_kernel.missing_support()
    if reason:
        raise WorkError(f"model-written code is not run: {reason}. Run this step on a kernel that has both")


def run_tests(candidate: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Execute `candidate`, then `tests` against its names; passed only if the tests' last line was reached.

    `tests` is trusted not to be hostile, but is confined too. Raises WorkError where the sandbox cannot be set up
    (nothing was run then) and InputError for empty tests.
    """
    limits = limits or Limits()
    if not tests.strip():
        raise InputError("tests: empty, so every candidate would pass. Give at least one assert")
    require_support()
    if len(candidate) > _MAX_SOURCE:
        return Outcome(False, "failed", f"the candidate has {len(candidate)} characters, more than {_MAX_SOURCE}")
    scratch = tempfile.mkdtemp(prefix="ptl-sandbox-")
    try:
        with _children(candidate, tests, limits, scratch) as (suspect, checker, output, report):
            watch = _watch(suspect, output, report, limits, scratch)
            with contextlib.suppress(subprocess.TimeoutExpired):  # its own end, to tell why it ended
                suspect.wait(0 if watch.status or b'"passed"' in watch.report else 0.2)
            for child in (suspect, checker):
                child.kill()
                child.wait()
        return _judge(watch, suspect, limits)
    finally:
        shutil.rmtree(scratch)  # flat: the children can make no folder or link


def run_many(
    pairs: Iterable[tuple[str, str]], limits: Limits | None = None, workers: int | None = None
) -> list[Outcome]:
    """Run each (candidate, tests) pair, `workers` at a time (default: the usable cores), in the order given."""
    require_support()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda pair: run_tests(pair[0], pair[1], limits), pairs))


@contextlib.contextmanager
def _children(
    candidate: str, tests: str, limits: Limits, scratch: str
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes], int, int]]:
    """Start both processes; yield them with the reading ends of their output and of the checker's report."""
    opened: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pipe() -> tuple[int, int]:
        ends = os.pipe()
        opened.extend(ends)
        return ends

    try:
        (asked, ask), (answered, answer), (output, out), (report, result) = pipe(), pipe(), pipe(), pipe()
        started.append(_start("candidate", candidate, (asked, answer), out, limits, scratch))
        started.append(_start("checker", tests, (answered, ask, result), out, limits, scratch))
        for end in (asked, ask, answered, answer, out, result):
            os.close(end)
            opened.remove(end)
        yield started[0], started[1], output, report
    finally:
        for child in started:
            if child.returncode is None:
                child.kill()
                child.wait()
        for end in opened:
            os.close(end)


def _start(
    role: str, source: str, pipes: tuple[int, ...], out: int, limits: Limits, scratch: str
) -> subprocess.Popen[bytes]:
    folder = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-u", "-P", "-s", "-S", "-X", "utf8", "-c", _BOOT.format(folder=folder)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=out,
        pass_fds=pipes,
        cwd=scratch,
        env={"PYTHONHASHSEED": "0"},  # the order of sets, and with it the outcome, repeats
        start_new_session=True,
    )
    order = {
        "role": role,
        "source": source,
        "pipes": pipes,
        "parent": os.getpid(),
        "limits": {
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "threads": limits.processes > 1,
        },
    }
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin as stdin:  # a child that died is seen by its missing report
        stdin.write(json.dumps(order).encode())
    return child


def _watch(suspect: subprocess.Popen[bytes], output: int, report: int, limits: Limits, scratch: str) -> _Watch:
    """Read both pipes until the checker's end of the report closes or a limit is passed."""
    watch, deadline = _Watch(), time.monotonic() + limits.wall_s
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        selector.register(report, selectors.EVENT_READ)
        next_look = time.monotonic() + _TICK
        while not watch.status:
            for key, _ in selector.select(max(0.0, min(deadline, next_look) - time.monotonic())):
                chunk = os.read(key.fd, 65536)
                if key.fd == report:
                    if not chunk:
                        _drain(watch, output, limits)
                        return watch
                    watch.report = (watch.report + chunk)[:_REPORT]
                elif not chunk:
                    selector.unregister(output)
                else:
                    _count(watch, chunk, limits)
            now = time.monotonic()
            if watch.status:
                break
            if now >= deadline:
                watch.status, watch.detail = "timeout", f"not done after {limits.wall_s} s"
            elif now >= next_look:
                next_look = now + _TICK
                watch.status, watch.detail = _beyond(suspect.pid, limits, scratch)
    return watch


def _count(watch: _Watch, chunk: bytes, limits: Limits) -> None:
    watch.output_size += len(chunk)
    watch.output = (watch.output + chunk)[:_DETAIL]
    if watch.output_size > limits.output_bytes:
        watch.status, watch.detail = "output_limit", f"printed more than {limits.output_bytes} bytes"


def _drain(watch: _Watch, output: int, limits: Limits) -> None:
    """Take what was printed before the report, so that the outcome does not depend on which pipe was read first."""
    os.set_blocking(output, False)
    with contextlib.suppress(BlockingIOError):
        _count(watch, os.read(output, limits.output_bytes + 65536), limits)


def _beyond(pid: int, limits: Limits, scratch: str) -> tuple[str, str]:
    """Return the status and detail for what no kernel limit covers: the scratch folder's total and the threads."""
    sizes = []
    for entry in os.scandir(scratch):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            sizes.append(entry.stat(follow_symlinks=False).st_size)
    if sum(sizes) > limits.file_bytes or len(sizes) > 64:
        return "file_limit", f"{len(sizes)} files of {sum(sizes)} bytes; allowed are 64 of {limits.file_bytes}"
    if limits.processes > 1:
        with contextlib.suppress(FileNotFoundError):  # ended meanwhile
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
            if threads > limits.processes:
                return "process_limit", f"{threads} threads; allowed are {limits.processes}"
    return "", ""


def _judge(watch: _Watch, suspect: subprocess.Popen[bytes], limits: Limits) -> Outcome:
    """Turn what was seen into the outcome; WorkError where a child could not be locked down."""
    printed = watch.output.decode("utf-8", "replace")
    if watch.status:
        return _outcome(watch.status, watch.detail, printed)
    lines = watch.report.splitlines()
    if not lines:
        raise WorkError(f"the sandbox could not be set up, so no code was run: {printed[:_DETAIL] or 'no message'}")
    if len(lines) < 2:
        return _outcome("killed", "the tests' own process ended early (memory or CPU limit?)", printed)
    said = json.loads(lines[1])
    status, detail = str(said["status"]), str(said["detail"])
    if status == "passed":
        return Outcome(True, "passed", "")
    code = suspect.returncode
    if status == "setup_failed":
        raise WorkError(f"the sandbox could not be set up, so no code was run: {printed[:_DETAIL] or detail}")
    if status == "gone":
        if code == -signal.SIGXCPU:
            return _outcome("timeout", f"more than {limits.cpu_s} s of CPU time", printed)
        if code < 0:
            return _outcome("killed", f"{detail} (signal {-code})", printed)
        return _outcome("failed", f"{detail} (exit code {code})", printed)
    return _outcome("failed", detail, printed)


def _outcome(status: str, detail: str, printed: str) -> Outcome:
    text = f"{detail}\noutput:\n{printed}" if printed else detail
    return Outcome(False, status, text[:_DETAIL])
