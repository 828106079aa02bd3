"""Single steps by hand, on checkpoint folders, without pipeline, store or MLflow: `ptl prune SRC DST --config FILE`."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ptl.cli.arguments import (
    CheckpointFolder,
    ConfigOption,
    Overrides,
    TargetFolder,
    check_free,
    check_given,
    writing,
)
from ptl.config.recover import Recovery
from ptl.config.run import Config, load_config, pairs
from ptl.config.schedule import plan
from ptl.log import doing, on_terminal


def import_model(
    source: Annotated[
        str, typer.Argument(help="hub id, or folder of a checkpoint", show_default=False)
    ],
    dst: TargetFolder,
    revision: Annotated[str | None, typer.Option(help="hub commit")] = None,
) -> None:
    """Check a checkpoint, including its weights, and copy it."""
    doing(f"loading libraries to import {source}")
    from ptl.model.hub import import_checkpoint

    check_free(dst)
    with writing(dst) as out:
        import_checkpoint(source, revision, out)
    print(f"wrote {dst}")


def prune(
    src: CheckpointFolder,
    dst: TargetFolder,
    config: ConfigOption,
    sets: Overrides,
    target: Annotated[
        float | None,
        typer.Option(help="share of the parameters of SRC to remove, or number to end with"),
    ] = None,
) -> None:
    """Score, select and prune once, to --target or else to the config's whole target."""
    doing(f"loading libraries to prune {src}")
    from ptl.preflight.target import resolved, to_remove
    from ptl.pruning.prune import prune_checkpoint

    overrides = pairs("--set", sets)
    if target is not None:
        overrides["schedule.target"] = target
    settings = load_config(config, overrides)
    check_given(settings.calibration, "calibration")
    unit = plan(settings.schedule, settings.prune)[0].unit  # of neurons_then_layers the first
    params = _check_folders(src, dst)
    schedule = resolved(settings.schedule, settings.prune, src)
    goal = params - to_remove(params, schedule)
    with writing(dst) as out:
        report = prune_checkpoint(
            src,
            out,
            settings.prune,
            settings.calibration,
            chat=settings.chat,
            unit=unit,
            goal=goal,
            end=goal,
            seed=settings.seed,
        )
        _print_report(report)


def recover(
    src: CheckpointFolder,
    dst: TargetFolder,
    config: ConfigOption,
    sets: Overrides,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="token budget; default: the config's whole budget")
    ] = None,
) -> None:
    """Train a checkpoint on the config's training data, as the only recovery of a run.

    Rows that share text with the config's benchmarks are left out where lm-evaluation-harness is installed.
    Training checkpoints are in DST.partial until it is done; run the same command again to resume from them.
    """
    doing(f"loading libraries to train {src}")
    from ptl.evaluation import task_files
    from ptl.evaluation.evaluate import write_items
    from ptl.preflight import rows
    from ptl.recovery.job import RecoveryJob, StageBudget, progress
    from ptl.recovery.recover import recover_checkpoint

    settings = load_config(config, pairs("--set", sets))
    check_given(settings.training, "training")
    _check_folders(src, dst)
    rows.check_data(settings.calibration, settings.training, settings.recover)
    rows.check_rewards(settings.recover, settings.training)
    num_tokens = settings.schedule.recovery_tokens if tokens is None else tokens
    # The only iteration: no earlier one has taken tokens from the data.
    budget = StageBudget(num_tokens, (), 1, True, settings.seed)
    with writing(dst) as out, tempfile.TemporaryDirectory() as items_folder:
        benchmark_items = None
        if settings.training.decontaminate.tasks and task_files.harness_folder():
            benchmark_items = Path(items_folder)
            write_items(benchmark_items, settings.evaluate, settings.seed)
        elif settings.training.decontaminate.tasks:
            print(
                "training rows are not compared with the benchmarks: lm-evaluation-harness is not installed"
            )
        # A training of other inputs is left alone: its weights must not become this one's.
        key = _training_key(src, settings, num_tokens, benchmark_items)
        scratch = out.with_name(f"training-{key[:12]}")
        on_log = progress(on_terminal(sys.stdout), num_tokens)
        job = RecoveryJob(
            settings.training,
            budget,
            scratch,
            on_log,
            benchmark_items=benchmark_items,
            chat=settings.chat,
        )
        report = recover_checkpoint(src, out, Recovery(stages=settings.recover), [num_tokens], job)
        _print_report(report)


def evaluate(
    src: CheckpointFolder, dst: TargetFolder, config: ConfigOption, sets: Overrides
) -> None:
    """Score a checkpoint on the config's tasks; writes scores.json and items.jsonl."""
    doing(f"loading libraries to score {src}")
    from ptl.evaluation.evaluate import evaluate_checkpoint

    settings = load_config(config, pairs("--set", sets))
    _check_folders(src, dst)
    with writing(dst) as out:
        report = evaluate_checkpoint(src, out, settings.evaluate, settings.chat, seed=settings.seed)
        _print_report(report, retention={"perplexity": report.retention.perplexity})


def _check_folders(src: Path, dst: Path) -> int:
    """The parameters of `src`. Raises InputError unless it can be read as a checkpoint, and `dst` can be written."""
    from ptl.model import checkpoint, dimensions

    checkpoint.check_links(src)
    check_free(dst)
    return dimensions.static_cost(src).params


def _training_key(
    src: Path, settings: Config, num_tokens: int, benchmark_items: Path | None
) -> str:
    """What the training of `ptl recover` depends on; only training with the same key is resumed."""
    from ptl.steps.call import key_of
    from ptl.storage.manifest import file_digest

    # Links too: a snapshot in the hub's cache has nothing else.
    files = [path for path in src.iterdir() if path.is_file()]
    if benchmark_items is not None:
        files += benchmark_items.iterdir()
    # By content, not by path: a moved checkpoint is the same source.
    contents = sorted(f"{path.name} {file_digest(path)}" for path in files)
    return key_of(
        "\n".join(contents),
        {
            "training": settings.training,
            "chat": settings.chat,
            "recover": settings.recover,
            "seed": settings.seed,
            "budget": num_tokens,
        },
    ).digest


def _print_report(report: Any, **instead: Any) -> None:
    print(json.dumps(dataclasses.asdict(report) | instead, indent=1, default=str))
