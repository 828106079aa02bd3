"""Run the compiled YAML on one machine, task after task, as the cluster would: in processes or in containers.

Importing torch, transformers and MLflow takes longer than most steps of a small model work: processes of tasks are
forked from one that has imported them (multiprocessing's fork server).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

from pipelines.prune_tune_loop import containers
from pipelines.prune_tune_loop.compact import local_copy
from ptl.config.run import Config
from ptl.errors import PtlError, WorkError
from ptl.log import MARK, doing, on_terminal
from ptl.processes import Environment
from ptl.steps import supervisor
from ptl.storage import local_files

TERMINAL_COLOUR = re.compile(r"\x1b\[\d*m")
# What the steps need, imported once and not in the process of each.
IMPORTED = (
    "ptl.steps.bars",
    "kfp.dsl.executor_main",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "ptl.steps.table",
    "ptl.model.hub",
    "ptl.preflight.preflight",
    "ptl.pruning.prune",
    "ptl.recovery.recover",
    "ptl.evaluation.evaluate",
    "trl.trainer.sft_trainer",
    "lm_eval.models.huggingface",
)
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers
FORKS = get_context("forkserver")
PAGE = 4096  # bytes: a disk with less is full
NO_REASON = (
    "Its process left no reason, as when it is killed "
    "(what the kernel does when memory is used up: free memory)"
)


@dataclass(frozen=True)
class RunnerJob:
    """One execution of a compiled pipeline."""

    config: Config
    pipeline: Path  # the compiled YAML
    folder: Path  # of the run
    environment: Environment  # of every step
    artifacts: str  # where the MLflow experiment keeps its files
    steps: tuple[str, ...]  # in the order of their execution
    # of the run, in place of the YAML's defaults
    parameters: dict[str, Any] = field(default_factory=dict)


def run_subprocess(job: RunnerJob, verbose: bool = False) -> None:
    """Execute every task in a process of this machine's Python. Raises WorkError where a task fails."""
    from kfp import local
    from kfp.local import subprocess_task_handler

    subprocess_task_handler.replace_python_executable = _with_interpreter
    # images play no part here
    warnings.filterwarnings("ignore", message="You may be attemping to run a task")
    # A fork is not safe beside a GPU's driver, nor on another system.
    if sys.platform == "linux" and not any(map(os.path.exists, GPU_DEVICES)):
        subprocess_task_handler.run_local_subprocess = _run_forked
        FORKS.set_forkserver_preload(list(IMPORTED))
        doing("loading the libraries of the steps")
        # Before the folder of temporary files is the run's: multiprocessing removes its own when this process ends.
        _start_fork_server()
    with _temporary_files(job.folder):
        _execute(local.SubprocessRunner(use_venv=False), job, verbose)


def _start_fork_server() -> None:
    """Start the process that tasks are forked from, which inherits that SIGINT is ignored.

    A terminal sends Ctrl-C to it too. Python's server of forks ignores it only after its imports, and would end amid
    them with a long traceback.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def _run_forked(full_command: list[str], env_vars: Environment | None = None) -> int:
    """KFP's command of a task, `sh -ec SCRIPT SOURCE ARGUMENTS...`, in a fork; what it prints is printed here."""
    source, *arguments = full_command[3:]
    environment = os.environ | (env_vars or {})
    reader, writer = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_be_task, args=(source, arguments, environment, writer))
    process.start()
    writer.close()
    with open(reader.fileno(), errors="replace", closefd=False) as lines:
        for line in lines:
            print(line, end="")
    process.join()
    return process.exitcode or 0


def _be_task(
    source: str, arguments: list[str], environment: Environment, output: Connection
) -> None:
    """Be the process of a task."""
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    # It is ignored in the process that this one was forked from.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    supervisor.forks = True
    from kfp.dsl.executor_main import executor_main

    with tempfile.TemporaryDirectory() as temporary:
        component = Path(temporary, "ephemeral_component.py")
        component.write_text(source)
        sys.argv = ["executor_main", "--component_module_path", str(component), *arguments]
        executor_main()


