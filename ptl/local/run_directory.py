"""Run directories on one machine: a new one for each run, the same one again for a run that did not finish."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ptl import processes
from ptl.config import dag
from ptl.config.run import Config
from ptl.errors import InputError, PtlError, WorkError
from ptl.storage import local_files

NOT_TRIED = "the run ended before it"
END_SECONDS = 30  # for the steps of an interrupted command to end


@dataclass(frozen=True)
class RunDir:
    """`.ptl/runs/<id>/` holds the pipeline, the config, the result and the report of one run."""

    home: Path  # .ptl
    path: Path
    # unfinished runs of this name with another config, the newest first
    earlier: tuple[str, ...] = ()
    # of this command: each gives its steps new attempts
    launch: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def run_id(self) -> str:
        """The folder's name; it also names the run in MLflow and in the store."""
        return self.path.name

    @property
    def result(self) -> Path:
        """Written by the last step: with it the run is finished, unless exports are missing."""
        return self.path / "result.json"

    @property
    def scratch(self) -> Path:
        """Temporary work of the steps, which survives a kill."""
        return self.path / "scratch"

    @property
    def lifeline(self) -> Path:
        """Locked as long as this command runs: its steps end with it."""
        return self.path / f"lifeline-{self.launch}"


def open_run(home: Path, config: Config, fresh: bool) -> tuple[RunDir, bool]:
    """The directory to run in, and whether it continues a run of the same config (see `_is_same`).

    An unfinished run is continued, or the newest one if it only lacks exports. Unless it is to begin anew, it names
    unfinished runs of other configs, whose steps may be taken over.
    """
    home = home.absolute()
    runs = [] if fresh else _runs(home, config.name)
    same = [path for path, old_config in runs if _is_same(old_config, config)]
    unfinished = [path for path, _ in runs if _tried_exports(path) is None]
    earlier = tuple(path.name for path in unfinished if path not in same)
    resumable = [path for path in same if path in unfinished]
    resumable += [path for path in same[:1] if missing_exports(path, config)]
    if resumable:
        return RunDir(home, resumable[0], earlier), True
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    # Two commands may begin in the same second.
    name = f"{config.name}-{stamp}-{secrets.token_hex(2)}"
    return RunDir(home, home / "runs" / name, earlier), False


def missing_exports(folder: Path, config: Config) -> dict[str, str]:
    """Step -> reason, of the exports of a config that a run's result lacks; none of a run without a result."""
    tried = _tried_exports(folder)
    if tried is None:
        return {}
    steps = map(dag.export_step, config.export)
    reasons = {step: tried.get(step, NOT_TRIED) for step in steps}
    return {step: reason for step, reason in reasons.items() if reason}


def _tried_exports(folder: Path) -> dict[str, str] | None:
    """Of each export in a run's result why it was not made, empty where it was; None without a readable result."""
    try:
        result = json.loads((folder / "result.json").read_text())
        return {export["step"]: export["failed"] for export in result["exports"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _runs(home: Path, name: str) -> list[tuple[Path, dict[str, Any]]]:
    """Directories and configs of the runs of this name, the newest first."""
    # Names end with the time: their order is that of the runs. The pattern also fits a longer name.
    folders = sorted((home / "runs").glob(f"{name}-*"), reverse=True)
    configs = [(path, _read_config(path)) for path in folders]
    return [(path, config) for path, config in configs if config and config["name"] == name]


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The config that a directory's run began with; None where there is none, or only the part that a crash left."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    # A file that was cut off may still be valid YAML, or a scalar.
    if isinstance(config, dict) and set(config) == set(Config.model_fields):
        return config
    return None


def _is_same(old_config: dict[str, Any], config: Config) -> bool:
    """Whether a config is the same run's; no other step depends on `resources`, `images` and `export`.

    The tag of the images is ptl's version unless it is given: a run of another version is refused by its first step.
    """
    new_config = config.model_dump(mode="json", exclude={"resources", "export", "images"})
    return all(value == old_config[name] for name, value in new_config.items())


@contextlib.contextmanager
def working(
    run: RunDir, config: Config, clear: Callable[[Path], None] | None = None
) -> Iterator[None]:
    """Make the directory, write the effective config, point `.ptl/latest` at it; the block is this run's only command.

    Steps that a killed command left behind have ended before it begins, and its own steps when it ends; `clear` ends
    those that do not see by themselves that their command is gone, such as a paused container. Raises InputError when
    another process executes the run.
    """
    remedy = "wait for it, or start another with --new"
    with processes.exclusive(run.path / "lock", f"run {run.run_id}", remedy=remedy):
        # Steps of a killed command: one that comes too late to follow a lifeline ends as well.
        for lifeline in run.path.glob("lifeline-*"):
            lifeline.unlink()
        if clear:
            clear(run.path)
        _await_steps(run)

        # From here on nobody else writes to the directory.
        local_files.replace(run.path / "config.yaml", dump(config).encode())
        (run.path / "error.json").unlink(missing_ok=True)
        _point_link(run.home / "latest", run.path)
        try:
            with processes.lifeline(run.lifeline):
                yield
        finally:
            with contextlib.suppress(InputError):  # the next command waits for them too
                _await_steps(run)


def _await_steps(run: RunDir) -> None:
    """Wait until no step of the run works any more. Raises InputError naming the process of one that does not end."""
    for lock in sorted(run.scratch.glob("*.lock")):
        with processes.exclusive(lock, f"step {lock.stem} of run {run.run_id}", wait=END_SECONDS):
            pass


def _point_link(link: Path, target: Path) -> None:
    """Let a symbolic link point to `target`, in one step."""
    # A new link is renamed over the old one: there is no moment without one.
    draft = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    # a link is followed from its real folder
    draft.symlink_to(os.path.relpath(target, link.parent.resolve()))
    draft.replace(link)


def step_error(run: RunDir) -> PtlError | None:
    """The error that a failed step left behind."""
    path = run.path / "error.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    kind = InputError if record["exit_code"] == InputError.exit_code else WorkError
    return kind(record["message"], field=record["step"])


def dump(config: Config) -> str:
    """The effective config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
