"""Data and benchmarks for `ptl init`: presets for mathematics and code, a user's own rows, or fields to fill in.

Sources are written as YAML, indented below the field that they belong to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import yaml

from ptl.config.paths import FILL_IN
from ptl.config.recover import DataSource
from ptl.config.run import Task
from ptl.data.row_formats import Recognised
from ptl.data.training_amount import CHARACTERS
from ptl.errors import InputError
from ptl.evaluation.task_yaml import Spec
from ptl.evaluation.tasks import can_find, find, is_accuracy, is_path
from ptl.units import listed

LENGTHS = (256, 512, 1024, 2048, 4096)  # tokens of a training row
PLAIN = re.compile(r"[A-Za-z./][\w./-]*")  # a text that needs no quotes in YAML, unless YAML reads it as another type


@dataclass(frozen=True)
class Data:
    """What is trained and scored on."""

    calibration: DataSource | None  # None: to be filled in
    training: tuple[DataSource, ...]  # more than one, or none: that of the calibration
    tokens: float | None  # of the training rows, roughly; None: not known
    max_length: int  # tokens of a training row
    comment: str = ""  # about the calibration


GSM8K = DataSource(source="openai/gsm8k", subset="main", prompt="Question: {question}\nAnswer:", completion=" {answer}")
MBPP = DataSource(
    source="google-research-datasets/mbpp",
    subset="full",
    prompt="You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
    "{test_list[0]}\n{test_list[1]}\n{test_list[2]}\n[BEGIN]\n",
    completion="{code}\n[DONE]",
)
MATH = Data(
    calibration=GSM8K,
    # Small, and in the benchmark's own form: a few times over.
    training=(
        GSM8K.model_copy(update={"weight": 0.02}),
        DataSource(source="meta-math/MetaMathQA", prompt="Question: {query}\nAnswer:", completion=" {response}"),
        DataSource(source="AI-MO/NuminaMath-CoT", prompt="Question: {problem}\nAnswer:", completion=" {solution}"),
    ),
    tokens=500e6,
    max_length=1024,
    comment="GSM8K, in the words of the benchmark",
)
MAGICODER = (
    DataSource(source="ise-uiuc/Magicoder-OSS-Instruct-75K", prompt="{problem}\n", completion="{solution}"),
    DataSource(source="ise-uiuc/Magicoder-Evol-Instruct-110K", prompt="{instruction}\n", completion="{response}"),
)
CODE = replace(
    MATH,
    calibration=MBPP,
    training=(MBPP.model_copy(update={"weight": 0.005}), *MAGICODER),
    tokens=110e6,
    comment="MBPP, in the words of the benchmark",
)
BOTH = replace(
    MATH,
    training=(*MATH.training, *CODE.training),
    tokens=220e6,  # code, of which there is less, is half of what is trained on
    comment="only one source can be named; for a model that keeps its code too, take a file with both kinds of rows",
)
MATH_TASKS = (
    Task(name="gsm8k", metric="exact_match,flexible-extract"),
    Task(name="minerva_math500", metric="math_verify", max_new_tokens=1024),
)
CODE_TASKS = (
    Task(name="mbpp", metric="pass_at_1"),
    Task(name="humaneval", metric="pass@1"),
)
KNOWN_TASKS = {task.name: task for task in (*MATH_TASKS, *CODE_TASKS)}


def preset_data(*, math: bool, code: bool) -> Data:
    """The data of the presets; without one, a source to fill in."""
    if math or code:
        return BOTH if math and code else MATH if math else CODE
    return Data(calibration=None, training=(), tokens=None, max_length=512)


def own_data(recognised: Recognised) -> Data:
    """A user's own rows, for both calibration and training."""
    tokens = recognised.long / CHARACTERS
    fitting = [length for length in LENGTHS if length >= tokens]
    return Data(
        calibration=recognised.source,
        training=(),
        tokens=None if recognised.characters is None else recognised.characters / CHARACTERS,
        max_length=min(fitting, default=LENGTHS[-1]),
    )


