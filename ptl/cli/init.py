"""`ptl init`: write a first config for a model, to be read, changed and run."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ptl.config.goal import MemoryGoal
from ptl.config.paths import FILL_IN
from ptl.config.run import Task, check
from ptl.data.training_amount import PER_PARAMETER
from ptl.errors import InputError
from ptl.preflight.starter import Request, Starter, run_name, starter
from ptl.preflight.starter_presets import Data


def init(
    model: Annotated[
        str | None, typer.Argument(help="hub id or checkpoint folder; only its config.json is read", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="file to write; default: NAME.yaml, after the model")
    ] = None,
    gpu: Annotated[str, typer.Option(help="kind of GPU that it will run on (see --list), or none")] = "h100",
    gpus: Annotated[
        int | None, typer.Option(min=1, max=64, help="GPUs of a recovery; default: the fewest that train all weights")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="share of all parameters to remove, or (from 1000 on) the number to end with, or memory to fit into "
            "(16GiB); default: 0.3, or less where FFNs, experts or the rows of --data do not allow for it",
            show_default=False,
        ),
    ] = None,
    math: Annotated[bool, typer.Option("--math", help="train and score on mathematics (GSM8K, MATH)")] = False,
    code: Annotated[bool, typer.Option("--code", help="train and score on code (MBPP, HumanEval)")] = False,
    data: Annotated[
        str | None, typer.Option(help="train on these rows: a .jsonl or .parquet file, or a hub data set, ID[:SUBSET]")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="score on this task of lm-evaluation-harness; may be repeated")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file if it exists")] = False,
    list_: Annotated[bool, typer.Option("--list", help="list families, known models and kinds of GPUs")] = False,
) -> None:
    """Write a first config for a model, with comments: sizes, schedule, data, and what fits on your GPUs."""
    if list_:
        _print_list()
        return
    if model is None:
        raise InputError(
            "missing", field="MODEL", remedy="give a hub id or a checkpoint folder; `ptl init --list` has models"
        )
    file = output or Path(f"{run_name(model)}.yaml")
    _check_file(file, force)
    request = Request(
        model=model,
        data=_data(data, math=math, code=code),
        tasks=_tasks(task or [], math=math, code=code),
        target=None if target is None else _target(target),
        gpu=None if gpu == "none" else gpu,
        gpus=gpus,
    )
    made = starter(request, file.absolute().parent)
    file.write_text(made.text, encoding="utf-8")
    _print_end(file, made, gpu)


def _target(text: str) -> float | MemoryGoal:
    with contextlib.suppress(ValueError):
        return float(text)
    return check(MemoryGoal, {"memory": text}, "--target")


def _check_file(file: Path, force: bool) -> None:
    """Raise InputError for a file that cannot be written, or must not be."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"{file} must be a file in a folder that exists", field="--output")
    if file.exists() and not force:
        raise InputError(f"{file} exists", field="--output", remedy="give another file, or --force to overwrite it")


def _data(source: str | None, *, math: bool, code: bool) -> Data:
    """The rows that are named, or those of the presets."""
    from ptl.data import row_formats
    from ptl.preflight import starter_presets

    if source is None:
        return starter_presets.preset_data(math=math, code=code)
    name, subset = source, None
    # A file's path may have a colon in it, as s3:// has.
    if "://" not in source and not Path(source).exists():
        name, _, subset = source.partition(":")
    return starter_presets.own_data(row_formats.recognise(name, subset or None, field="--data"))


def _tasks(names: list[str], *, math: bool, code: bool) -> list[Task]:
    """The tasks that are named, then those of the presets; each once."""
    from ptl.preflight import starter_presets

    tasks = [starter_presets.named_task(name, "--task") for name in names]
    tasks += starter_presets.MATH_TASKS if math else ()
    tasks += starter_presets.CODE_TASKS if code else ()
    return list({task.name: task for task in tasks}.values())


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    from ptl.model.families import FAMILIES, TEXT_TOWERS
    from ptl.preflight.gpus import GIB, GPUS
    from ptl.preflight.known_models import KNOWN_MODELS

    families = ", ".join(sorted({*FAMILIES, *TEXT_TOWERS}))
    print(f"Families: {families}. Any checkpoint of these can be named, by hub id or folder.")
    models = Table(title="Models on the hub, for example", title_justify="left")
    for heading in ("Model", "Family", "Parameters", ""):
        models.add_column(heading, justify="right" if heading == "Parameters" else "left")
    for model in KNOWN_MODELS:
        models.add_row(model.hub_id, model.family, f"{model.billions:.3g}B", "gated" if model.gated else "")
    Console().print(models)
    print("A gated model needs HF_TOKEN, and its licence accepted on the hub.")
    kinds = ", ".join(f"{kind} ({gpu.memory / GIB:.0f})" for kind, gpu in GPUS.items())
    print(f"GPUs, with GiB of memory: {kinds}")


def _print_end(file: Path, made: Starter, gpu: str) -> None:
    """What was written, what it will take, and what to do next."""
    from ptl.preflight import remedies

    title, *rest = [line.removeprefix("#").strip() for line in made.text.splitlines() if line.startswith("#")][:4]
    print(f"wrote {file}: {title}")
    if made.forecast is not None:
        print("\n".join(rest))
    print(made.amount.sentence)
    # Not the tenth of it from which a config is warned of: init has chosen the tokens itself.
    for warning in [*made.amount.warnings(PER_PARAMETER), *(remedies.warnings(made.forecast) if made.forecast else ())]:
        print(f"warning: {warning}", file=sys.stderr)
    if made.to_fill:
        print(f"Fill in first, where it says {FILL_IN}: {' and '.join(made.to_fill)}")
    of_gpu = f" --gpu {gpu}" if made.forecast is not None and gpu != "h100" else ""
    config = shlex.quote(str(file))
    steps = {
        f"ptl validate {config}": "check it, its data and the model, which is downloaded",
        f"ptl plan {config}{of_gpu}": "memory and hours of every step",
        f"ptl run {config} --rehearse": "the same steps with about 1 % of the work",
        f"ptl run {config}": "here",
        f"ptl submit {config}": "on a cluster",
    }
    width = max(map(len, steps))
    print("Next:")
    for command, purpose in steps.items():
        print(f"  {command:{width}}  # {purpose}")
