"""Processes that start with their libraries imported: they are forked from a process that has imported them.

Importing torch, transformers and MLflow takes longer than most steps of a small model work. `serving` starts a server
that imports modules once; `start` then is `python -m MODULE` without the imports. Every process has a handler of its
own, which tells whoever asked for it how it ended.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

from ptl import processes

ADDRESS = "PTL_FORK_SERVER"  # the server's socket, in the environment of those that may ask
OUTPUTS = (1, 2)  # file descriptors that a process gets from whoever asked for it
LONGEST_FOLDER = 80  # bytes: with our names below it a socket's path has up to 107
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers

FORK = get_context("fork") if sys.platform == "linux" else None


@dataclass(frozen=True)
class Request:
    """A process that is asked for: `python -m module arguments... PARENT`, where PARENT is its parent's id."""

    module: str
    arguments: tuple[str, ...]
    environment: processes.Environment
    folder: str  # to work in


class Forked:
    """A process of the server's, with what subprocess.Popen offers for it: pid and wait()."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._exit_code: int | None = None
        self.pid: int = connection.recv()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self._exit_code is not None:
            return self._exit_code
        if not self._connection.poll(timeout):
            raise subprocess.TimeoutExpired("fork", timeout or 0)
        try:
            self._exit_code = int(self._connection.recv())
        except EOFError:
            # The handler was killed, and the process with it.
            self._exit_code = -signal.SIGKILL
        return self._exit_code


@contextlib.contextmanager
def serving(modules: Sequence[str]) -> Iterator[None]:
    """Let `start` in this process, and in those that it starts, find a server that imports `modules`.

    There is none where a fork is not safe (beside a GPU's driver, or on another system than Linux), nor where the
    temporary folder's path is too long for a socket's.
    """
    too_long = len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER
    if FORK is None or too_long or any(map(os.path.exists, GPU_DEVICES)):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ptl-fork-") as folder:
        address = str(Path(folder, "socket"))
        # Bound here: requests wait in it until the server has imported all.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            server = subprocess.Popen(
                [sys.executable, "-m", "ptl.fork_server", str(os.getpid()), str(listener.fileno()), *modules],
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for those who asked for a process: they end it
                # What imports print is no step's; the process itself reports those that fail, when it imports again.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            server.kill()
            server.wait()


def start(module: str, *arguments: str) -> Forked | None:
    """`python -m module arguments... PARENT` in a session of its own; it dies with this process.

    Its environment, folder and outputs are this process's. None where no server answers.
    """
    address = os.environ.get(ADDRESS)
    if address is None:
        return None
    request = Request(module, arguments, dict(os.environ), str(Path.cwd()))
    # A server that could not import a module has ended.
    with contextlib.suppress(OSError, EOFError):
        connection = Client(address, "AF_UNIX")
        connection.send(request)
        for output in OUTPUTS:
            send_handle(connection, output, None)
        return Forked(connection)
    return None


def _serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """Import the modules, then fork a handler for each request until this process is killed."""
    assert FORK is not None
    for module in modules:
        importlib.import_module(module)
    while True:
        accepted, _ = listener.accept()
        with Connection(accepted.detach()) as connection:
            FORK.Process(target=_handle, args=(connection, os.getpid())).start()


def _handle(connection: Connection, server: int) -> None:
    """Fork the process of one request, and send its id and then its exit code; it dies with whoever asked for it."""
    assert FORK is not None
    processes.die_with(server)
    request = connection.recv()
    outputs = [recv_handle(connection) for _ in OUTPUTS]
    process = FORK.Process(target=_become, args=(request, connection, outputs, os.getpid()))
    process.start()
    # The connection is closed by a death: nothing else is sent.
    wait([connection, process.sentinel])
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    connection.send(process.exitcode)


def _become(request: Request, connection: Connection, outputs: list[int], parent: int) -> None:
    """Be the process that was asked for."""
    processes.die_with(parent)
    # Before anybody knows its id: a signal to its group reaches all that it starts.
    os.setsid()
    for source, output in zip(outputs, OUTPUTS, strict=True):
        os.dup2(source, output)
        os.close(source)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    connection.send(os.getpid())
    connection.close()
    sys.argv = [request.module, *request.arguments, str(parent)]
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    processes.die_with(int(sys.argv[1]))
    _serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
