"""Run the compiled YAML on one machine, task after task, as the cluster would."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ptl.errors import WorkError
from ptl.execution import MARK


def run_subprocess(pipeline: Path, folder: Path, environment: dict[str, str], verbose: bool = False) -> None:
    """Execute every task in a process of this machine's Python. Raises WorkError when a task fails."""
    from kfp import local

    warnings.filterwarnings("ignore", message="You may be attemping to run a task")  # images play no part here
    os.environ.update(environment)
    _execute(local.SubprocessRunner(use_venv=False), pipeline, folder, verbose)


RUNNERS = {"subprocess": run_subprocess}


def _execute(runner: Any, pipeline: Path, folder: Path, verbose: bool) -> None:
    """Run the YAML with its own defaults; everything that tasks print goes to `folder/log.txt`."""
    from kfp import components, local

    # Finished steps are taken from the store's records, which also hold on a cluster, so KFP's own cache stays off.
    local.init(runner, pipeline_root=str(folder / "kfp"), enable_caching=False)
    with _logged(folder / "log.txt", verbose):
        try:
            components.load_component_from_file(str(pipeline))()
        except RuntimeError as error:
            raise WorkError(f"{error}; {folder / 'log.txt'} has everything that was printed") from error


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
