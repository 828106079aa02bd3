"""Benchmarks of lm-evaluation-harness: looked up by name or path, and checked before any work; torch-free."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from ptl.config.base import FILL_IN
from ptl.config.run import Evaluate, Gate, Task
from ptl.errors import InputError
from ptl.evaluation import retention, task_files
from ptl.evaluation.code_files import CodeFiles, code_files
from ptl.evaluation.task_files import FUNCTIONS, Spec, load_spec, local_splits, task_error

ALLOW_CODE = "evaluate.allow_code"
MLFLOW_NAME = re.compile(r"[\w./ :-]+")  # of a metric
# whose answers are run by `evaluate`'s code_eval, which the sandbox replaces
CODE_FOLDERS = ("humaneval", "mbpp")

# Metrics of the harness that do not call an item right or wrong (lm_eval.api.metrics).
NO_ACCURACY = {
    "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "likelihood", "brier_score", "mcc", "f1",
    "bleu", "chrf", "chrf++", "ter",
}  # fmt: skip

# All of the harness's own (lm_eval.api.metrics); another name is looked up on the hub, as code.
METRICS = {
    "acc",
    "acc_all",
    "acc_bytes",
    "acc_mutual_info",
    "acc_norm",
    "bypass",
    "exact_match",
    *NO_ACCURACY,
}


def is_path(name: str) -> bool:
    """Whether a task is given by its YAML, not by its name in the harness."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def can_find(name: str) -> bool:
    """Whether a task can be looked up here: by its path, or by its name where the harness is installed."""
    return is_path(name) or task_files.harness_folder() is not None


def find(name: str) -> list[Spec]:
    """The task of that name or path; a group (minerva_math) gives its members. Raises InputError with close names."""
    if name == FILL_IN:
        raise task_error(
            f"{FILL_IN} is still to be filled in",
            "name a task, for example gsm8k (`lm_eval ls tasks` lists all), or give the path of a task YAML",
        )
    if is_path(name):
        return [load_spec(Path(name))]
    paths = task_files.task_index()
    if name not in paths:
        close = ", ".join(difflib.get_close_matches(name, paths, n=8, cutoff=0.5))
        raise task_error(
            f"{name!r} is no task of lm-evaluation-harness; close names: {close or 'none'}",
            "`lm_eval ls tasks` lists all; for a task of your own give the path of its YAML",
        )
    config = task_files.read_yaml(paths[name])
    if "group" not in config:
        return [load_spec(paths[name], config)]
    members = config["task"]
    # A subgroup may be written out in the YAML, and a tag stands for all tasks that have it.
    if not isinstance(members, list) or not all(
        isinstance(member, str) and member in paths for member in members
    ):
        raise task_error(
            f"the tasks of the group {name!r} are not all named in its YAML (it has a tag or a subgroup there)",
            "name its tasks one by one (`lm_eval ls tasks` lists them)",
        )
    return [spec for member in members for spec in find(member)]


def find_here(name: str) -> list[Spec]:
    """As `find`, but nothing where the task cannot be looked up here."""
    return find(name) if can_find(name) else []


def score_name(task: Task) -> str:
    """The name under which a task is scored: the group's, or that of the only task in its YAML."""
    specs = find(task.name)
    return task.name if len(specs) > 1 else specs[0].name


def answer_tokens(task: Task) -> int:
    """Tokens of the longest answer: the config's, else the task's own; the harness's where it cannot be looked up."""
    if task.max_new_tokens:
        return task.max_new_tokens
    # `ptl init` makes a forecast before a task is named.
    specs = [] if task.name == FILL_IN else find_here(task.name)
    return max(
        (task_files.answer_tokens(s.generation_kwargs) for s in specs),
        default=task_files.answer_tokens(None),
    )


def hub_data(settings: Evaluate) -> list[str]:
    """Data sets of the hub that the tasks name, each once; of tasks that can be looked up here."""
    names: dict[str, None] = {}
    for task in settings.tasks:
        for spec in find_here(task.name):
            name = spec.dataset_path or ""
            # Others are a path, or how `datasets` reads files (json).
            if "/" in name and not Path(name).exists():
                names[name] = None
    return list(names)


