"""`ptl run`: compile a config and execute the compiled pipeline on this machine."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptl import extras, processes
from ptl.cli import rehearsal, shipped
from ptl.cli.configs import checked
from ptl.cli.options import HOME, ConfigFile, Home, Overrides, Rehearse, Runner
from ptl.config.run import Config, load_config, pairs
from ptl.errors import PtlError, WorkError
from ptl.lineage import run_status
from ptl.local import run_directory, runs, servers
from ptl.local.run_directory import RunDir
from ptl.processes import Environment

if TYPE_CHECKING:
    from pipelines.prune_tune_loop.runners import RunnerJob

EXTRAS = ("prune", "recover", "evaluate", "pipelines")  # of a run in this machine's Python
AFTER_INTERRUPT = "run the same command again to resume; finished steps are not redone"
RESUMING = (
    "fix it and run the same command again to resume: finished steps are not redone; with a corrected config "
    "those with the same inputs and settings are taken over"
)


def run(
    config: ConfigFile,
    sets: Overrides,
    home: Home = HOME,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="work in this directory, or continue its run"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--new", help="start a new run even if an unfinished one could be resumed")
    ] = False,
    s3: Annotated[bool, typer.Option("--s3", help="start the S3 and MLflow servers of `ptl up`, and use them")] = False,
    runner: Runner = "subprocess",
    rehearse: Rehearse = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show everything that the steps print")] = False,
) -> None:
    """Compile a config and execute the pipeline here; run the same command again to resume a run that died."""
    with processes.interruptible(AFTER_INTERRUPT):
        # In images the steps have their own modules.
        if runner == "subprocess":
            extras.need_all(EXTRAS, "run")
        from pipelines.prune_tune_loop import containers
        from pipelines.prune_tune_loop.pipeline import compile_pipeline
        from pipelines.prune_tune_loop.runners import RunnerJob
        from ptl.config import dag

        # Everything that can be refused is refused before a server or a directory exists.
        settings = load_config(config, pairs("--set", sets))
        checked(settings, () if runner == "subprocess" else extras.UnusableError)
        left_out: list[str] = []  # of a rehearsal
        if rehearse:
            import torch

            settings, left_out = rehearsal.announced(settings, torch.cuda.device_count())
        if runner == "docker":
            # With --s3 the address is not known yet, only that it will be a server's.
            containers.check(settings, "http://" if s3 else os.environ.get("MLFLOW_TRACKING_URI", ""))

        # This process and its steps track in the same MLflow.
        addresses = servers.up(home.absolute()) if s3 else {}
        directory, resumed = run_directory.open_run(home, settings, run_dir, fresh)
        environment = runs.environment(directory, addresses)
        runs.use(environment)
        artifacts = runs.artifact_location(settings.storage.experiment)
        with run_directory.working(directory, settings, containers.remove_leftovers if runner == "docker" else None):
            _print_start(directory, resumed, addresses, artifacts)
            started = time.monotonic()
            pipeline = directory.path / "pipeline.yaml"
            compile_pipeline(settings, pipeline)
            steps = tuple(node.name for node in dag.nodes(settings))
            parameters = {"earlier_runs": " ".join(directory.earlier)}
            job = RunnerJob(settings, pipeline, directory.path, environment, artifacts, steps, parameters)
            _execute(job, runner, directory, verbose)
            _print_end(directory, resumed, time.monotonic() - started)
            _check_exports(directory, settings)
            if rehearse:
                rehearsal.conclude(directory, left_out, [shipped.shown(config), *rehearsal.options(sets)])


def _execute(job: RunnerJob, runner: str, directory: RunDir, verbose: bool) -> None:
    """Run the compiled pipeline; a failed step's own error says how to resume."""
    from pipelines.prune_tune_loop.runners import RUNNERS

    try:
        RUNNERS[runner](job, verbose)
    except PtlError as error:
        # The runner knows only that a step failed, the step has written why.
        failure = run_directory.step_error(directory) or error
        raise type(failure)(f"{failure}\n{RESUMING}") from error


def _print_start(directory: RunDir, resumed: bool, addresses: Environment, artifacts: str) -> None:
    # Flushed: it is seen while the first step starts.
    verb = "continuing" if resumed else "starting"
    print(f"{verb} run {directory.run_id} in {directory.path}", flush=True)
    if directory.earlier:
        print(f"{run_status.TAKEN_OVER} {', '.join(directory.earlier)}")
    if addresses:
        print(f"MLflow on {addresses['MLFLOW_TRACKING_URI']}, checkpoints in {artifacts}; `ptl up --stop` stops both")


def _print_end(directory: RunDir, resumed: bool, seconds: float) -> None:
    from ptl.report.render import terminal_text
    from ptl.report.result import Result

    # The time of this command, not of those that it resumed.
    timing = {"seconds": seconds, "continued": resumed}
    (directory.path / "timing.json").write_text(json.dumps(timing) + "\n")
    report = (directory.path / "report.html").resolve()
    print(terminal_text(Result.model_validate_json(directory.result.read_text()), str(report)))
    print(f"Checkpoint: `ptl fetch {shlex.quote(str(directory.path))} DIR` copies the final one")


def _check_exports(directory: RunDir, config: Config) -> None:
    """Raise WorkError where the final model lacks an export; the report was written all the same."""
    missing = run_directory.missing_exports(directory.path, config)
    if missing:
        reasons = "\n".join(f"{step}: {reason}" for step, reason in missing.items())
        raise WorkError(f"{reasons}\nthe report is written without what failed; {RESUMING}")
