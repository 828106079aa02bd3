"""MLflow's sqlite database appears complete or not at all.

MLflow takes seconds to make its tables in place: a kill meanwhile leaves a database that it can neither use nor repair.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ptl import processes
from ptl.errors import WorkError

SQLITE = "sqlite:///"
WAIT = 120  # seconds for another process to make it
# In a process of its own: closing it is certain, and this one does not import MLflow's server.
CODE = """
import sys
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore(*sys.argv[1:]).engine.dispose()
"""


def create(uri: str, artifacts: str) -> None:
    """Make the database of a sqlite URI unless it exists; any other address, or one with options, is left to MLflow.

    `artifacts` is where MLflow's default experiment keeps its files. Raises WorkError with the end of MLflow's output.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri or path.exists():
        return
    lock = path.with_name(f"{path.name}.lock")
    with processes.exclusive(lock, f"creating {path}", wait=WAIT):
        if not path.exists():  # another process may have made it while this one waited
            _create_tables(path, artifacts)


def _create_tables(path: Path, artifacts: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    # A killed command leaves its draft, and sqlite's journal of it.
    for leftover in path.parent.glob(f"{draft.name}*"):
        leftover.unlink()
    command = [sys.executable, "-c", CODE, f"{SQLITE}{draft}", artifacts]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.run(processes.tied(command), env=environment, capture_output=True, text=True)
    if process.returncode:
        raise WorkError(f"MLflow could not create its database {path}:\n{process.stderr[-2000:]}")
    draft.replace(path)