def files(settings: Evaluate) -> set[Path]:
    """The local files that the tasks read: their YAML with its includes, their code and their data."""
    paths = {Path(settings.retention)} if settings.retention else set()
    for task in settings.tasks:
        # What the harness ships, or fetches from the hub, is no file of the user's.
        if not is_path(task.name) and not settings.data_dir:
            continue
        for spec in find(task.name):
            splits = local_splits(spec, settings.data_dir, task.num_fewshot)
            paths |= {Path(split.file) for split in splits.values()}
            if is_path(task.name):
                paths |= {*spec.files}
            for beside in _beside_code(task, spec):
                paths |= {*beside.files}
    return paths


def _beside_code(task: Task, spec: Spec) -> list[CodeFiles]:
    """What the code of a user's task may read: all that is below the folders of the files that name functions."""
    if not is_path(task.name) or not (spec.functions or spec.class_name):
        return []
    folders = sorted({path.parent for path in spec.files})
    # A folder contains those below it.
    return [code_files(folder) for folder in folders if not {*folders} & {*folder.parents}]


def warnings(settings: Evaluate) -> list[str]:
    """What the code of tasks may read and no step's key has."""
    pairs = [(task, spec) for task in settings.tasks for spec in find_here(task.name)]
    return [
        beside.warning()
        for task, spec in pairs
        for beside in _beside_code(task, spec)
        if beside.left_out
    ]


def choose_metric(spec: Spec, metric: str) -> tuple[str, str]:
    """(metric, filter) from `exact_match` or `exact_match,strict-match`. Raises InputError that lists what exists."""
    name, _, extraction = metric.partition(",")
    default = " (the default of `metric`)" if metric == Task.model_fields["metric"].default else ""
    if name not in spec.metrics:
        raise task_error(
            f"the task {spec.name!r} has no metric {name!r}{default}",
            f"set the task's `metric` to one that it has: {', '.join(spec.metrics)}",
        )
    if extraction and extraction not in spec.filters:
        raise task_error(
            f"the task {spec.name!r} has no filter {extraction!r}",
            f"use one of: {', '.join(spec.filters)}",
        )
    # The first filter counts unless the metric names another.
    return name, extraction or spec.filters[0]


def is_accuracy(spec: Spec, metric: str) -> bool:
    """Whether each item is right or wrong by this metric, as far as the task's YAML can tell: a mean, no perplexity."""
    name, _ = choose_metric(spec, metric)
    if name in NO_ACCURACY:
        return False
    # What the task's YAML says of the metric; a default metric of the harness is a mean.
    for entry in spec.metric_list or ():
        if entry.name == name:
            is_mean = entry.aggregation in ("mean", "nanmean") or entry.aggregation.startswith(
                FUNCTIONS
            )
            return is_mean and entry.higher_is_better
    return True


def check_tasks(settings: Evaluate) -> None:
    """Raise InputError for tasks, metrics, local files or code that evaluate would refuse.

    A name can be checked only where lm_eval is installed; elsewhere the step checks it.
    """
    retention.texts(settings)
    # A score is known by its name: of a YAML, by the one that it gives.
    names = [score_name(task) if can_find(task.name) else task.name for task in settings.tasks]
    for task, name in zip(settings.tasks, names, strict=True):
        if names.count(name) > 1:
            raise task_error(
                f"{name!r} is listed twice", "remove one, or rename it in a YAML of your own"
            )
        for spec in find_here(task.name):
            choose_metric(spec, task.metric)
            if not MLFLOW_NAME.fullmatch(spec.name):
                raise task_error(
                    f"MLflow takes no scores under the name of the task {spec.name!r}",
                    "name it in its YAML with letters, digits, spaces and the signs - _ . : / alone",
                )
            # lm_eval itself would warn and ignore the number.
            if task.num_fewshot and spec.num_fewshot == 0:
                raise task_error(
                    f"num_fewshot={task.num_fewshot}, but the task {spec.name!r} says it has no few-shot examples",
                    "leave num_fewshot out",
                )
            if task.samples > 1 and spec.output_type != "generate_until":
                raise task_error(
                    f"samples={task.samples}, but the model writes no answers to the task {spec.name!r}, which "
                    "compares likelihoods",
                    "leave samples out",
                )
            if spec.output_type == "generate_until" and settings.max_length:
                answer = task.max_new_tokens or task_files.answer_tokens(spec.generation_kwargs)
                check_room(spec.name, answer, settings.max_length)
            check_code(spec, settings.allow_code)
            local_splits(spec, settings.data_dir, task.num_fewshot)


