"""What can be known of a config before it runs: `ptl validate`, `plan` and `compile`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptl import extras
from ptl.cli import shipped
from ptl.cli.options import ConfigFile, Overrides
from ptl.config import dag
from ptl.config.run import Config, load_config, pairs
from ptl.errors import InputError
from ptl.extras import AbsentError, UnusableError
from ptl.units import listed

if TYPE_CHECKING:
    from ptl.model.dimensions import ModelDimensions


def _print_schema(requested: bool) -> None:
    if requested:
        print(json.dumps(Config.model_json_schema(), indent=2))
        raise typer.Exit


def validate(
    config: ConfigFile,
    sets: Overrides,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", is_eager=True, callback=_print_schema, help="print the JSON schema of a config, for editors"
        ),
    ] = False,
) -> None:
    """Check a config, its data files and its model, and print what size it ends with; starts nothing expensive."""
    settings = load_config(config, pairs("--set", sets))
    dense = checked(settings)
    if dense is None:
        return
    from ptl.preflight import target

    if goal := target.sentence(settings):
        print(goal)
    numbered = target.with_number(settings)
    _, final = target.after_iterations(dense, numbered.schedule, settings.prune)[-1]
    print(f"{settings.name}: {dense.params:,} parameters become {final.params:,}; `ptl plan` has every step")


def plan(
    config: ConfigFile,
    sets: Overrides,
    gpu: Annotated[str, typer.Option(help="kind of GPU, for example h100")] = "h100",
    count: Annotated[
        int | None, typer.Option(min=1, help="GPUs per step, on each node, in place of resources.accelerators")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="machines of a recovery, in place of resources.steps.recover.nodes")
    ] = None,
) -> None:
    """Forecast every step (parameters, tokens, GPU memory, hours) from the model's config, without weights."""
    from ptl.model import hub
    from ptl.preflight import forecast, preflight, remedies

    settings = load_config(config, pairs("--set", sets))
    run = forecast.forecast(settings, gpu, count, nodes)
    print(forecast.table(run))
    folder = hub.locate(settings.model.path, settings.model.revision, ["config.json"])
    of_model = _planned(run.config, folder, run.shape.dimensions)
    warn([*preflight.warnings(settings), *remedies.warnings(run), *of_model])


def compile(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="file to write the pipeline's YAML to")],
    sets: Overrides,
) -> None:
    """Compile a config to the pipeline YAML that Kubeflow and `ptl run` execute."""
    # kfp's compiler decides by the suffix what it writes.
    if output.suffix not in (".yaml", ".yml") or not output.absolute().parent.is_dir():
        raise InputError(f"{output} must be a .yaml file in a folder that exists", field="--output")
    settings = shipped.as_in_images(load_config(config, pairs("--set", sets)), config)

    from pipelines.prune_tune_loop.pipeline import compile_pipeline

    compile_pipeline(settings, output)
    num_steps = len(dag.nodes(settings))
    print(f"wrote {output} ({output.stat().st_size / 1024:.0f} KB): {num_steps} steps")


def checked(config: Config, excused: type[UnusableError] | tuple[()] = AbsentError) -> ModelDimensions | None:
    """Check all that can be checked without weights in memory; returns the dense model's sizes, None without torch.

    Software of the steps that does not work here is an error, or a warning where its error is `excused`.
    """
    from ptl.evaluation import language_models
    from ptl.export import formats
    from ptl.model import pretrained
    from ptl.preflight import preflight, target

    # Before a model is downloaded.
    checks: list[extras.Check] = [
        partial(language_models.check_backend, config.evaluate),
        *formats.installation_checks(config.export),
    ]
    warnings = [*preflight.warnings(config), *extras.not_checked(checks, excused)]
    if not pretrained.can_build():
        warnings.append("not checked: the model and what it can do of the config (without transformers or torch)")
    not_asked = preflight.hub_data_not_asked_for(config)
    if not_asked:
        print(f"not looked at, as the hub cannot be asked: {listed(not_asked)}")
    folder, dimensions = preflight.preflight(config)
    if dimensions is not None:
        if config.export or config.evaluate.backend == "vllm":
            warnings += formats.context_notes(folder)

        def check_exports() -> None:
            warnings.extend(formats.check_exports(folder, config.export))

        warnings += extras.not_checked([check_exports], excused)
        warnings += _planned(target.with_number(config), folder, dimensions)
    warn(warnings)
    return dimensions


def _planned(config: Config, folder: Path, dense: ModelDimensions) -> list[str]:
    """Print how much text there is for what the plan removes of a model; returns warnings of the plan.

    Of `folder` only config.json is read.
    """
    from ptl.data import checks
    from ptl.export import formats
    from ptl.preflight import preflight, target

    _, final = target.after_iterations(dense, config.schedule, config.prune)[-1]
    amount = checks.planned_amount(config, dense.params - final.params)
    if amount.sentence:
        print(amount.sentence)
    return [
        *preflight.model_warnings(config, dense),
        *formats.layer_warnings(folder, config.export, config.prune.target),
        *formats.width_warnings(folder, config.export, final.width),
        *amount.warnings(),
    ]


def warn(warnings: list[str]) -> None:
    """Print warnings beside a command's output, each once."""
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)