def named_task(name: str, field: str) -> Task:
    """A task or group by its name or path, with a metric that all of it has. Raises InputError that names `field`."""
    if name in KNOWN_TASKS:
        return KNOWN_TASKS[name]
    if not can_find(name):  # without lm_eval; the step will look
        return Task(name=name)
    try:
        specs = find(name)
    except InputError as error:
        raise InputError(error.problem, field=field, remedy=error.remedy) from error
    shared = _shared_metrics(name, specs, field)
    # One that calls an item right or wrong, where there is one.
    judging = [metric for metric in shared if all(is_accuracy(spec, metric) for spec in specs)]
    preferred = [metric for metric in ("exact_match", "acc") if metric in judging]
    return Task(name=name, metric=(preferred or judging or shared)[0])


def _shared_metrics(name: str, specs: Sequence[Spec], field: str) -> list[str]:
    """The metrics that all members of a group have; a single task's own. Raises InputError where there is none."""
    shared = specs[0].metrics
    for spec in specs[1:]:
        both = [metric for metric in shared if metric in spec.metrics]
        if not both:
            raise InputError(
                f"the tasks of the group {name!r} have no metric in common: {spec.name} has {listed(spec.metrics)}, "
                f"the tasks before it {listed(shared)}",
                field=field,
                remedy="name its tasks one by one",
            )
        shared = both
    return shared


def runs_code(tasks: Sequence[Task]) -> bool:
    """Whether one of the tasks runs what the model writes."""
    named = [task.name for task in tasks if can_find(task.name) and not is_path(task.name)]
    known = any(task in CODE_TASKS for task in tasks)
    return known or any(spec.runs_code for name in named for spec in find(name))


def source_yaml(source: DataSource, indent: int) -> str:
    """The fields of a source that are not at their default, each on a line."""
    fields = {"source": source.source, **source.model_dump(exclude_defaults=True)}
    if source.format == "prompt_completion":
        fields |= {"prompt": source.prompt, "completion": source.completion}
    return _lines([f"{name}: {scalar(value)}" for name, value in fields.items()], indent)


def blank_source_yaml(indent: int) -> str:
    """A source that the user fills in."""
    lines = [
        f"source: {FILL_IN}.jsonl # your rows: a .jsonl, .jsonl.gz or .parquet file, or a data set's id on the hub",
        'format: prompt_completion # or `text`, with text: "{column}"; or `messages`, for chats',
        'prompt: "Question: {question}\\nAnswer:" # templates over the columns of a row',
        'completion: " {answer}"',
    ]
    return _lines(lines, indent)


def training_yaml(data: Data) -> str:
    """The value of `training`: a list of sources, or the calibration's."""
    if not data.training:
        return " *calibration"
    entries = []
    for source in data.training:
        text = source_yaml(source, 4)
        if data.calibration is not None and _is_same(source, data.calibration):
            text = _lines(["<<: *calibration", f"weight: {source.weight:g} # small: a few passes over it"], 4)
        entries.append(f"  - {text.lstrip()}")
    return "".join(f"\n{entry}" for entry in entries)


def _is_same(source: DataSource, other: DataSource) -> bool:
    """Whether a training source reads the same rows in the same way."""
    return source.model_copy(update={"weight": 1.0}) == other


def tasks_yaml(tasks: Sequence[Task]) -> str:
    """The entries of `evaluate.tasks`."""
    if not tasks:
        return (
            f"    - name: {FILL_IN} # a task's name, for example gsm8k (`lm_eval ls tasks`), or the path of a task YAML"
        )
    entries = []
    for task in tasks:
        fields = {"name": task.name, **task.model_dump(exclude_defaults=True)}
        text = _lines([f"{name}: {scalar(value)}" for name, value in fields.items()], 6)
        entries.append(f"    - {text.lstrip()}")
    return "\n".join(entries)


def scalar(value: object) -> str:
    """A value as YAML writes it, on one line."""
    text = str(value)
    if not isinstance(value, str):
        return text
    if PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    return json.dumps(text, ensure_ascii=False)


def _lines(lines: Sequence[str], indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)
