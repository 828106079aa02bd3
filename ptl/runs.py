"""Where the runs of one machine are tracked and stored: servers, and the environment of their steps."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from ptl import address, s3_client
from ptl.errors import InputError
from ptl.processes import LIFELINE
from ptl.run_directory import RunDir

# What steps are told of this process's environment, beside what `environment` makes.
PASSED = (
    *s3_client.SETTINGS,
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "OMP_NUM_THREADS",
    *(name for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY") for name in (proxy, proxy.lower())),
)


def start_servers(home: Path) -> dict[str, str]:
    """`ptl up` with the ports it had last (its defaults the first time): the environment that reaches both servers."""
    from ptl import stack

    def port(name: str, default: int) -> int:
        note = home / "stack" / f"{name}.service.json"
        return int(json.loads(note.read_text())["port"]) if note.is_file() else default

    return stack.up(home, s3_port=port("s3", stack.S3_PORT), mlflow_port=port("mlflow", stack.MLFLOW_PORT))


def environment(run: RunDir, servers: dict[str, str]) -> dict[str, str]:
    """What local steps need to know: where to track, where checkpoints lie, which run this is.

    `servers` is what `start_servers` returned, or empty: then this process's environment says where to track, with a
    database file as default, and to an MLflow server (http) is left where checkpoints go.
    """
    address.split_login()
    passed = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    if servers:
        passed = {name: value for name, value in passed.items() if name not in s3_client.SETTINGS} | servers
    tracking = passed.setdefault(
        "MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.home}/mlflow.db"
    )
    if not tracking.startswith("http"):
        passed["PTL_ARTIFACT_ROOT"] = (run.home / "artifacts").as_uri()
    return passed | {
        "PTL_RUN_ID": run.run_id,
        "PTL_LAUNCH": run.launch,
        LIFELINE: str(run.lifeline),
        "PTL_RUN_DIR": str(run.path),
        "PTL_EARLIER_RUNS": " ".join(run.earlier),
        "PTL_SCRATCH": str(run.scratch),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def use(settings: dict[str, str]) -> None:
    """Make this process's environment that of the steps: other S3 settings would lead them to another store."""
    for name in (*s3_client.SETTINGS, "PTL_ARTIFACT_ROOT"):
        os.environ.pop(name, None)
    os.environ.update(settings)


def reach(home: Path, s3: bool) -> None:
    """Make this process's environment lead to the MLflow of earlier runs: the caller's own, `ptl up`'s servers, or the
    database of local runs. Raises InputError where `home` has none of it.
    """
    if s3:
        if not (home / "stack").is_dir():
            raise InputError(f"--s3: no `ptl up` was ever made in {home}; give --home, or leave --s3 out")
        use(start_servers(home))
    elif not os.environ.get("MLFLOW_TRACKING_URI"):
        database = home / "mlflow.db"
        if not database.is_file():
            more = "; --s3 is for the runs of its servers" if (home / "stack").is_dir() else ""
            raise InputError(f"--home: no local runs in {home} (no {database.name}){more}, or set MLFLOW_TRACKING_URI")
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{database}"


def artifact_location(experiment: str) -> str:
    """Where MLflow keeps the experiment's files, asked before any work; only `file://` without a server.

    Raises InputError when the server does not answer, or its store cannot be used.
    """
    address.split_login()
    uri = os.environ["MLFLOW_TRACKING_URI"]
    if not uri.startswith("http"):
        return os.environ["PTL_ARTIFACT_ROOT"]
    _require_answer(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from ptl import mlflow_objects, store

    client = MlflowClient(uri, registry_uri=uri)
    try:
        found = mlflow_objects.experiment(client, experiment)
    except MlflowException as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI: the server at {uri} refuses to say where experiment {experiment!r} lies: "
            f"{error}; is the address right, and are MLFLOW_TRACKING_USERNAME and _PASSWORD?"
        ) from error
    store.check(f"{found.artifact_location.rstrip('/')}/ptl")
    return str(found.artifact_location)


def _require_answer(uri: str) -> None:
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it accepts our password is seen later
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI: no MLflow server answers at {uri} ({getattr(error, 'reason', error)}); "
            "start it or correct the address, or let --s3 start one"
        ) from error
