"""`ptl run`: compile a config and execute the compiled pipeline on this machine; and what a rehearsal says.

Before a rehearsal that is which fields are smaller than in the run, after it what it has shown. `ptl up` starts the
servers that a run may use, `ptl images` makes the images of its steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ptl import __version__, address, extras, processes
from ptl.cli import arguments
from ptl.cli.arguments import HOME, ConfigFile, Home, Overrides, Rehearse, Runner
from ptl.cli.configs import checked
from ptl.config import rehearsal
from ptl.config.run import Config
from ptl.errors import PtlError, WorkError
from ptl.lineage import mlflow_client, run_status
from ptl.local import progress, run_directory, runs, servers
from ptl.local.run_directory import RunDir
from ptl.log import doing, table_text
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
    fresh: Annotated[
        bool,
        typer.Option("--new", help="start a new run even if an unfinished one could be resumed"),
    ] = False,
    s3: Annotated[
        bool, typer.Option("--s3", help="start the S3 and MLflow servers of `ptl up`, and use them")
    ] = False,
    runner: Runner = "subprocess",
    rehearse: Rehearse = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="show everything that the steps print")
    ] = False,
) -> None:
    """Compile a config and execute the pipeline here; run the same command again to resume a run that died."""
    with processes.interruptible(AFTER_INTERRUPT):
        doing(f"loading libraries, and checking {arguments.shown(config)} with its data and model")
        # In images the steps have their own modules.
        if runner == "subprocess":
            extras.need_all(EXTRAS, "run")
        from pipelines.prune_tune_loop import containers
        from ptl.recovery import launch
        from ptl.recovery.job import ALONE

        # Everything that can be refused is refused before a server or a directory exists.
        if not s3:
            mlflow_client.check_address()
        settings = arguments.load(config, sets)
        # A rehearsal takes what there is here: transformers in vLLM's place.
        checked(settings, () if runner == "subprocess" and not rehearse else extras.UnusableError)
        left_out: list[str] = []  # of a rehearsal
        if rehearse:
            import torch

            settings, left_out = announced(settings, torch.cuda.device_count())
        if runner == "subprocess":
            launch.check_batches(settings.recover, ALONE)
        if runner == "docker":
            # With --s3 the address is not known yet, only that it will be a server's.
            containers.check(
                settings, "http://" if s3 else os.environ.get("MLFLOW_TRACKING_URI", "")
            )

        # This process and its steps track in the same MLflow.
        addresses = servers.up(home.absolute()) if s3 else {}
        directory, resumed = run_directory.open_run(home, settings, fresh)
        environment = runs.environment(directory, addresses)
        runs.use(environment)
        artifacts = runs.artifact_location(settings.storage.experiment)
        with run_directory.working(
            directory, settings, containers.remove_leftovers if runner == "docker" else None
        ):
            _print_start(directory, resumed, addresses, artifacts, home)
            started = time.monotonic()
            job = _job(settings, directory, environment, artifacts)
            progress.begin(directory.path, _work(settings, job.steps))
            _execute(job, runner, directory, verbose)
            _print_end(directory, resumed, time.monotonic() - started, s3, home)
            _check_exports(directory, settings)
            if rehearse:
                _conclude(directory, left_out, config, sets)


def _job(config: Config, directory: RunDir, environment: Environment, artifacts: str) -> RunnerJob:
    """The compiled pipeline, with what its tasks need here."""
    from pipelines.prune_tune_loop.pipeline import compile_pipeline
    from pipelines.prune_tune_loop.runners import RunnerJob
    from ptl.config import dag

    pipeline = directory.path / "pipeline.yaml"
    compile_pipeline(config, pipeline)
    steps = tuple(node.name for node in dag.nodes(config))
    parameters = {"earlier_runs": " ".join(directory.earlier)}
    return RunnerJob(config, pipeline, directory.path, environment, artifacts, steps, parameters)


def _work(config: Config, steps: Sequence[str]) -> dict[str, float]:
    """The work of each step by the forecast of `ptl plan`, in its hours; 0 where it is not known."""
    from ptl.config import dag
    from ptl.preflight.forecast import forecast

    hours: dict[str, float] = {}
    # Only how long it may take is not known without it; a runner of images needs no torch here.
    with contextlib.suppress(PtlError, ImportError):
        hours = {step.step: step.hours for step in forecast(config).steps}
    for step in steps:
        if dag.stage_of(step) == "export":  # it scores the final model and the dense one
            hours[step] = 2 * hours.get("evaluate-0", 0.0)
    return {step: hours.get(step, 0.0) for step in steps}


def _execute(job: RunnerJob, runner: str, directory: RunDir, verbose: bool) -> None:
    """Run the compiled pipeline; a failed step's own error says how to resume."""
    from pipelines.prune_tune_loop.runners import RUNNERS

    try:
        RUNNERS[runner](job, verbose)
    except PtlError as error:
        # The runner knows only that a step failed, the step has written why.
        failure = run_directory.step_error(directory) or error
        raise type(failure)(f"{failure}\n{RESUMING}") from error


