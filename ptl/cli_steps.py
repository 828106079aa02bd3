"""Single steps by hand, on checkpoint folders, without pipeline, store or MLflow: `ptl prune SRC DST --config FILE`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ptl.config import Recovery, load_config, pairs, removal
from ptl.errors import InputError

Source = Annotated[Path, typer.Argument(help="folder of a Hugging Face checkpoint", show_default=False)]
Target = Annotated[Path, typer.Argument(help="folder to write; must not exist yet or be empty", show_default=False)]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="the run's YAML file, for its settings")]
Overrides = Annotated[list[str], typer.Option("--set", help="override a field: --set schedule.target=0.3")]


def add_to(app: typer.Typer) -> None:
    """Register the step commands."""
    for command in (import_model, prune, recover, evaluate):
        app.command(command.__name__.replace("_", "-"), rich_help_panel="Single steps")(command)


def import_model(
    source: Annotated[str, typer.Argument(help="hub id or folder", show_default=False)],
    dst: Target,
    revision: Annotated[str | None, typer.Option(help="hub commit")] = None,
) -> None:
    """Check a dense checkpoint, weights included, and copy it."""
    from ptl import importer

    _fresh(dst)
    importer.import_checkpoint(source, revision, dst)
    print(f"wrote {dst}")


def prune(
    src: Source,
    dst: Target,
    config: ConfigFile,
    sets: Overrides = [],  # noqa: B006 - typer reads the default
    target: Annotated[float | None, typer.Option(help="share of SRC to remove, or parameters to end with")] = None,
    unit: Annotated[str, typer.Option(help="neurons or layers")] = "neurons",
) -> None:
    """Score, select and cut once; without --target to the config's whole target."""
    from ptl import checkpoint
    from ptl.prune import prune_checkpoint

    overrides = pairs("--set", sets) | ({} if target is None else {"schedule.target": target})
    settings = load_config(config, overrides)
    if unit not in ("neurons", "layers"):
        raise InputError(f"--unit: {unit!r} must be neurons or layers")
    _folders(src, dst)
    params = checkpoint.num_params(src)
    goal = params - removal(params, settings.schedule.target if target is None else target)
    report = prune_checkpoint(src, dst, settings.prune, settings.calibration, unit=unit, goal=goal, seed=settings.seed)
    _show(report)


def recover(
    src: Source,
    dst: Target,
    config: ConfigFile,
    sets: Overrides = [],  # noqa: B006
    tokens: Annotated[int | None, typer.Option(min=1, help="token budget; none: the config's whole budget")] = None,
    scored: Annotated[
        Path | None, typer.Option(help="folder of `ptl evaluate`, on whose items it must not be trained")
    ] = None,
) -> None:
    """Train a checkpoint on the config's training data, as one recovery that is both first and last."""
    from ptl.job import Job, Round
    from ptl.recover import recover_checkpoint

    settings = load_config(config, pairs("--set", sets))
    _folders(src, dst)
    budget = settings.schedule.recovery_tokens if tokens is None else tokens
    here = Round(budget, (), 1, True, settings.seed)
    scratch = dst.with_name(dst.name + ".training")
    for name in ("items.jsonl", "scores.json"):
        if scored is not None and not (scored / name).is_file():
            raise InputError(f"--scored: no {name} in {scored}; give a folder that `ptl evaluate` wrote")
    job = Job(settings.training, here, scratch, lambda metrics, step: print(step, metrics), scored=scored)
    _show(recover_checkpoint(src, dst, Recovery(stages=settings.recover), [budget], job))


def evaluate(src: Source, dst: Target, config: ConfigFile, sets: Overrides = []) -> None:  # noqa: B006
    """Score a checkpoint on the config's tasks; writes scores.json and items.jsonl."""
    from ptl.evaluate import evaluate_checkpoint

    settings = load_config(config, pairs("--set", sets))
    _folders(src, dst)
    _show(evaluate_checkpoint(src, dst, settings.evaluate, seed=settings.seed))


def _fresh(dst: Path) -> None:
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError(f"dst: {dst} is a file or not empty; give a folder that does not exist yet")


def _folders(src: Path, dst: Path) -> None:
    from ptl import checkpoint

    checkpoint.read_config(src)
    _fresh(dst)


def _show(report: Any) -> None:
    print(json.dumps(dataclasses.asdict(report), indent=1, default=str))
