"""Run the compiled YAML on one machine, task after task, as the cluster would: in processes or in containers."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pipelines.prune_tune_loop import containers
from pipelines.prune_tune_loop.compact import local_copy
from ptl.config import Config
from ptl.errors import InputError, WorkError
from ptl.log import MARK

COLOUR = re.compile(r"\x1b\[\d*m")
NO_REASON = (
    "Its process left no reason, as when it is killed (what the kernel does when memory is used up: free memory)"
)
ERROR = re.compile(r"^\s*(?:[\w.]+\.)?(\w+(?:Error|Exception|Exit)): (.+)$", re.M)


@dataclass(frozen=True)
class RunnerJob:
    """One execution of a compiled pipeline."""

    config: Config
    pipeline: Path  # the compiled YAML
    folder: Path  # of the run
    environment: dict[str, str]  # of every step
    artifacts: str  # where the MLflow experiment keeps its files
    steps: tuple[str, ...]  # in the order of their execution


def run_subprocess(job: RunnerJob, verbose: bool = False) -> None:
    """Execute every task in a process of this machine's Python. Raises the failed task's error."""
    from kfp import local

    warnings.filterwarnings("ignore", message="You may be attemping to run a task")  # images play no part here
    _execute(local.SubprocessRunner(use_venv=False), job, verbose)


def run_docker(job: RunnerJob, verbose: bool = False) -> None:
    """Execute every task in a container of its image. Raises the failed task's error."""
    from kfp import local

    arguments = containers.arguments(job.config, job.folder, job.environment, job.artifacts)
    try:
        _execute(local.DockerRunner(**arguments), job, verbose)
    finally:
        containers.remove_leftovers(job.folder)


RUNNERS: dict[str, Callable[[RunnerJob, bool], None]] = {"subprocess": run_subprocess, "docker": run_docker}
# What an earlier command may have left at work in a run's folder: a killed one's containers outlive it.
CLEAR: dict[str, Callable[[Path], None]] = {"subprocess": lambda folder: None, "docker": containers.remove_leftovers}


def _execute(runner: Any, job: RunnerJob, verbose: bool) -> None:
    """Run the YAML with its own defaults; everything that tasks print goes to `folder/log.txt`."""
    from kfp import components, local

    root, log = job.folder / "kfp", job.folder / "log.txt"
    workspace = root / "workspace"  # KFP mounts one and removes it; by default it is a new folder in /tmp
    workspace.mkdir(parents=True, exist_ok=True)
    began = log.stat().st_size if log.is_file() else 0
    # Finished steps are taken from the store's records, which also hold on a cluster, so KFP's own cache stays off.
    local.init(runner, pipeline_root=str(root), workspace_root=str(workspace), enable_caching=False)
    with _logged(log, verbose):
        try:
            components.load_component_from_text(local_copy(job.pipeline.read_text(), job.steps))()
        except Exception as error:
            raise _explained(error, log, began) from error
    # KFP takes a container that is gone before it is asked for its exit code for a success.
    if not (job.folder / "result.json").is_file():
        raise _explained(RuntimeError("the steps ended without a result"), log, began)


def _explained(error: Exception, log: Path, began: int) -> InputError | WorkError:
    """The failed step's own error, as its traceback says it: KFP itself only says which task failed."""
    with log.open("rb") as file:
        file.seek(began)
        told = ERROR.findall(file.read().decode(errors="replace"))
    if not told:
        kind, message = "", f"{COLOUR.sub('', str(error))} {NO_REASON}"
    else:
        kind, message = told[-1]
    name = "" if kind in ("", "InputError", "WorkError") else f"{kind}: "
    found = InputError if kind == "InputError" else WorkError
    return found(f"{name}{message}\n{log} has everything that was printed")


@contextlib.contextmanager
def _logged(path: Path, verbose: bool) -> Iterator[None]:
    """Send output to a file, and only the steps' lines of progress to the terminal."""
    with path.open("a", encoding="utf-8") as log:
        screen = _Screen(sys.stdout, log, verbose)
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            yield


class _Screen(io.TextIOBase):
    """Writes all lines to a log, and those with a step's mark to the terminal."""

    def __init__(self, terminal: TextIO, log: TextIO, verbose: bool) -> None:
        self.terminal, self.log, self.verbose, self.rest = terminal, log, verbose, ""

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            before, mark, after = line.partition(MARK)
            if self.verbose:
                print(line, file=self.terminal, flush=True)
            elif mark and not before.strip():
                print(after, file=self.terminal, flush=True)
        return len(text)