def _print_start(
    directory: RunDir, resumed: bool, addresses: Environment, artifacts: str, home: Path
) -> None:
    # Flushed: it is seen while the first step starts.
    verb = "continuing" if resumed else "starting"
    print(f"{verb} run {directory.run_id} in {directory.path}", flush=True)
    if directory.earlier:
        print(f"{run_status.TAKEN_OVER} {', '.join(directory.earlier)}")
    if addresses:
        stop = f"ptl up --stop{arguments.home_option(home)}"
        page = address.experiments_page(addresses["MLFLOW_TRACKING_URI"])
        print(f"MLflow: {page}, checkpoints in {artifacts}; `{stop}` stops both")


def _print_end(directory: RunDir, resumed: bool, seconds: float, s3: bool, home: Path) -> None:
    from ptl.report.render import terminal_text
    from ptl.report.result import Result

    # The time of this command, not of those that it resumed.
    timing = {"seconds": seconds, "continued": resumed}
    (directory.path / "timing.json").write_text(json.dumps(timing) + "\n")
    report = (directory.path / "report.html").resolve()
    result = Result.model_validate_json(directory.result.read_text())
    print(terminal_text(result, str(report), f"ptl up --ui{arguments.home_option(home)}"))
    # Without it, credentials in the environment would lead to another store.
    option = " --s3" if s3 else ""
    print(
        f"Checkpoint: `ptl fetch {shlex.quote(str(directory.path))} DIR{option}` copies the final one"
    )


def _check_exports(directory: RunDir, config: Config) -> None:
    """Raise WorkError where the final model lacks an export; the report was written all the same."""
    missing = run_directory.missing_exports(directory.path, config)
    if missing:
        reasons = "\n".join(f"{step}: {reason}" for step, reason in missing.items())
        raise WorkError(f"{reasons}\nthe report is written without what failed; {RESUMING}")


def announced(config: Config, gpus: int | None) -> tuple[Config, list[str]]:
    """The rehearsal of a run, whose differences are printed, and what of the run it leaves out.

    `gpus` are those of this machine; None: where the run itself will be, on a cluster.
    """
    rehearsed = rehearsal.rehearsal(config, gpus)
    rows = [
        [field, _text(before), _text(after)]
        for field, before, after in rehearsal.changes(config, rehearsed)
    ]
    title = f"Rehearsal of {config.name}: every step, with less work"
    print(table_text(title, ["Field", "Run", "Rehearsal"], rows, numbers=("Run", "Rehearsal")))
    return rehearsed, rehearsal.left_out(config, rehearsed)