def check_room(name: str, answer: int, context: int) -> None:
    """Raise InputError when a task's longest answer leaves no room for a prompt; both in tokens."""
    if answer >= context:
        raise task_error(
            f"answers of {name!r} may be {answer} tokens long, but the model's context is {context}",
            "set max_new_tokens of the task below that (or evaluate.max_length, if it can be longer)",
        )


def check_greedy(settings: Evaluate) -> None:
    """Raise InputError where answers are sampled: those of a GGUF file are greedy."""
    for task in settings.tasks:
        own = [spec.generation_kwargs or {} for spec in find_here(task.name)]
        if task.samples > 1 or any(options.get("do_sample") for options in own):
            raise task_error(
                f"answers to {task.name!r} are sampled (samples, or do_sample in its YAML), and of a GGUF file they "
                "are greedy",
                "use a task without do_sample, and one sample of each item, or no export to gguf",
            )


def check_gate(settings: Evaluate, gate: Gate) -> None:
    """Raise InputError when the gate is to decide by a task that calls no item right or wrong."""
    # The run's accuracy is that of the first task.
    first = settings.tasks[0]
    if gate.enabled and not all(is_accuracy(spec, first.metric) for spec in find_here(first.name)):
        raise no_accuracy(first)


def no_accuracy(task: Task) -> InputError:
    """The error for a first task that the gate cannot decide by."""
    judged = f"evaluate.tasks.0 ({task.name!r}) is judged by {task.metric!r}, which calls no item right or wrong"
    return InputError(
        f"true, but {judged}, and the gate compares item by item",
        field="gate.enabled",
        remedy="put a task with an accuracy first (metric exact_match, acc, ...), or set gate.enabled: false",
    )


def check_code(spec: Spec, allow_code: bool) -> None:
    """Raise InputError when scoring would run code unasked (a task file's, a model's) or a model's unsandboxed."""
    code = [] if task_files.is_of_the_harness(spec.path) else list(_own_code(spec))
    if code and not allow_code:
        raise InputError(
            f"{spec.path} has {', '.join(code[:3])}: code that would run with all rights of the step, outside the "
            "sandbox",
            field=ALLOW_CODE,
            remedy=f"read it, and set {ALLOW_CODE}: true to have it run",
        )
    # What the model writes.
    if spec.unsafe_code and not allow_code:
        raise InputError(
            f"the task {spec.name!r} runs code that the model wrote",
            field=ALLOW_CODE,
            remedy=f"set {ALLOW_CODE}: true to have it run in the sandbox",
        )
    if spec.unsafe_code and spec.path.parent.name not in CODE_FOLDERS:
        raise task_error(
            f"the task {spec.name!r} runs model-written code by means of its own, outside the sandbox",
            f"use a task of {' or '.join(CODE_FOLDERS)}",
        )


def _own_code(spec: Spec) -> Iterator[str]:
    """What of a user's task file is code: `!function` tags, a class in place of the harness's, metrics from the hub."""
    yield from spec.functions
    if spec.class_name:
        yield f"class: {spec.class_name}"
    for entry in spec.metric_list or ():
        # The harness would fetch a metric that it does not have as code from the hub.
        if entry.hf_evaluate or (
            entry.metric not in METRICS and not entry.metric.startswith(FUNCTIONS)
        ):
            yield f"metric_list: {entry.metric} (from the hub)"
