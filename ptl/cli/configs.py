"""What can be known of a config before it runs: `ptl validate`, `plan` and `compile`.

`ptl init` writes a first config for a model, to be read, changed and run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ptl import extras
from ptl.cli import arguments
from ptl.cli.arguments import AsJson, ConfigFile, Overrides
from ptl.config import dag
from ptl.config.base import FILL_IN
from ptl.config.run import Config, check
from ptl.config.schedule import MemoryGoal, Schedule, one_shot
from ptl.data.amount import PER_PARAMETER
from ptl.errors import InputError, PtlError
from ptl.extras import AbsentError, UnusableError
from ptl.log import doing
from ptl.units import listed

if TYPE_CHECKING:
    from ptl.model.dimensions import ModelDimensions
    from ptl.preflight.starter_benchmark import Benchmark


BOXED = arguments.ROOT / "examples/math_suite/boxed.py"  # grades boxes
# by the section of a config
OPTIONS = {"model": "MODEL", "schedule": "--target", "evaluate": "--task"}
NEXT = """Next:
  ptl validate {0}
  ptl plan {0}
  ptl run {0} --rehearse  # the same steps with about 1 % of the work
  ptl run {0}             # here, or on a cluster: ptl submit {0}"""


Model = Annotated[
    str, typer.Argument(help="hub id or checkpoint folder; no weights are read", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="file to write; default: NAME.yaml, after the model"),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="train on these rows: a .jsonl, .jsonl.gz or .parquet file, or a hub data set, ID[:SUBSET]"
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="PROMPT,COMPLETION, or the one column of chats or texts; default: messages, prompt,completion, "
        "question,answer, Alpaca's or text",
        show_default=False,
    ),
]
Eval = Annotated[
    str | None,
    typer.Option(
        "--eval",
        help="score on these rows: writes a benchmark of your own beside the config, for a .jsonl, .jsonl.gz or "
        ".parquet file (docs/own-benchmark.md)",
        show_default=False,
    ),
]
EvalColumns = Annotated[
    str | None,
    typer.Option(
        help="PROMPT,ANSWER of --eval; default: those of --columns, prompt,completion, question,answer or Alpaca's",
        show_default=False,
    ),
]
Grading = Annotated[
    Literal["number", "text", "boxed"] | None,
    typer.Option(
        "--grade",
        help="what of an answer to --eval must be right: its last number, all of its text, or what is in its last "
        "\\boxed{}; default: as the rows' own answers are",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="score on this task of lm-evaluation-harness; may be repeated"),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="share of all parameters to remove, or (from 1000 on) the number to end with, or memory to fit into "
        "(16GiB); default: 0.3, or less where FFNs, experts or the rows of --data do not allow for it",
        show_default=False,
    ),
]


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
            "--schema",
            is_eager=True,
            callback=_print_schema,
            help="print the JSON schema of a config, for editors",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a config, its data files and its model, and print what size it ends with; starts nothing expensive."""
    doing(f"checking {arguments.shown(config)}, its data and its model")
    with arguments.printing_json(as_json):
        settings = arguments.load(config, sets)
        dense = checked(settings)
    # Without torch there are no sizes to print.
    if dense is None:
        if as_json:
            arguments.print_json({"name": settings.name, "params": None, "ends": []})
        return
    from ptl.preflight import target

    paths = target.possible_paths(dense, settings.schedule, settings.prune)
    ends = {end.params for end in target.ends(paths)}
    if as_json:
        arguments.print_json({"name": settings.name, "params": dense.params, "ends": sorted(ends)})
        return
    at_most = "at most " if len(ends) > 1 else ""
    print(
        f"{settings.name}: {dense.params:,} parameters become {at_most}{max(ends):,}; `ptl plan` has every step"
    )


def plan(
    config: ConfigFile,
    sets: Overrides,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="kind of GPU, for example h100, or none: this machine's CPU, measured; default: h100, or none where "
            "the config asks for no accelerators and this machine has no GPU",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs per step, on each node, in place of resources.accelerators"),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="machines of a recovery, in place of resources.steps.recover.nodes"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast every step (parameters, tokens, GPU memory, hours) from the model's config, without weights."""
    doing(f"forecasting the steps of {arguments.shown(config)}")
    from ptl.model import hub
    from ptl.preflight import forecast, forecast_model, forecast_table, machine, preflight, remedies

    with arguments.printing_json(as_json):
        settings = arguments.load(config, sets)
    if gpu is None:
        asks = count or nodes or settings.resources.accelerator
        gpu = forecast_model.USUAL_GPU if asks else machine.gpu()
    run = forecast.forecast(settings, gpu, count, nodes)
    if as_json:
        arguments.print_json(forecast_table.document(run))
    folder = hub.locate(settings.model.path, settings.model.revision, hub.SMALL_FILES)
    with arguments.printing_json(as_json):
        print(forecast_table.steps(run))
        if widths := forecast_table.widths(run):
            print(widths)
        of_model = _planned(run.config, folder, run.shape.dimensions)
    warn([*preflight.warnings(settings), *remedies.warnings(run), *of_model])


