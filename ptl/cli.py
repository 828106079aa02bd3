"""`ptl`: the composition root, the one module that may import pipelines/; nothing heavy is imported before its use."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ptl import __version__, address, cli_gc, cli_results, cli_steps, extras, localfs
from ptl.cli_options import Home, Overrides
from ptl.config import Config, load_config, pairs
from ptl.errors import InputError, PtlError, WorkError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Of a path that was given: too long, no folder on the way to it, links in a circle, not allowed.
NO_SUCH_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EROFS)

ConfigFile = Annotated[Path, typer.Argument(help="the run's YAML file", show_default=False)]


def main() -> None:
    """Run a command; an error that a user can fix is one message and its exit code, without a traceback."""
    address.split_login()
    try:
        app(standalone_mode=True)
    except PtlError as error:
        _end(error)
    except ModuleNotFoundError as error:
        _end(extras.missing(error.name or "", _command()) or error)
    except OSError as error:
        if error.errno in localfs.FULL:
            _end(WorkError(f"no space left while writing {error.filename or 'a file'}: {error.strerror}; free some"))
        if error.errno not in NO_SUCH_PATH:
            raise
        _end(InputError(f"{str(error.filename)[:200]!r}: {error.strerror}; give a path that can be used"))


def _end(error: Exception) -> NoReturn:
    if not isinstance(error, PtlError):
        raise error
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _command() -> str:
    """The command that was given; its options come after it."""
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Compress a language model without losing its reasoning."""


@app.command()
def validate(config: ConfigFile, sets: Overrides = []) -> None:  # noqa: B006 - typer reads the default
    """Check a config, its data files and its model, and print the plan; nothing expensive is started."""
    checked = load_config(config, pairs("--set", sets))
    params = _preflight(checked)
    _print_plan(checked, params)


@app.command()
def schema() -> None:
    """Print the config's JSON schema, for editors."""
    print(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def plan(
    config: ConfigFile,
    sets: Overrides = [],  # noqa: B006
    gpu: Annotated[str, typer.Option(help="kind of GPU, for example h100")] = "h100",
    count: Annotated[int | None, typer.Option(min=1, help="GPUs per step; none: as the config says")] = None,
) -> None:
    """Forecast every step (parameters, tokens, FLOPs, GPU memory, hours) and the time from start to end.

    From the model's config alone; no weights are read.
    """
    from rich.console import Console

    from ptl import forecast, forecast_table

    said = forecast.forecast(load_config(config, pairs("--set", sets)), gpu, count)
    Console().print(forecast_table.table(said))
    for warning in said.warnings:
        print(f"warning: {warning}")


@app.command()
def export(
    src: Annotated[Path, typer.Argument(help="folder of a checkpoint", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="file to write, for example model.gguf", show_default=False)],
    to: Annotated[str, typer.Option(help="gguf")] = "gguf",
    outtype: Annotated[str, typer.Option(help="auto (16 bits), f32, f16, bf16 or q8_0")] = "auto",
) -> None:
    """Write a checkpoint in the form of another runtime: GGUF, for llama.cpp."""
    from ptl.export import OUTTYPES, export_gguf

    if outtype not in OUTTYPES:
        raise InputError(f"--outtype: {outtype!r} must be one of {', '.join(OUTTYPES)}")
    if to != "gguf":
        raise InputError(f"--to: {to!r} must be gguf; vLLM and transformers read the checkpoint as it is")
    if dst.exists():
        raise InputError(f"dst: {dst} exists; give a file that does not")
    print(f"wrote {export_gguf(src, dst, outtype)}")


@app.command("compile")
def compile_(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="where the pipeline's YAML goes")],
    sets: Overrides = [],  # noqa: B006
) -> None:
    """Compile the pipeline to the YAML that Kubeflow and `ptl run` execute."""
    if output.suffix not in (".yaml", ".yml") or not output.absolute().parent.is_dir():
        raise InputError(f"--output: {output} must be a .yaml file in a folder that exists")
    checked = load_config(config, pairs("--set", sets))
    _pipelines().compile_pipeline(checked, output)
    from pipelines.prune_tune_loop.compact import weigh

    weight = weigh(output)
    print(
        f"wrote {output} ({output.stat().st_size / 1024:.0f} KB): {weight.tasks} steps, each about "
        f"{weight.task_bytes / 1000:.0f} kB of a cluster's workflow"
    )


