"""Run directories on one machine: a new one for each run, the same one again for a run that did not finish."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ptl import localfs, processes, store
from ptl.config import Config
from ptl.errors import InputError

ENDING = 30  # seconds for the steps of an interrupted command to end


@dataclass(frozen=True)
class RunDir:
    """`.ptl/runs/<id>/` holds the pipeline, the config, the result and the report of one run."""

    home: Path  # .ptl
    path: Path
    earlier: tuple[str, ...] = ()  # unfinished runs of this name with another config, the newest first
    launch: str = field(default_factory=lambda: uuid.uuid4().hex)  # each command gives a step new attempts

    @property
    def run_id(self) -> str:
        """The folder's name; it also names the run in MLflow and in the store."""
        return self.path.name

    @property
    def result(self) -> Path:
        """Written by the last step: its presence means that the run is finished."""
        return self.path / "result.json"

    @property
    def scratch(self) -> Path:
        """Temporary work of the steps, which survives a kill."""
        return self.path / "scratch"

    @property
    def lifeline(self) -> Path:
        """Locked as long as this command runs: its steps end with it."""
        return self.path / f"lifeline-{self.launch}"


def open_run(home: Path, config: Config, chosen: Path | None, fresh: bool) -> tuple[RunDir, bool]:
    """The directory to run in, and whether it continues an unfinished run of the same config (`resources` may differ).

    Unless it is to begin anew, it names unfinished runs of other configs, whose steps may be taken over. Raises
    InputError when `chosen` belongs to another run.
    """
    home = home.absolute()
    unfinished = [] if fresh else _unfinished(home, config)
    earlier = tuple(path.name for path, held in unfinished if not _same_run(held, config))
    if chosen is not None:
        if not store.is_name(chosen.absolute().name):  # it names the run in the store
            raise InputError(f"--run-dir: {chosen.name!r} must be 1-128 letters, digits, dots, dashes or underscores")
        run = RunDir(home, chosen.absolute(), earlier)
        held = _config(run.path)
        if not (_is_ours(run.path) if held is None else _same_run(held, config)):
            another = "belongs to another run: its config.yaml differs from this config"
            why = another if (run.path / "config.yaml").is_file() else "is not empty and holds no run"
            raise InputError(f"--run-dir: {chosen} {why}; choose another directory")
        return run, held is not None
    for path, held in unfinished:
        if _same_run(held, config):
            return RunDir(home, path, earlier), True
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    digest = hashlib.sha256(os.urandom(8)).hexdigest()[:4]
    return RunDir(home, home / "runs" / f"{config.name}-{stamp}-{digest}", earlier), False


def _unfinished(home: Path, config: Config) -> list[tuple[Path, dict[str, Any]]]:
    """Directories and configs of the runs of this name that have no result yet, the newest first."""
    paths = sorted((home / "runs").glob(f"{config.name}-*"), reverse=True)
    configs = [(path, _config(path)) for path in paths if not (path / "result.json").is_file()]
    return [(path, held) for path, held in configs if held is not None and held["name"] == config.name]


def _config(folder: Path) -> dict[str, Any] | None:
    """The config that a directory's run began with; None where there is none, or only the part that a crash left."""
    try:
        held = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    whole = isinstance(held, dict) and set(held) == set(Config.model_fields)
    return held if whole else None


def _same_run(held: dict[str, Any], config: Config) -> bool:
    """Whether a run's config is this one but for `resources`, on which no result depends."""
    new = yaml.safe_load(dump(config))
    return {**held, "resources": None} == {**new, "resources": None}


def _is_ours(folder: Path) -> bool:
    """Whether a directory without a config is free, or one that a killed command has begun.

    Then the steps' own keys keep results of another config from being taken.
    """
    if not folder.is_dir():
        return not folder.exists()
    names = {path.name for path in folder.iterdir()}
    return "lock" in names or not names


@contextlib.contextmanager
def working(run: RunDir, config: Config, clear: Callable[[Path], None] = lambda folder: None) -> Iterator[None]:
    """Make the directory, write the effective config, point `.ptl/latest` at it; the block is this run's only command.

    Steps that a killed command left behind have ended before it begins, and its own steps when it ends; `clear` ends
    those that do not see by themselves that their command is gone, such as a paused container. Raises InputError when
    another process executes the run.
    """
    remedy = "wait for it, or start one beside it with --new"
    with processes.exclusive(run.path / "lock", f"run {run.run_id}", remedy=remedy):
        for left in run.path.glob("lifeline-*"):
            left.unlink()  # whoever comes too late to follow it ends as well
        clear(run.path)
        _await_steps(run)
        localfs.replace(run.path / "config.yaml", dump(config).encode())
        (run.path / "error.json").unlink(missing_ok=True)
        _point(run.home / "latest", run.path)
        try:
            with processes.lifeline(run.lifeline):
                yield
        finally:
            with contextlib.suppress(InputError):  # the next command waits for them too
                _await_steps(run)


def _await_steps(run: RunDir) -> None:
    """Wait until no step of the run works any more. Raises InputError naming the process of one that does not end."""
    for lock in sorted(run.scratch.glob("*.lock")):
        with processes.exclusive(lock, f"step {lock.stem} of run {run.run_id}", wait=ENDING):
            pass


def _point(link: Path, target: Path) -> None:
    """Let a symbolic link point to `target`, in one step."""
    draft = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    draft.symlink_to(os.path.relpath(target, link.parent))
    draft.replace(link)


def failure(run: RunDir) -> tuple[str, int] | None:
    """Message and exit code that a failed step left behind."""
    path = run.path / "error.json"
    if not path.is_file():
        return None
    error = json.loads(path.read_text())
    return f"{error['step']}: {error['message']}", int(error["exit_code"])


def dump(config: Config) -> str:
    """The effective config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