def compile(
    config: ConfigFile,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="file to write the pipeline's YAML to")
    ],
    sets: Overrides,
) -> None:
    """Compile a config to the pipeline YAML that Kubeflow and `ptl run` execute; warns of what no cluster has."""
    doing(f"compiling {arguments.shown(config)}")
    # kfp's compiler decides by the suffix what it writes.
    if output.suffix not in (".yaml", ".yml") or not output.absolute().parent.is_dir():
        raise InputError(f"{output} must be a .yaml file in a folder that exists", field="--output")
    written = arguments.load(config, sets)
    settings = arguments.as_in_images(written, config)

    from pipelines.prune_tune_loop.pipeline import compile_pipeline

    compile_pipeline(settings, output)
    num_steps = len(dag.nodes(settings))
    print(f"wrote {output} ({output.stat().st_size / 1024:.0f} KB): {num_steps} steps")
    warnings = local_paths(written, config)
    if not settings.images.registry:
        warnings.append(
            f"images.registry is not set: a cluster pulls no {settings.images.of('prune')}, and can run this YAML only "
            "if its nodes have the images; set it to where you have pushed them (docs/images.md)"
        )
    warn(warnings)


def local_paths(config: Config, file: Path) -> list[str]:
    """A warning for each path of a config on this machine, which steps on a cluster do not see."""
    from pipelines.prune_tune_loop import containers

    examples = arguments.image_root(file) / "examples"  # the images contain them
    # A volume may hold the path for the pods, so it is no error.
    return [
        f"{path} is on this machine; steps on the cluster look for it in their own pods"
        for path in containers.outermost(containers.files(config))
        if not path.is_relative_to(examples)
    ]


def checked(
    config: Config, excused: type[UnusableError] | tuple[()] = AbsentError
) -> ModelDimensions | None:
    """Check all that can be checked without weights in memory; returns the dense model's sizes, None without torch.

    Software of the steps that does not work here is an error, or a warning where its error is `excused`.
    """
    from ptl.evaluation import language_models
    from ptl.export import formats
    from ptl.model import pretrained
    from ptl.preflight import preflight, target
    from ptl.preflight.rows import column_warnings

    preflight.check_filled_in(config)
    # Before a model is downloaded.
    exported = dict.fromkeys(form.format for form in config.export)
    checks: list[extras.Check] = [
        partial(language_models.check_backend, config.evaluate),
        *(formats.module_of(name).check_installed for name in exported),
    ]
    warnings = [*preflight.warnings(config), *extras.not_checked(checks, excused)]
    if not pretrained.can_build():
        warnings.append(
            "not checked: the model and what it can do of the config (without transformers or torch)"
        )
    not_asked = preflight.hub_data_not_asked_for(config)
    if not_asked:
        print(f"not looked at, as the hub cannot be asked: {listed(not_asked)}")
    folder, dimensions = preflight.preflight(config)
    warnings += column_warnings(config.calibration, config.training, config.recover)
    if dimensions is not None:
        if config.export or config.evaluate.backend == "vllm":
            warnings += formats.context_notes(folder)

        ends = target.ends(target.possible_paths(dimensions, config.schedule, config.prune))
        if config.control:  # which may not get as far as the loop
            target.possible_paths(dimensions, one_shot(config.schedule), config.prune)

        def check_exports() -> None:
            warnings.extend(formats.check_exports(folder, config.export, ends))

        warnings += extras.not_checked([check_exports], excused)
        warnings += _planned(config, folder, dimensions)
    warn(warnings)
    return dimensions


def _planned(config: Config, folder: Path, dense: ModelDimensions) -> list[str]:
    """Print how much text there is for what the plan removes of a model; returns warnings of the plan.

    Of `folder` only config.json and the tokenizer are read.
    """
    from ptl.export import formats
    from ptl.preflight import preflight, target
    from ptl.preflight.amount import planned_amount

    ends = target.ends(target.possible_paths(dense, config.schedule, config.prune))
    amount = planned_amount(config, dense.params - ends[0].params)
    if amount.sentence:
        print(amount.sentence)
    of_exports = [
        formats.width_warnings(folder, config.export, end.width, end.hidden, end.heads)
        for end in ends
    ]
    return [
        *preflight.model_warnings(config, dense),
        *preflight.chat_warnings(config, folder),
        *formats.layer_warnings(folder, config.export, config.prune.target),
        *formats.check_vllm(folder, config.prune.target, config.evaluate.backend),
        *itertools.chain(*of_exports),
        *amount.warnings(),
    ]


def warn(warnings: list[str]) -> None:
    """Print warnings beside a command's output, each once."""
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)


