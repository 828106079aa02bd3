"""Processes of servers: each is noted in a file below `root`, by which a later command finds and stops it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.processes import Environment
from ptl.storage import local_files

HOST = "127.0.0.1"
START_SECONDS = 90  # for a server's first answer
STOP_SECONDS = 15  # after each signal
LOG_LINES = 15  # of a server that does not start, in the error


@dataclass(frozen=True)
class Service:
    """A server process, as noted in `stack/<name>.service.json`."""

    pid: int
    started: str  # distinguishes it from a later process with the same id
    port: int


def needs_start(root: Path, name: str, port: int) -> bool:
    """Whether a server is still to be started. Raises InputError if it runs on another port, or its port is taken."""
    service = _noted_service(root, name)
    if service is None or not _is_alive(service):
        require_free(f"--{name}-port", port)
        return True
    if service.port != port:
        raise InputError(
            f"the {name} server of {root} already runs on port {service.port}",
            field=f"--{name}-port",
            remedy="`ptl down` first",
        )
    return False


def require_free(option: str, port: int) -> None:
    """Raise InputError, naming the option, for a port that a server cannot take."""
    if not 1 <= port <= 65535:
        raise InputError(
            f"port {port} must be in 1..65535 (SeaweedFS takes its ports + 10000 too)",
            field=option,
        )
    with socket.socket() as probe:
        # As the servers do: connections of an earlier one that are closing do no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"port {port} is in use ({error.strerror})",
                field=option,
                remedy="choose another",
            ) from error


def start(
    root: Path,
    name: str,
    command: list[str],
    env: Environment,
    port: int,
    health: str,
) -> None:
    """Start a server, note it, and wait until it answers; `health` is the path to ask."""
    log = folder(root) / f"{name}.log"
    # MLflow logs the database's address with its password.
    log.touch(mode=0o600)
    process = _spawn_waiting(command, env, log)
    service = Service(process.pid, processes.start_time(process.pid), port)
    note = _note(root, name)
    local_files.replace(note, json.dumps(asdict(service)).encode())

    # From here on `down` finds it, so it may begin.
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()

    deadline = time.monotonic() + START_SECONDS
    while not answers(f"{address(port)}{health}"):
        exit_code = process.poll()
        if exit_code is not None:
            problem = f"ended with code {exit_code}"
        elif time.monotonic() > deadline:
            problem = f"did not answer within {START_SECONDS} s"
            _end(service)
        else:
            time.sleep(0.1)
            continue
        # Nothing is left of it but its log, whose end says what was wrong.
        note.unlink(missing_ok=True)
        log_end = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise WorkError(f"{name} server {problem}; the end of {log}:\n{log_end}")


def _spawn_waiting(command: list[str], env: Environment, log: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own that begins with a line on its input; if we are killed before that, it ends."""
    environment = os.environ | env
    # A server must not take another one's address from the caller's environment.
    if "MLFLOW_TRACKING_URI" not in env:
        environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("ab") as output:
        return subprocess.Popen(
            ["/bin/sh", "-c", 'read -r line && exec "$@" < /dev/null', "sh", *command],
            env=environment,
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def stop(root: Path, name: str) -> bool:
    """Stop a server (`s3` or `mlflow`); returns whether it ran."""
    service = _noted_service(root, name)
    if service is None:
        return False
    was_alive = _is_alive(service)
    if was_alive:
        _end(service)
    _note(root, name).unlink()
    return was_alive


def last_port(root: Path, name: str) -> int | None:
    """The port that a server (`s3` or `mlflow`) had when it was last started; None for the first time."""
    service = _noted_service(root, name)
    return service.port if service else None


def address(port: int) -> str:
    """Of a server on this machine."""
    return f"http://{HOST}:{port}"


def answers(url: str) -> bool:
    """Whether a server says there that all is well."""
    try:
        return requests.get(url, timeout=2).status_code == 200
    except requests.RequestException:
        return False


def folder(root: Path) -> Path:
    """Where notes, logs and keys of the servers are."""
    stack = root / "stack"
    stack.mkdir(parents=True, exist_ok=True)
    return stack


def _end(service: Service) -> None:
    """SIGTERM to the process group, SIGKILL when that is not enough. MLflow's workers are in its group."""
    os.killpg(service.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _is_alive(service):
        if time.monotonic() > deadline:
            os.killpg(service.pid, signal.SIGKILL)
            deadline += STOP_SECONDS
        time.sleep(0.05)


def _is_alive(service: Service) -> bool:
    return processes.start_time(service.pid) == service.started != ""


def _noted_service(root: Path, name: str) -> Service | None:
    note = _note(root, name)
    return Service(**json.loads(note.read_text())) if note.is_file() else None


def _note(root: Path, name: str) -> Path:
    return root / "stack" / f"{name}.service.json"