@app.command()
def run(
    config: ConfigFile,
    sets: Overrides = [],  # noqa: B006
    home: Home = Path(".ptl"),
    run_dir: Annotated[Path | None, typer.Option(help="work in this directory instead of a new one")] = None,
    fresh: Annotated[bool, typer.Option("--new", help="begin anew although an unfinished run could go on")] = False,
    s3: Annotated[bool, typer.Option("--s3", help="start `ptl up`'s S3 and MLflow servers, and use them")] = False,
    runner: Annotated[str, typer.Option(help="subprocess, or docker: each step in its image")] = "subprocess",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show all that the steps print")] = False,
) -> None:
    """Compile a config and execute the compiled pipeline here; the same command again continues a run that died."""
    from ptl import processes

    with processes.interruptible("run the same command again to resume; finished steps are not redone"):
        from pipelines.prune_tune_loop.runners import CLEAR
        from ptl import run_directory, runs
        from ptl.report import print_table

        checked = load_config(config, pairs("--set", sets))
        _check_runner(runner, checked, s3)
        _preflight(checked)
        servers = runs.start_servers(home.absolute()) if s3 else {}
        here, resumed = run_directory.open_run(home, checked, run_dir, fresh)
        environment = runs.environment(here, servers)
        runs.use(environment)
        artifacts = runs.artifact_location(checked.storage.experiment)
        with run_directory.working(here, checked, CLEAR[runner]):
            print(f"{'continuing' if resumed else 'starting'} run {here.run_id} in {here.path}", flush=True)
            if here.earlier:
                print(f"steps with the same inputs and settings are taken over from {', '.join(here.earlier)}")
            if servers:
                print(f"MLflow on {servers['MLFLOW_TRACKING_URI']}, checkpoints in {artifacts}; `ptl down` stops both")
            started = time.monotonic()
            _execute(here, checked, runner, environment, artifacts, verbose)
            seconds = time.monotonic() - started
            (here.path / "timing.json").write_text(json.dumps({"seconds": seconds, "continued": resumed}) + "\n")
            print_table(json.loads(here.result.read_text()), here.path)
            print(f"Checkpoint: `ptl fetch {here.path} DIR` copies the final one\ndone in {seconds:.0f} s")


@app.command()
def ui(home: Home = Path(".ptl"), port: Annotated[int, typer.Option(help="port on loopback")] = 5000) -> None:
    """Open MLflow over the runs of this folder: serves until you press Ctrl-C."""
    from ptl import stack

    extras.need("flask", "ui")
    stack.ui(home.absolute(), port)


@app.command()
def up(
    home: Home = Path(".ptl"),
    s3_port: Annotated[int, typer.Option(help="SeaweedFS; the next three ports are taken too")] = 8433,
    mlflow_port: Annotated[int, typer.Option(help="MLflow")] = 15000,
    backend_store_uri: Annotated[str | None, typer.Option(help="MLflow's database; none: sqlite")] = None,
) -> None:
    """Start a real S3 server and a real MLflow server on loopback, and print the environment that reaches them."""
    from ptl import processes, stack

    extras.need("flask", "up")
    with processes.interruptible("the same command starts what is missing; `ptl down` stops what was started"):
        env = stack.up(home.absolute(), s3_port=s3_port, mlflow_port=mlflow_port, backend_store_uri=backend_store_uri)
    for name, value in env.items():
        print(f"export {name}={value}")


@app.command()
def down(home: Home = Path(".ptl")) -> None:
    """Stop exactly the servers that `ptl up` started."""
    from ptl import stack

    print("stopped:", ", ".join(stack.down(home.absolute())) or "nothing was running")


