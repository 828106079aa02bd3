"""Single steps by hand, on checkpoint folders, without pipeline, store or MLflow: `ptl prune SRC DST --config FILE`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ptl.cli_options import Overrides
from ptl.config import Config, Recovery, load_config, pairs, removal
from ptl.destination import OUT, check_free, writing
from ptl.errors import InputError

Source = Annotated[Path, typer.Argument(help="folder of a Hugging Face checkpoint", show_default=False)]
Target = Annotated[Path, typer.Argument(help="folder to write; must not exist yet or be empty", show_default=False)]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="the run's YAML file, for its settings")]


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

    check_free(dst)
    with writing(dst) as work:
        importer.import_checkpoint(source, revision, work / OUT)
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
    with writing(dst) as work:
        _show(
            prune_checkpoint(
                src, work / OUT, settings.prune, settings.calibration, unit=unit, goal=goal, seed=settings.seed
            )
        )


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
    """Train a checkpoint on the config's training data, as one recovery that is both first and last.

    Training checkpoints are in DST.partial until it is done; the same command resumes from them.
    """
    from ptl.job import RecoveryJob, StageBudget
    from ptl.recover import recover_checkpoint

    settings = load_config(config, pairs("--set", sets))
    _folders(src, dst)
    budget = settings.schedule.recovery_tokens if tokens is None else tokens
    here = StageBudget(budget, (), 1, True, settings.seed)
    for name in ("items.jsonl", "scores.json"):
        if scored is not None and not (scored / name).is_file():
            raise InputError(f"--scored: no {name} in {scored}; give a folder that `ptl evaluate` wrote")
    with writing(dst) as work:
        scratch = work / f"training-{_key(src, settings, budget, scored)[:12]}"
        for other in set(work.glob("training-*")) - {scratch}:
            print(f"{other} is not resumed: it belongs to another source, other settings or other data")
        job = RecoveryJob(settings.training, here, scratch, lambda metrics, step: print(step, metrics), scored=scored)
        _show(recover_checkpoint(src, work / OUT, Recovery(stages=settings.recover), [budget], job))


def evaluate(src: Source, dst: Target, config: ConfigFile, sets: Overrides = []) -> None:  # noqa: B006
    """Score a checkpoint on the config's tasks; writes scores.json and items.jsonl."""
    from ptl.evaluate import evaluate_checkpoint

    settings = load_config(config, pairs("--set", sets))
    _folders(src, dst)
    with writing(dst) as work:
        _show(evaluate_checkpoint(src, work / OUT, settings.evaluate, seed=settings.seed))


def _folders(src: Path, dst: Path) -> None:
    from ptl import checkpoint
    from ptl.anatomy import model_dimensions
    from ptl.families import family_of

    checkpoint.check_links(src)
    model_dimensions(src, family_of(checkpoint.read_config(src)))
    check_free(dst)


def _key(src: Path, settings: Config, budget: int, scored: Path | None) -> str:
    """What the training of `ptl recover` depends on; only training with the same key is resumed."""
    from ptl import takeover

    files = [path for path in src.iterdir() if path.is_file()]  # links too: a snapshot in the hub's cache has only such
    if scored is not None:
        files.append(scored / "items.jsonl")
    contents = []
    for path in files:
        with path.open("rb") as file:
            contents.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    given = {"training": settings.training, "recover": settings.recover, "seed": settings.seed, "budget": budget}
    return takeover.key("\n".join(sorted(contents)), given)


def _show(report: Any) -> None:
    print(json.dumps(dataclasses.asdict(report), indent=1, default=str))
