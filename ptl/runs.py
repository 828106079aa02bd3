"""Run directories on one machine: a new one for each run, the same one again for a run that did not finish."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from ptl.config import Config
from ptl.errors import InputError


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
    """The directory to run in, and whether it continues an unfinished run of the very same config.

    Raises InputError when `chosen` belongs to another run.
    """
    home = home.absolute()
    if chosen is not None:
        run = RunDir(home, chosen.absolute())
        held = run.path / "config.yaml"
        if held.is_file() and held.read_text() != dump(config):
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
        if not fresh and held.is_file() and held.read_text() == dump(config) and not run.result.is_file():
            return run, True
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    digest = hashlib.sha256(os.urandom(8)).hexdigest()[:4]
    return RunDir(home, home / "runs" / f"{config.name}-{stamp}-{digest}"), False


def prepare(run: RunDir, config: Config) -> None:
    """Make the directory, write the effective config, and point `.ptl/latest` at it."""
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "config.yaml").write_text(dump(config))
    (run.path / "error.json").unlink(missing_ok=True)
    pointer = run.home / "latest"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(os.path.relpath(run.path, run.home))


def environment(run: RunDir) -> dict[str, str]:
    """What local steps need to know: where to track, where checkpoints lie, which run this is."""
    return {
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.home}/mlflow.db",
        "PTL_ARTIFACT_ROOT": (run.home / "artifacts").as_uri(),
        "PTL_RUN_ID": run.run_id,
        "PTL_RUN_DIR": str(run.path),
        "PTL_SCRATCH": str(run.path / "scratch"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


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