@app.command()
def images(
    action: Annotated[str, typer.Argument(help="print, build or push")] = "print",
    registry: Annotated[str, typer.Option(help="for example ghcr.io/you; none: the local engine's own")] = "",
    tag: Annotated[str, typer.Option(help="image tag")] = __version__,
    base_image: Annotated[str | None, typer.Option(help="base of a build; none: the Dockerfile's")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="build for machines without a GPU")] = False,
    ca: Annotated[Path | None, typer.Option(envvar="PIP_CERT", help="CA bundle for a build's downloads")] = None,
    index: Annotated[
        str | None, typer.Option(envvar="PIP_INDEX_URL", help="package index of a build; none: PyPI", show_envvar=True)
    ] = None,
    wheels: Annotated[Path | None, typer.Option(help="folder of local wheels for a build")] = None,
) -> None:
    """Print, build or push the images that the pipeline's steps run in."""
    from ptl import images as work

    actions = {
        "print": lambda: work.names(registry, tag),
        "build": lambda: work.build(registry, tag, base_image=base_image, cpu=cpu, ca=ca, index=index, wheels=wheels),
        "push": lambda: work.push(registry, tag),
    }
    if action not in actions:
        raise InputError(f"action: {action!r} must be one of {', '.join(actions)}")
    for name in actions[action]() or ():
        print(name)


def _check_runner(runner: str, config: Config, s3: bool) -> None:
    """What the runner needs, before anything is started."""
    _pipelines()
    from pipelines.prune_tune_loop import containers
    from pipelines.prune_tune_loop.runners import RUNNERS

    if runner not in RUNNERS:
        raise InputError(f"--runner: {runner!r} must be one of {', '.join(RUNNERS)}")
    if runner == "docker":
        containers.check(config, "http://" if s3 else os.environ.get("MLFLOW_TRACKING_URI", ""))


def _execute(
    here: Any, config: Config, runner: str, environment: dict[str, str], artifacts: str, verbose: bool
) -> None:
    from ptl import dag, run_directory

    pipeline = here.path / "pipeline.yaml"
    _pipelines().compile_pipeline(config, pipeline)
    from pipelines.prune_tune_loop.runners import RUNNERS, RunnerJob

    steps = tuple(node.name for node in dag.nodes(config))
    try:
        RUNNERS[runner](RunnerJob(config, pipeline, here.path, environment, artifacts, steps), verbose)
    except PtlError as error:
        message, code = run_directory.failure(here) or (str(error), error.exit_code)
        again = (
            "fix it and run the same command again to resume: finished steps are not redone; with a corrected config "
            "those with the same inputs and settings are taken over"
        )
        raise (InputError if code == 2 else WorkError)(f"{message}\n{again}") from error


def _preflight(config: Config) -> int:
    """Everything that can be checked without weights in memory; returns the dense model's parameters."""
    from ptl import advice, importer

    for warning in advice.warnings(config):
        print(f"warning: {warning}", file=sys.stderr)
    model = config.model
    sections = (config.schedule, config.prune, config.calibration, config.training, config.evaluate)
    _, body = importer.preflight(model.path, model.revision, *sections, config.gate, config.recover)
    for warning in advice.layer_warnings(config.schedule, config.prune, body.params, body.params_per_layer):
        print(f"warning: {warning}", file=sys.stderr)
    return body.params


def _print_plan(config: Config, params: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from ptl.config import plan, removal

    table = Table(title=f"{config.name}: {params:,} parameters", title_justify="left")
    for heading in ("Iteration", "Removes", "Parameters", "Parameters after", "Recovery tokens"):
        table.add_column(heading, justify="right")
    total = removal(params, config.schedule.target)
    for it in plan(config.schedule, config.prune):
        table.add_row(
            str(it.index),
            it.unit,
            f"{float(it.cut * total):,.0f}",
            f"{params - int(it.progress * total):,}",
            f"{it.tokens:,}",
        )
    Console().print(table)


def _pipelines() -> Any:
    """pipelines/ is in the checkout, not in the wheel."""
    if importlib.util.find_spec("pipelines") is None:
        raise InputError(
            f"ptl {_command()}: needs the folder pipelines/ of the checkout; clone the repository, and run "
            "`make install` in it (or pip install 'ptl[pipelines]' to compile only)"
        )
    from pipelines.prune_tune_loop import pipeline

    return pipeline


def _add_cluster_commands() -> None:
    """Commands for Kubeflow, where the checkout is at hand: pipelines/ is not in the wheel, nor in the images."""
    if importlib.util.find_spec("pipelines") is not None:
        from pipelines.prune_tune_loop import cluster_cli

        cluster_cli.add_to(app)


cli_results.add_to(app)
cli_steps.add_to(app)
cli_gc.add_to(app)
_add_cluster_commands()

if __name__ == "__main__":
    main()