def _text(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "default" if value is None else str(value)


def _conclude(
    directory: RunDir, not_rehearsed: Sequence[str], config: Path, sets: Sequence[str]
) -> None:
    """Print what the rehearsal has shown, and what comes next: a submit of the same config and overrides."""
    result = json.loads(directory.result.read_text())
    skipped = [step["step"] for step in result["not_needed"]]
    print(
        "\nRehearsal: every step of the run works here. The numbers above mean nothing: hardly anything was trained."
    )
    if skipped:
        print(f"Not rehearsed, because the loop had ended: {', '.join(skipped)}.")
    print_left_out(not_rehearsed)
    print("Next, the run itself: here by the same command without --rehearse, on Kubeflow by")
    overrides = [word for entry in sets for word in ("--set", entry)]
    print(f"  ptl submit {shlex.join([arguments.shown(config), *overrides])}")


def print_left_out(parts: Sequence[str]) -> None:
    """Say what of a run its rehearsal does not try."""
    if parts:
        print(f"Not rehearsed: {', '.join(parts)}.")


def up(
    home: Home = HOME,
    s3_port: Annotated[
        int | None,
        typer.Option(
            help="port of SeaweedFS, which also uses the next three; default: the last one, or 8433"
        ),
    ] = None,
    mlflow_port: Annotated[
        int | None,
        typer.Option(help="port of MLflow; default: the last one, or 15000 (5000 with --ui)"),
    ] = None,
    ui: Annotated[
        bool,
        typer.Option(
            "--ui", help="instead, browse runs made without --s3 in MLflow, until you press Ctrl-C"
        ),
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="stop what an earlier `ptl up` has started")
    ] = False,
) -> None:
    """Start a real S3 and a real MLflow server on loopback, and print the environment variables to use them."""
    stopping = f"ptl up --stop{arguments.home_option(home)}"
    home = home.absolute()
    if stop:
        print("stopped:", ", ".join(servers.down(home)) or "nothing was running")
        return
    # MLflow's server would end with a traceback of its own.
    extras.need_all(["pipelines"], "up")
    if ui:
        servers.ui(home, mlflow_port or 5000)
    with processes.interruptible(
        f"run the same command again to start what is missing; `{stopping}` stops what was started"
    ):
        environment = servers.up(home, s3_port=s3_port, mlflow_port=mlflow_port)
    # In the shell's form, to be pasted.
    for name, value in environment.items():
        print(f"export {name}={value}")


def images(
    action: Annotated[
        Literal["print", "build", "push", "digests"], typer.Argument(help="what to do with them")
    ] = "print",
    registry: Annotated[
        str, typer.Option(help="for example ghcr.io/you; default: images of the local engine")
    ] = "",
    tag: Annotated[str, typer.Option(help="image tag")] = __version__,
    optional: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="IMAGE",
            help="also an image that only some runs need (evaluate-vllm, export-gguf or export-compressed-tensors), or "
            "all of them; repeatable",
        ),
    ] = None,
    base_image: Annotated[
        str | None, typer.Option(help="base image of a build; default: the Dockerfile's")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="build for machines without a GPU")] = False,
    # These two are set by the environment as for pip.
    ca: Annotated[
        Path | None,
        typer.Option(
            envvar="PIP_CERT",
            exists=True,
            dir_okay=False,
            help="CA bundle for a build's downloads, for example your organisation's",
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            envvar="PIP_INDEX_URL",
            help="package index for a build; default: PyPI",
            show_envvar=True,
        ),
    ] = None,
    wheels: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="folder with local wheels for a build"),
    ] = None,
) -> None:
    """Print, build or push the steps' images, or print their digests as the section `images` of a config."""
    from ptl.config import image_names
    from ptl.local import images as work

    more = image_names.chosen(optional or [])
    if action == "digests":
        print(json.dumps(work.digests(registry, tag, more), indent=2))
        return
    names = image_names.names(registry, tag, optional=more)
    if action == "build":
        work.build(
            registry, tag, more, base_image=base_image, cpu=cpu, ca=ca, index=index, wheels=wheels
        )
    elif action == "push":
        work.push(registry, tag, more)
    for name in names:
        print(name)
