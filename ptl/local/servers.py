"""`ptl up`, `ptl down` and `ptl ui`: real S3 and MLflow servers on loopback, with their data below `root`.

`root` is an absolute path: the servers have working directories of their own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from ptl import processes
from ptl.address import runs_page
from ptl.errors import InputError
from ptl.lineage import mlflow_database
from ptl.local import seaweedfs, server_process
from ptl.local.server_process import HOST, address
from ptl.processes import Environment

S3_PORT = 8433  # and the next three; SeaweedFS also takes each of the four + 10000
MLFLOW_PORT = 15000


def up(
    root: Path,
    *,
    s3_port: int,
    mlflow_port: int,
    backend_store_uri: str | None = None,
) -> Environment:
    """Start what is not running yet, wait until it answers, and return the environment for steps and `ptl run`.

    Data is in `root/s3` and `root/stack`. `backend_store_uri` is MLflow's database, by default sqlite there, for
    example `postgresql+psycopg://user:password@host/name`. Raises InputError for a port in use, WorkError with the end
    of the log when a server does not start.
    """
    stack = server_process.folder(root)
    with processes.exclusive(stack / "lock", f"`ptl up` in {root}", wait=server_process.START_SECONDS):
        # MLflow's port is checked before S3 is started, which would be left running.
        server_process.needs_start(root, "mlflow", mlflow_port)
        environment = seaweedfs.up(root, s3_port)
        environment["MLFLOW_TRACKING_URI"] = address(mlflow_port)
        database = backend_store_uri or f"sqlite:///{stack / 'mlflow.db'}"
        mlflow_up(root, mlflow_port, database, f"s3://{seaweedfs.BUCKET}/mlflow", environment)
    return environment


def mlflow_up(
    root: Path,
    port: int,
    database: str,
    artifacts: str,
    env: Environment,
) -> None:
    """Start the MLflow server alone, unless it runs; `artifacts` is where new experiments keep their files."""
    if server_process.needs_start(root, "mlflow", port):
        mlflow_database.create(database, artifacts)
        environment = env | _mlflow_environment(database)
        server_process.start(root, "mlflow", _mlflow_command(port, artifacts), environment, port, "/health")


def down(root: Path) -> list[str]:
    """Stop exactly the servers that `up` started under this root; returns their names."""
    return [name for name in ("mlflow", "s3") if server_process.stop(root, name)]


def ui(root: Path, port: int) -> NoReturn:
    """Replace this process by the MLflow server over the database of local runs, `root/mlflow.db`; Ctrl-C stops it.

    Raises InputError when there is no database yet or the port is in use.
    """
    database = root / "mlflow.db"
    if not database.is_file():
        raise InputError(
            f"no runs yet in {root} (no {database.name})",
            field="ui",
            remedy="start one with `ptl run CONFIG`",
        )
    server_process.require_free("--port", port)
    # MLflow's start page is about features that we do not use.
    experiment = mlflow_database.newest_experiment(database)
    page = runs_page(address(port), experiment) if experiment else address(port)
    print(f"your runs in MLflow: {page} (Ctrl-C stops it)", flush=True)
    os.environ.update(_mlflow_environment(f"sqlite:///{database}"))
    # In place of this process: Ctrl-C goes to the server itself.
    os.execv(sys.executable, _mlflow_command(port, f"file://{root / 'artifacts'}"))


def _mlflow_command(port: int, artifacts: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        f"--host={HOST}",
        f"--port={port}",
        "--workers=1",
        f"--default-artifact-root={artifacts}",
        "--no-serve-artifacts",
    ]


def _mlflow_environment(database: str) -> Environment:
    return {
        # Not as an option: a password must not be in the process list.
        "MLFLOW_BACKEND_STORE_URI": database,
        # It would start eight more processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
