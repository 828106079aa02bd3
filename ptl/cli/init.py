"""`ptl init`: write a first config for a model, to be read, changed and run."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from ptl.cli.configs import warn
from ptl.config.base import FILL_IN
from ptl.config.run import check
from ptl.config.schedule import MemoryGoal
from ptl.data.checks import PER_PARAMETER
from ptl.errors import InputError

OPTIONS = {"model": "MODEL", "schedule": "--target", "evaluate": "--task"}  # by the section of a config
NEXT = """Next:
  ptl validate {0}
  ptl plan {0}
  ptl run {0} --rehearse  # the same steps with about 1 % of the work
  ptl run {0}             # here, or on a cluster: ptl submit {0}"""


Model = Annotated[
    str, typer.Argument(help="hub id or checkpoint folder; only its config.json is read", show_default=False)
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="file to write; default: NAME.yaml, after the model")
]
Data = Annotated[
    str | None, typer.Option(help="train on these rows: a .jsonl or .parquet file, or a hub data set, ID[:SUBSET]")
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="PROMPT,COMPLETION, or the one column of chats or texts; default: messages, prompt,completion, "
        "question,answer or text",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="score on this task of lm-evaluation-harness; may be repeated")
]
Target = Annotated[
    str | None,
    typer.Option(
        help="share of all parameters to remove, or (from 1000 on) the number to end with, or memory to fit into "
        "(16GiB); default: 0.3, or less where FFNs, experts or the rows of --data do not allow for it",
        show_default=False,
    ),
]


def init(
    model: Model,
    output: Output = None,
    data: Data = None,
    columns: Columns = None,
    tasks: Tasks = None,
    target: Target = None,
    gpu: Annotated[str, typer.Option(help="kind of GPU that it will run on, or none")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs of a recovery")] = 1,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file if it exists")] = False,
) -> None:
    """Write a first config for a model, with comments: sizes, schedule, data, and what fits on your GPUs."""
    from ptl.preflight import starter, starter_rows
    from ptl.preflight.forecast_model import GPUS

    file = output or Path(f"{starter.run_name(model)}.yaml")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"{file} must be a file in a folder that exists", field="--output")
    if file.exists() and not force:
        raise InputError(f"{file} exists", field="--output", remedy="give another file, or --force to overwrite it")
    if gpu not in (*GPUS, "none"):
        raise InputError(f"{gpu!r} must be one of {', '.join(GPUS)}, or none", field="--gpu")
    with _naming_options():
        text, amount = starter.starter(
            model,
            file.absolute().parent,
            rows=starter_rows.read(data, columns) if data else None,
            task_names=tasks or (),
            target=_target(target) if target else None,
            gpu=None if gpu == "none" else gpu,
            gpus=gpus,
        )
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}")
    # The comment at the head of the file says what it will take.
    print(*(line.removeprefix("# ") for line in takewhile(lambda line: line[0] == "#", text.splitlines())), sep="\n")
    print(amount.sentence)
    # Not the tenth of it from which a config is warned of: init has chosen the tokens itself.
    warn(amount.warnings(PER_PARAMETER))
    if FILL_IN in text:
        print(f"Fill in first, where it says {FILL_IN}")
    print(NEXT.format(shlex.quote(str(file))))


@contextlib.contextmanager
def _naming_options() -> Iterator[None]:
    """Errors about fields of a config that does not exist yet name the options that they come from."""
    try:
        yield
    except InputError as error:
        section = error.field.partition(".")[0]
        field = section if section.startswith("--") else OPTIONS.get(section, error.field)
        raise InputError(error.problem, field=field, remedy=error.remedy) from error


def _target(text: str) -> float | MemoryGoal:
    with contextlib.suppress(ValueError):
        return float(text)
    return check(MemoryGoal, {"memory": text}, "--target")
