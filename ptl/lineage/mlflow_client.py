"""The connection to MLflow: settings that are checked first, how long to wait for a server, errors that name it.

A sqlite database appears complete or not at all. MLflow takes seconds to make its tables in place: a kill meanwhile
leaves a database that it can neither use nor repair.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl import address, connections, extras, processes
from ptl.errors import InputError, WorkError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

# MLflow's default of 7 retries takes four minutes; 6 outlast a restart of the server (sleeps of 0, 4, 8, 16, 32, 64 s).
RETRIES = "6"
# 12 s of sleep
REPORTING = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
REACH = (5, 2)  # seconds to reach the server, and for its answer, where only the former matters
PAGE = 1000  # results in one answer; MLflow allows no more of experiments

# Of servers and databases. Folders (file:) have no registry of models, and Databricks keeps records its own way.
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")

# Error codes of MLflow.
NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
ALREADY_THERE = "RESOURCE_ALREADY_EXISTS"
SQLITE = "sqlite:///"
DATABASE_WAIT = 120  # seconds for another process to make it
# In a process of its own: closing it is certain, and this one does not import MLflow's server.
DATABASE_CODE = """
import sys
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore(*sys.argv[1:]).engine.dispose()
"""


def check_address() -> None:
    """Raise InputError for a MLFLOW_TRACKING_URI that MLflow has no store for: it says so late, and of another part."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    shown = address.without_login(uri)
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        raise InputError(
            shown, field="MLFLOW_TRACKING_URI", remedy=f"write http://{shown}, or https://"
        )
    # A database's scheme may name its driver: postgresql+psycopg2
    scheme = uri.partition(":")[0].partition("+")[0]
    if uri and scheme not in SCHEMES:
        raise InputError(
            f"{shown} begins with none of {', '.join(SCHEMES)}",
            field="MLFLOW_TRACKING_URI",
            remedy="give the address of a server (https://...) or of a database (sqlite:////folder/mlflow.db)",
        )


def connect() -> MlflowClient:
    """Checked settings first: without them mlflow falls back to a database of its own, or fails in confusing ways."""
    # MLflow prints the address: a password must not be in it.
    address.split_login()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError(
            "MLFLOW_TRACKING_URI is not set",
            field="environment",
            remedy="set it to your MLflow server's address",
        )
    check_address()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Else it prints two lines whenever a run ends, among what a command prints.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A database needs more than the client.
    if not address.is_server(uri) and importlib.util.find_spec("sqlalchemy") is None:
        raise InputError(
            f"MLFLOW_TRACKING_URI={uri} needs the full mlflow package, this is mlflow-skinny",
            field="environment",
            remedy=f"{extras.install('pipelines')}, or give the address of a server (http://...)",
        )
    # mlruns: MLflow's own default
    create_database(uri, os.environ.get("PTL_ARTIFACT_ROOT", "mlruns"))
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