@contextlib.contextmanager
def _temporary_files(run_folder: Path) -> Iterator[None]:
    """Have this process and the steps keep temporary files in a folder that is the run's, and is removed at the end.

    KFP and a step that is killed leave theirs; what a killed command has left, the run's next one removes. The folder
    is not in the run's own, whose path is often too long for a socket's.
    """
    earlier = {"TMPDIR": os.environ.get("TMPDIR"), "tempdir": tempfile.gettempdir()}
    name = hashlib.sha256(str(run_folder).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"ptl-command-{os.getuid()}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    except PtlError as failure:
        # KFP's own files do not fit, say, or the log: then a step fails before it can report why.
        for full in (folder, run_folder):
            if shutil.disk_usage(full).free < PAGE:
                raise local_files.no_space(
                    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(full))
                ) from failure
        raise
    finally:
        tempfile.tempdir = earlier["tempdir"]
        os.environ.pop("TMPDIR")
        if earlier["TMPDIR"] is not None:
            os.environ["TMPDIR"] = earlier["TMPDIR"]
        shutil.rmtree(folder, ignore_errors=True)


def _with_interpreter(command: list[str], interpreter: str) -> list[str]:
    """A task's command with this interpreter; KFP would put it in place of every `python3`, in paths of inputs too."""
    return [
        part.replace("python3 -m kfp", f"{shlex.quote(interpreter)} -m kfp") for part in command
    ]


def run_docker(job: RunnerJob, verbose: bool = False) -> None:
    """Execute every task in a container of its image. Raises WorkError where a task fails."""
    from kfp import local

    arguments = containers.arguments(job.config, job.folder, job.environment, job.artifacts)
    try:
        _execute(local.DockerRunner(**arguments), job, verbose)
    finally:
        containers.remove_leftovers(job.folder)


RUNNERS = {"subprocess": run_subprocess, "docker": run_docker}


def _execute(runner: Any, job: RunnerJob, verbose: bool) -> None:
    """Run the YAML; everything that tasks print goes to `folder/log.txt`."""
    from kfp import components, local

    root = job.folder / "kfp"
    # KFP mounts it and removes it; by default it is a new folder in /tmp
    workspace = root / "workspace"
    workspace.mkdir(parents=True, exist_ok=True)
    log = job.folder / "log.txt"
    earlier_result = _time_of(job.folder / "result.json")  # of a run that is resumed for an export
    # Finished steps are taken from the store's records, which also hold on a cluster, so KFP's own cache stays off.
    local.init(runner, pipeline_root=str(root), workspace_root=str(workspace), enable_caching=False)
    problem = "the steps ended without a result."
    cause = None
    with _logged(log, verbose):
        try:
            text = local_copy(job.pipeline.read_text(), job.steps)
            components.load_component_from_text(text)(**job.parameters)
        except Exception as error:
            problem, cause = TERMINAL_COLOUR.sub("", str(error)), error
    # KFP takes a container that is gone before it is asked for its exit code for a success.
    if cause or _time_of(job.folder / "result.json") == earlier_result:
        raise WorkError(f"{problem} {NO_REASON}\n{log} has everything that was printed") from cause


def _time_of(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


@contextlib.contextmanager
def _logged(path: Path, verbose: bool) -> Iterator[None]:
    """Send output to a file, and only the steps' lines of progress to the terminal."""
    with path.open("a", encoding="utf-8") as log:
        tee = _Tee(sys.stdout, log, verbose)
        with contextlib.redirect_stdout(tee), contextlib.redirect_stderr(tee):
            yield


class _Tee(io.TextIOBase):
    """Writes all lines to a log, and to the terminal those with a step's mark, or all when `verbose`."""

    def __init__(self, terminal: TextIO, log: TextIO, verbose: bool) -> None:
        self.show = on_terminal(terminal)
        self.log = log
        self.verbose = verbose
        self.unfinished_line = ""

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        *lines, self.unfinished_line = (self.unfinished_line + text).split("\n")
        for line in lines:
            before, mark, progress = line.partition(MARK)
            if self.verbose or (mark and not before.strip()):
                with contextlib.suppress(OSError):  # a terminal that is gone: the log has the line
                    self.show(line if self.verbose else progress)
        return len(text)
