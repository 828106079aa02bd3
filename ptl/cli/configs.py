"""What can be known of a config before it runs: `ptl validate`, `schema`, `plan` and `compile`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ptl.cli.options import ConfigFile, Overrides
from ptl.config.run import Config, load_config, pairs
from ptl.errors import InputError


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(validate)
    app.command()(schema)
    app.command()(plan)
    app.command("compile")(compile_)


def validate(config: ConfigFile, sets: Overrides) -> None:
    """Check a config, its data files and its model, and print the plan; starts nothing expensive."""
    settings = load_config(config, pairs("--set", sets))
    params = checked_params(settings)
    _print_plan(settings, params)


def schema() -> None:
    """Print the JSON schema of a config, for editors."""
    print(json.dumps(Config.model_json_schema(), indent=2))


def plan(
    config: ConfigFile,
    sets: Overrides,
    gpu: Annotated[str, typer.Option(help="kind of GPU, for example h100")] = "h100",
    count: Annotated[int | None, typer.Option(min=1, help="GPUs per step; default: as the config says")] = None,
) -> None:
    """Forecast every step (parameters, tokens, FLOPs, GPU memory, hours) and the time from start to end.

    Reads only the model's config, no weights.
    """
    from rich.console import Console

    from ptl.preflight import forecast, forecast_table

    settings = load_config(config, pairs("--set", sets))
    run_forecast = forecast.forecast(settings, gpu, count)
    table = forecast_table.table(run_forecast)
    Console().print(table)
    for warning in run_forecast.warnings:
        print(f"warning: {warning}")


def compile_(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="file to write the pipeline's YAML to")],
    sets: Overrides,
) -> None:
    """Compile a config to the pipeline YAML that Kubeflow and `ptl run` execute."""
    # kfp's compiler decides by the suffix what it writes.
    is_yaml = output.suffix in (".yaml", ".yml")
    folder = output.absolute().parent
    if not is_yaml or not folder.is_dir():
        raise InputError(f"{output} must be a .yaml file in a folder that exists", field="--output")
    settings = load_config(config, pairs("--set", sets))

    require_checkout("compile")
    from pipelines.prune_tune_loop.compact import weigh
    from pipelines.prune_tune_loop.pipeline import compile_pipeline

    compile_pipeline(settings, output)
    weight = weigh(output)
    # A cluster refuses a workflow that is too large, so the user sees how large it is.
    kib = output.stat().st_size / 1024
    kb_of_task = weight.task_bytes / 1000
    print(
        f"wrote {output} ({kib:.0f} KB): {weight.tasks} steps, each about {kb_of_task:.0f} kB of a cluster's workflow"
    )


def require_checkout(command: str) -> None:
    """Raise InputError where the folder pipelines/ is missing: it is in the checkout, not in the wheel."""
    if importlib.util.find_spec("pipelines") is None:
        raise InputError(
            "needs the folder pipelines/ of the checkout",
            field=f"ptl {command}",
            remedy="clone the repository, and run `make install` in it (or pip install 'ptl[pipelines]' to compile "
            "only)",
        )


def checked_params(config: Config) -> int:
    """Check all that can be checked without weights in memory; returns the dense model's parameters."""
    from ptl.preflight import advice, preflight

    _warn(advice.warnings(config))
    # The sections that a model, its tokenizer or the data can contradict.
    model = config.model
    sections = (
        config.schedule,
        config.prune,
        config.calibration,
        config.training,
        config.evaluate,
        config.gate,
        config.recover,
    )
    _, dimensions = preflight.preflight(model.path, model.revision, *sections)
    params = dimensions.params
    _warn(advice.layer_warnings(config.schedule, config.prune, params, dimensions.params_per_layer))
    return params


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _print_plan(config: Config, params: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from ptl.config.schedule import plan as planned_iterations
    from ptl.config.schedule import removal

    title = f"{config.name}: {params:,} parameters"
    table = Table(title=title, title_justify="left")
    for heading in ("Iteration", "Removes", "Parameters", "Parameters after", "Recovery tokens"):
        table.add_column(heading, justify="right")
    # Shares of the iterations are fractions of what is removed in all.
    total = removal(params, config.schedule.target)
    for iteration in planned_iterations(config.schedule, config.prune):
        removed = float(iteration.cut * total)
        remaining = params - int(iteration.progress * total)
        table.add_row(
            str(iteration.index),
            iteration.unit,
            f"{removed:,.0f}",
            f"{remaining:,}",
            f"{iteration.tokens:,}",
        )
    Console().print(table)