@contextmanager
def explained() -> Iterator[None]:
    """Errors of MLflow and of its database name it: an InputError for a refused login, else a WorkError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        problem = _problem(error)
        if "Invalid Host" in str(error):  # also a 403
            raise WorkError(
                problem, remedy="start it with --allowed-hosts and this host name (host:*)"
            ) from error
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise WorkError(problem, remedy="is the server up and is the address right?") from error
        raise InputError(
            problem,
            field="MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD",
            remedy="set them, or MLFLOW_TRACKING_TOKEN, to those of a user who may use the experiment",
        ) from error
    except Exception as error:
        # The package is missing where MLflow is a server.
        if not type(error).__module__.startswith("sqlalchemy."):
            raise
        database = address.without_login(os.environ.get("MLFLOW_TRACKING_URI", ""))
        raise WorkError(
            connections.sentence(
                f"MLflow's database {database}", error, str(error).splitlines()[0]
            ),
            remedy="is it one that MLflow has made, whole, and its disk not full?",
        ) from error


def _problem(error: MlflowException) -> str:
    """A sentence: why the server does not answer, what it answers, or which status and page it answers with."""
    from mlflow.exceptions import RestException

    server = f"MLflow at {os.environ.get('MLFLOW_TRACKING_URI', '')}"
    text = str(error)
    # MLflow's client quotes an answer that is no JSON, as those of proxies are.
    description, _, body = text.partition("Response body: ")
    if isinstance(error, RestException) or not body:
        return connections.sentence(server, error)
    answer = connections.shortened(body.strip("'"))
    status = re.search(r"failed with error code (\d+)", description)
    if status is None:
        return f"{server} answers, but not as MLflow does: {answer}"
    return f"{server} answers {connections.status_name(int(status[1]))}: {answer}"


@contextmanager
def connected() -> Iterator[MlflowClient]:
    """A client whose errors are explained. Raises InputError for a missing setting, WorkError where MLflow fails."""
    with explained():
        yield connect()


@contextmanager
def briefly(limits: dict[str, str] = REPORTING) -> Iterator[None]:
    """Give up on a server sooner, where a failure is reported: the failure itself must not wait for minutes."""
    # What a user has set stays.
    defaults = {
        name: os.environ.get(name) for name in limits if os.environ.get(name) in (None, RETRIES)
    }
    for name in defaults:
        os.environ[name] = limits[name]
    try:
        yield
    finally:
        for name, value in defaults.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def ask() -> None:
    """Raise WorkError within seconds where no server is at MLFLOW_TRACKING_URI: MLflow's own client tries for minutes.

    One that is there and slow, or of another kind, passes; a database is not asked.
    """
    import requests

    uri = address.bare(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if not address.is_server(uri):
        return
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=REACH, allow_redirects=False)
    except (requests.exceptions.SSLError, requests.exceptions.ReadTimeout):
        return
    except requests.exceptions.RequestException as error:
        problem = connections.sentence(f"MLflow at {uri}", error)
        raise WorkError(problem, remedy="is the server up and is the address right?") from error


@contextmanager
def ignoring(error_code: str) -> Iterator[None]:
    """Let errors of MLflow with this code pass: another step, or a request whose answer was lost, came first."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != error_code:
            raise


def if_there(request: Callable[..., Any], *identity: str) -> Any:
    """What MLflow answers about this id; None where it has nothing, as after a deletion whose answer was lost."""
    with ignoring(NOT_THERE):
        return request(*identity)
    return None


def experiment_ids(client: MlflowClient) -> list[str]:
    """The ids of all active experiments."""
    return [experiment.experiment_id for experiment in pages(client.search_experiments)]


def pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """All results of a search of MLflow, page by page."""
    # No token is the first page, and the last page has none.
    token = None
    while True:
        page = search(max_results=PAGE, page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return


def create_database(uri: str, artifacts: str) -> None:
    """Make the database of a sqlite URI unless it exists; any other address, or one with options, is left to MLflow.

    `artifacts` is where MLflow's default experiment keeps its files. Raises WorkError with the end of MLflow's output.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri or path.exists():
        return
    lock = path.with_name(f"{path.name}.lock")
    with processes.exclusive(lock, f"creating {path}", wait=DATABASE_WAIT):
        if not path.exists():  # another process may have made it while this one waited
            _create_tables(path, artifacts)


def _create_tables(path: Path, artifacts: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    # A killed command leaves its draft, and sqlite's journal of it.
    for leftover in path.parent.glob(f"{draft.name}*"):
        leftover.unlink()
    command = [sys.executable, "-c", DATABASE_CODE, f"{SQLITE}{draft}", artifacts]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.run(
        processes.tied(command), env=environment, capture_output=True, text=True
    )
    if process.returncode:
        raise WorkError(f"MLflow could not create its database {path}:\n{process.stderr[-2000:]}")
    draft.replace(path)
