"""Where the runs of one machine are tracked and stored: servers, and the environment of their steps."""

from __future__ import annotations

import os
from pathlib import Path

from ptl import address
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client, mlflow_objects, run_status
from ptl.local import servers
from ptl.local.run_directory import RunDir
from ptl.processes import LIFELINE, Environment
from ptl.storage import s3, store

# What steps get of this process's environment, beside what `environment` adds.
LOGIN = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
)
HUB = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
# Some libraries read the one spelling, some the other.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
OTHERS = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "PTL_WEBHOOK_URL", "OMP_NUM_THREADS")
PASSED = (*s3.SETTINGS, *LOGIN, *HUB, *PROXIES, *OTHERS)


def environment(run: RunDir, addresses: Environment) -> Environment:
    """The environment of local steps: where to track, where checkpoints are, which run this is.

    `addresses` is what `servers.up` returned, or empty: then this process's environment says where to track, with a
    database file as default, and an MLflow server (http) decides where checkpoints go.
    """
    address.split_login()
    settings = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    if addresses:
        # Other S3 settings of the caller would lead to another store.
        settings = (
            {name: value for name, value in settings.items() if name not in s3.SETTINGS}
            | addresses
            | {"PTL_MLFLOW_UI": ""}  # where people open that of a cluster
        )
    else:
        database = f"sqlite:///{run.home}/mlflow.db"
        settings["MLFLOW_TRACKING_URI"] = os.environ.get("MLFLOW_TRACKING_URI") or database
    # Without a server steps write their files themselves.
    if not address.is_server(settings["MLFLOW_TRACKING_URI"]):
        settings["PTL_ARTIFACT_ROOT"] = (run.home / "artifacts").as_uri()
    return {
        **settings,
        "PTL_RUN_ID": run.run_id,
        "PTL_LAUNCH": run.launch,
        LIFELINE: str(run.lifeline),
        "PTL_RUN_DIR": str(run.path),
        "PTL_SCRATCH": str(run.scratch),
        # Else a step's log is full of bars and warnings.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def use(settings: Environment) -> None:
    """Make this process's environment that of the steps: other S3 settings would lead them to another store."""
    # What the steps' environment does not set, ours must not either.
    for name in (*s3.SETTINGS, "PTL_ARTIFACT_ROOT"):
        os.environ.pop(name, None)
    os.environ.update(settings)


def reach(home: Path, s3: bool) -> None:
    """Make this process's environment lead to the MLflow of earlier runs: the caller's own, `ptl up`'s servers, or the
    database of local runs. Raises InputError where `home` has none of it.
    """
    # `ptl up` makes this folder, and keeps it when its servers are stopped.
    has_servers = (home / "stack").is_dir()
    if s3:
        if not has_servers:
            raise InputError(
                f"`ptl up` has never run in {home}",
                field="--s3",
                remedy="give --home, or leave --s3 out",
            )
        use(servers.up(home))
        return
    if os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow_client.check_address()
        mlflow_client.ask()
        return
    database = home / "mlflow.db"
    if not database.is_file():
        problem = f"no local runs in {home} (no {database.name})"
        if has_servers:
            problem += "; --s3 is for the runs of its servers"
        raise InputError(
            problem, field="--home", remedy="give another one, or set MLFLOW_TRACKING_URI"
        )
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{database}"


def artifact_location(experiment: str) -> str:
    """Where MLflow keeps the experiment's files, asked before any work; only `file://` without a server.

    Raises InputError when the server does not answer, or its store cannot be used.
    """
    if not address.is_server(os.environ["MLFLOW_TRACKING_URI"]):
        return os.environ["PTL_ARTIFACT_ROOT"]
    try:
        mlflow_client.ask()
        # MLflow's own client would try for minutes.
        with mlflow_client.briefly(run_status.WATCHING), mlflow_client.connected() as client:
            location = str(mlflow_objects.experiment(client, experiment).artifact_location)
    except WorkError as error:
        raise InputError(
            error.problem,
            field="MLFLOW_TRACKING_URI",
            remedy="start the server, correct the address, or let --s3 start one",
        ) from error
    # Steps would find out only when the first checkpoint is done.
    store.check(f"{location.rstrip('/')}/ptl")
    return location
