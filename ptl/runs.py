"""Run directories on one machine: a new one for each run, the same one again for a run that did not finish."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from ptl import address, s3_client
from ptl.config import Config
from ptl.errors import InputError

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


@dataclass(frozen=True)
class RunDir:
    """`.ptl/runs/<id>/` holds the pipeline, the config, the result and the report of one run."""

    home: Path  # .ptl
    path: Path

    @property
    def run_id(self) -> str:
        """The folder's name; it also names the run in MLflow and in the store."""
        return self.path.name

    @property
    def result(self) -> Path:
        """Written by the last step: its presence means that the run is finished."""
        return self.path / "result.json"


def open_run(home: Path, config: Config, chosen: Path | None, fresh: bool) -> tuple[RunDir, bool]:
    """The directory to run in, and whether it continues an unfinished run of the same config (`resources` may differ).

    Raises InputError when `chosen` belongs to another run.
    """
    home = home.absolute()
    if chosen is not None:
        run = RunDir(home, chosen.absolute())
        held = run.path / "config.yaml"
        if held.is_file() and not _same_run(held, config):
            raise InputError(
                f"--run-dir: {chosen} belongs to another run: its config.yaml differs from this config; "
                "choose another directory"
            )
        if not held.is_file() and run.path.is_dir() and any(run.path.iterdir()):
            raise InputError(f"--run-dir: {chosen} is not empty and holds no run; choose another directory")
        return run, held.is_file()
    for path in sorted((home / "runs").glob(f"{config.name}-*"), reverse=True):
        run = RunDir(home, path)
        held = path / "config.yaml"
        if not fresh and held.is_file() and _same_run(held, config) and not run.result.is_file():
            return run, True
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    digest = hashlib.sha256(os.urandom(8)).hexdigest()[:4]
    return RunDir(home, home / "runs" / f"{config.name}-{stamp}-{digest}"), False


def _same_run(held: Path, config: Config) -> bool:
    """Whether a run's config is this one but for `resources`, on which no result depends."""
    old, new = yaml.safe_load(held.read_text()), yaml.safe_load(dump(config))
    return isinstance(old, dict) and {**old, "resources": None} == {**new, "resources": None}


def prepare(run: RunDir, config: Config) -> IO[str]:
    """Make the directory, write the effective config, and point `.ptl/latest` at it.

    Returns its lock, to be kept until the run ends. Raises InputError when another process executes the run.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    lock = (run.path / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process, however it ends
    except BlockingIOError as error:
        raise InputError(
            f"run {run.run_id}: another process executes it; wait for it, or start one beside it with --new"
        ) from error
    (run.path / "config.yaml").write_text(dump(config))
    (run.path / "error.json").unlink(missing_ok=True)
    pointer = run.home / "latest"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(os.path.relpath(run.path, run.home))
    return lock


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
        "PTL_LAUNCH": uuid.uuid4().hex,  # each command gives a step new attempts
        "PTL_RUN_DIR": str(run.path),
        "PTL_SCRATCH": str(run.path / "scratch"),
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

    from ptl import store

    client = MlflowClient(uri, registry_uri=uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            found = client.get_experiment(client.create_experiment(experiment))
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


def failure(run: RunDir) -> tuple[str, int] | None:
    """Message and exit code that a failed step left behind."""
    path = run.path / "error.json"
    if not path.is_file():
        return None
    told = json.loads(path.read_text())
    return f"{told['step']}: {told['message']}", int(told["exit_code"])


def dump(config: Config) -> str:
    """The effective config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