def init(
    model: Model,
    output: Output = None,
    data: Data = None,
    columns: Columns = None,
    benchmark: Eval = None,
    eval_columns: EvalColumns = None,
    grade: Grading = None,
    tasks: Tasks = None,
    target: Target = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="kind of GPU that it will run on, or none; default: this machine's, with --gpus h100",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="GPUs of a recovery; default: 1", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="overwrite the files if they exist")
    ] = False,
) -> None:
    """Write a first config for a model, with comments: sizes, schedule, data, and what fits on your GPUs."""
    doing(f"reading the config of {model}{', and rows' if data or benchmark else ''}")
    from ptl.preflight import machine, starter, starter_benchmark, starter_rows
    from ptl.preflight.forecast_model import GPUS, NO_GPU, USUAL_GPU

    file = output or Path(f"{starter.run_name(model)}.yaml")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"{file} must be a file in a folder that exists", field="--output")
    if file.exists() and not force:
        raise InputError(
            f"{file} exists",
            field="--output",
            remedy="give another file, or --force to overwrite it",
        )
    looked = gpu is None and gpus is None
    if gpu is None:
        gpu = machine.gpu() if looked else USUAL_GPU
    if gpu not in (*GPUS, NO_GPU):
        raise InputError(f"{gpu!r} must be one of {', '.join(GPUS)}, or {NO_GPU}", field="--gpu")
    if benchmark is None and (eval_columns or grade):
        option = "--eval-columns" if eval_columns else "--grade"
        raise InputError(
            "says how rows are scored, and there are none",
            field=option,
            remedy="give --eval ROWS.jsonl",
        )
    with _naming_options():
        rows = starter_rows.read(data, columns) if data else None
        items = (
            starter_benchmark.read(benchmark, eval_columns, grade, columns) if benchmark else None
        )
        if items is not None:
            _check_benchmark(items, file, data, force=force)
        written = starter.starter(
            model,
            file.absolute(),
            rows=rows,
            benchmark=items,
            task_names=tasks or (),
            target=_target(target) if target else None,
            gpu=None if gpu == NO_GPU else gpu,
            gpus=gpus or 1,
        )
    text = written.text
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}")
    if items is not None:
        task_file = items.task_file(file)
        _write_benchmark(items.grade, task_file, written.task)
        print(f"wrote {task_file}: {items.sentence}")
    if looked:
        print(_about_this_machine(gpu))
    # The comment at the head of the file says what it will take.
    print(
        *(
            line.removeprefix("# ")
            for line in takewhile(lambda line: line[0] == "#", text.splitlines())
        ),
        sep="\n",
    )
    print(written.amount.sentence)
    of_rows = [items.note if items else "", rows.unused if rows else ""]
    # Not the tenth of it from which a config is warned of: init has chosen the tokens itself.
    warn([*filter(None, of_rows), *written.amount.warnings(PER_PARAMETER)])
    if FILL_IN in text:
        print(f"Fill in first, where it says {FILL_IN}")
    print(NEXT.format(shlex.quote(str(file))))


def _check_benchmark(items: Benchmark, config: Path, data: str | None, *, force: bool) -> None:
    """Raise InputError where a file would be overwritten, or where the rows are those of the training."""
    task_file = items.task_file(config)
    code_files = [task_file.with_name(BOXED.name)] if items.grade == "boxed" else []
    for file in (task_file, *code_files):
        if file.exists() and not force:
            remedy = "give --force to overwrite it"
            if file == task_file:
                remedy += f", or --task {task_file} to use it"
            raise InputError(f"{file} exists", field="--eval", remedy=remedy)
    if data and Path(data).exists() and items.file.samefile(data):
        raise InputError(
            f"{data} is also what --data names, and rows of a benchmark are left out of the training",
            field="--eval",
            remedy="give other rows: split the file",
        )


def _write_benchmark(grade: str, file: Path, text: str) -> None:
    """Write a task, and beside it the code that it names."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    if grade == "boxed":
        shutil.copyfile(BOXED, file.with_name(BOXED.name))


def _about_this_machine(gpu: str) -> str:
    """What `init` has found here, and how to get a config for another machine."""
    if gpu == "none":
        return (
            "No GPU here: the config asks for none, and transformers answers, not vLLM. For a machine with GPUs: "
            "--gpu h100 --gpus 8"
        )
    return f"The GPU here is counted as {gpu}. For others: --gpu KIND --gpus NUMBER"


@contextlib.contextmanager
def _naming_options() -> Iterator[None]:
    """Errors about fields of a config that does not exist yet name the options that they come from."""
    try:
        yield
    except PtlError as error:
        section = error.field.partition(".")[0]
        field = section if section.startswith("--") else OPTIONS.get(section, error.field)
        raise type(error)(error.problem, field=field, remedy=error.remedy) from error


def _target(text: str) -> float | MemoryGoal:
    target: Any = {"memory": text}
    if text.endswith("%"):
        target = text  # is refused: a share is below 1
    with contextlib.suppress(ValueError):
        target = float(text)
    return check(Schedule, {"target": target, "recovery_tokens": 1}, "--target").target
