"""Benchmarks of lm-evaluation-harness: found by name, checked before any work, and fed from local files.

Nothing here imports lm_eval or torch: the harness's own index reads 14,000 files for 6 seconds and more.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ptl import yaml_text
from ptl.config import Evaluate, Gate, Task
from ptl.errors import InputError

NAME = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]*["']?([\w.:+-]+)["']?[ \t\r]*(?:\#.*)?$""", re.M)
CODE_FOLDERS = ("humaneval", "mbpp")  # whose answers are run by `evaluate`'s code_eval, for which the sandbox stands in
# The metrics of a task that names none, by output_type (lm_eval.api.registry.DEFAULT_METRIC_REGISTRY).
DEFAULT_METRICS = {
    "loglikelihood": ["perplexity", "acc"],
    "loglikelihood_rolling": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    "multiple_choice": ["acc", "acc_norm"],
    "generate_until": ["exact_match"],
}

# Metrics of the harness that do not call an item right or wrong (lm_eval.api.metrics).
NO_ACCURACY = {
    "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "likelihood", "brier_score", "mcc", "f1",
    "bleu", "chrf", "chrf++", "ter",
}  # fmt: skip

# All of the harness's own (lm_eval.api.metrics); another name is looked up on the hub, as code.
METRICS = {"acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm", "bypass", "exact_match", *NO_ACCURACY}

FUNCTIONS = "!function"  # a tag of YAML: the harness imports what it names; also the key that keeps all of a file
SPLITS = ("test_split", "validation_split", "fewshot_split", "training_split")

Row = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One task of the harness: its YAML and what it says, with `!function` tags as text."""

    name: str
    path: Path
    config: dict[str, Any]

    @property
    def metrics(self) -> list[str]:
        """Names of its metrics. A function's result may be a dict, whose keys are metrics too (HumanEval's pass@1)."""
        listed = self.config.get("metric_list")
        if listed is None:
            return DEFAULT_METRICS[self.config.get("output_type", "generate_until")]
        return [_metric_name(entry) for entry in listed]

    @property
    def filters(self) -> list[str]:
        """Names of the ways in which an answer is extracted; the first one counts unless the metric names another."""
        return [entry["name"] for entry in self.config.get("filter_list") or []] or ["none"]

    @property
    def runs_code(self) -> bool:
        """Whether scoring runs what the model wrote."""
        return bool(self.config.get("unsafe_code"))


@dataclass(frozen=True)
class LocalFile:
    """Where a benchmark's split lies in `data_dir`, and how a row becomes one of the harness's (None: not in it)."""

    file: str
    row: Callable[[Row], Row | None] = lambda row: row


def _math_row(row: Row) -> Row:
    # The harness takes the answer from the solution's last \boxed{}; MATH-500 as a plain list has only the answer.
    return row if "solution" in row else {**row, "solution": f"\\boxed{{{row['answer']}}}"}


def _mbpp_row(row: Row) -> Row | None:
    # The authors' split (Austin et al. 2021): 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 training.
    return row if 11 <= int(row["task_id"]) <= 510 else None


GSM8K = {"train": LocalFile("gsm8k_train.jsonl"), "test": LocalFile("gsm8k_test.jsonl")}
# Files under the names by which the benchmarks are distributed; others: data_dir/<task>/<split>.jsonl
LOCAL: dict[str, dict[str, LocalFile]] = {
    "gsm8k": GSM8K,
    "gsm8k_perplexity": GSM8K,  # examples/smollm2
    "gsm8k_cot": GSM8K,
    "gsm8k_cot_zeroshot": GSM8K,
    "minerva_math500": {"test": LocalFile("math500.jsonl", _math_row)},
    "humaneval": {"test": LocalFile("HumanEval.jsonl.gz")},
    "mbpp": {"test": LocalFile("mbpp.jsonl", _mbpp_row)},
}


def check_tasks(tasks: Sequence[Task], settings: Evaluate | None = None) -> None:
    """Raise InputError for tasks, metrics, local files or code that evaluate would refuse; `settings` adds the latter.

    Cheap and torch-free. A name can be checked only where lm_eval is installed; elsewhere the step checks it.
    """
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise InputError(f"evaluate.tasks: {task.name!r} is listed twice; remove one")
        if not can_find(task.name):
            continue
        for spec in find(task.name):
            choose(spec, task.metric)
            if task.num_fewshot and spec.config.get("num_fewshot") == 0:
                raise InputError(
                    f"evaluate.tasks: num_fewshot={task.num_fewshot}, but the task {spec.name!r} says it has no "
                    "few-shot examples; leave num_fewshot out"
                )
            if settings is not None:
                check_code(spec, settings.allow_code)
                local_splits(spec, settings.data_dir, task.num_fewshot)


def check_gate(settings: Evaluate, gate: Gate) -> None:
    """Raise InputError when the gate is to decide by a task that calls no item right or wrong; torch-free."""
    first = settings.tasks[0]
    if not gate.enabled or not can_find(first.name):
        return
    if not all(is_accuracy(spec, first.metric) for spec in find(first.name)):
        raise no_accuracy(first)


def no_accuracy(task: Task) -> InputError:
    """What to say of a first task that the gate cannot decide by."""
    return InputError(
        f"gate.enabled: true, but evaluate.tasks.0 ({task.name!r}) is judged by {task.metric!r}, which calls no item "
        "right or wrong, and the gate compares item by item; put a task with an accuracy first (metric exact_match, "
        "acc, ...), or set gate.enabled: false"
    )


def is_accuracy(spec: Spec, metric: str) -> bool:
    """Whether each item is right or wrong by this metric, as far as the task's YAML can tell: a mean, no perplexity."""
    name, _ = choose(spec, metric)
    listed = spec.config.get("metric_list") or []
    entry: dict[str, Any] = next((entry for entry in listed if _metric_name(entry) == name), {})
    joined = str(entry.get("aggregation", "mean"))
    mean = joined in ("mean", "nanmean") or joined.startswith("!function")
    return name not in NO_ACCURACY and mean and entry.get("higher_is_better", True) is not False


def can_find(name: str) -> bool:
    """Whether a task can be looked up here: by its path, or by its name where the harness is installed."""
    return is_path(name) or _harness() is not None


def find(name: str) -> list[Spec]:
    """The task of that name or path; a group (minerva_math) gives its members. Raises InputError with close names."""
    if is_path(name):
        return [_from_path(Path(name))]
    index = _index()
    if name not in index:
        close = difflib.get_close_matches(name, index, n=8, cutoff=0.5)
        raise InputError(
            f"evaluate.tasks: {name!r} is no task of lm-evaluation-harness"
            + (f"; close names: {', '.join(close)}" if close else "")
            + "; `lm_eval ls tasks` lists all; for a task of your own give the path of its YAML"
        )
    config = read_yaml(index[name])
    if "group" not in config:
        return [Spec(name, index[name], config)]
    members = config.get("task")
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise InputError(f"evaluate.tasks: the group {name!r} has subgroups of its own; name its tasks one by one")
    return [spec for member in members for spec in find(member)]


def choose(spec: Spec, metric: str) -> tuple[str, str]:
    """(metric, filter) from `exact_match` or `exact_match,strict-match`. Raises InputError that lists what exists."""
    name, _, extraction = metric.partition(",")
    if name not in spec.metrics:
        raise InputError(
            f"evaluate.tasks: the task {spec.name!r} has no metric {name!r}; it has: {', '.join(spec.metrics)}"
        )
    if extraction and extraction not in spec.filters:
        raise InputError(
            f"evaluate.tasks: the task {spec.name!r} has no filter {extraction!r}; it has: {', '.join(spec.filters)}"
        )
    return name, extraction or spec.filters[0]


def check_code(spec: Spec, allow_code: bool) -> None:
    """Raise InputError when scoring would run code unasked (a task file's, a model's) or a model's unsandboxed."""
    functions = [] if _of_the_harness(spec.path) else [*_functions(spec.config), *_unknown_metrics(spec.config)]
    if functions and not allow_code:
        raise InputError(
            f"evaluate.allow_code: {spec.path} has {', '.join(functions[:3])}: code that would run with all rights of "
            "the step, outside the sandbox; read it, and set evaluate.allow_code: true to have it run"
        )
    if not spec.runs_code:
        return
    if not allow_code:
        raise InputError(
            f"evaluate.allow_code: the task {spec.name!r} runs code that the model wrote; "
            "set evaluate.allow_code: true to have it run in the sandbox"
        )
    if spec.path.parent.name not in CODE_FOLDERS:
        raise InputError(
            f"evaluate.tasks: the task {spec.name!r} runs model-written code by means of its own, outside the sandbox; "
            f"only the tasks of {' and '.join(CODE_FOLDERS)} can be scored"
        )


def _functions(config: dict[str, Any]) -> Iterator[str]:
    """What of a task's YAML is code: `!function` tags, and a class in place of the harness's."""
    yield from config.get(FUNCTIONS, ())
    if config.get("class"):
        yield f"class: {config['class']}"


def _unknown_metrics(config: dict[str, Any]) -> Iterator[str]:
    """Metrics that the harness does not have, and would fetch as code from the hub."""
    for entry in config.get("metric_list") or []:
        name = str(entry["metric"])
        if entry.get("hf_evaluate") or (name not in METRICS and not name.startswith("!function")):
            yield f"metric_list: {name} (from the hub)"


def _of_the_harness(path: Path) -> bool:
    root = _harness()
    return root is not None and path.resolve().is_relative_to(root.resolve())


def local_splits(spec: Spec, data_dir: str | None, num_fewshot: int | None = None) -> dict[str, LocalFile]:
    """Split -> file, absolute, for a task that reads local files; {} where the task is to fetch its data itself.

    Local are tasks whose YAML names `data_files` (relative to the working directory or to a folder above the YAML),
    and every task once `data_dir` is given. Raises InputError that names a missing file which the task needs: that of
    the scored split, and that of the few-shot examples where they are not part of the task.
    """
    config = spec.config
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") == "json" and isinstance(named, dict):
        return {split: LocalFile(str(_beside(spec, str(file)))) for split, file in named.items()}
    if data_dir is None or "custom_dataset" in config:
        return {}
    scored = config.get("test_split") or config.get("validation_split")
    if not scored:
        raise InputError(f"evaluate.tasks: the task {spec.name!r} names no test or validation split")
    needed = {scored}
    shots = config.get("num_fewshot") if num_fewshot is None else num_fewshot
    examples = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    if shots and examples and "samples" not in (config.get("fewshot_config") or {}):
        needed.add(examples)
    root, found = Path(data_dir), {}
    for split in dict.fromkeys(config[field] for field in SPLITS if config.get(field)):
        local = LOCAL.get(spec.name, {}).get(split, LocalFile(f"{spec.name}/{split}.jsonl"))
        path = root / local.file
        if path.is_file():
            found[split] = LocalFile(str(path.resolve()), local.row)
        elif split in needed:
            raise InputError(f"evaluate.data_dir: {root} has no {local.file}, which the task {spec.name!r} needs")
    return found


def read_yaml(path: Path, seen: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """A task's YAML with its includes, `!function` tags as text. Raises InputError where it cannot be read.

    All tags are under the key FUNCTIONS too: the harness imports a function also where a later field or the file that
    includes this one replaces it.
    """
    where = f"evaluate.tasks: {path}"
    if path in seen or not path.is_file():
        raise InputError(f"{where} is no file" if path not in seen else f"{where} includes itself")
    functions: list[str] = []

    class Loader(yaml.SafeLoader):
        pass

    def function(_loader: Any, node: yaml.Node) -> str:
        functions.append(f"!function {node.value}")
        return functions[-1]

    Loader.add_constructor(FUNCTIONS, function)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where} cannot be read: {error}") from error
    # The harness's own files are trusted, and some name a field twice.
    config = yaml.load(text, Loader=Loader) if _of_the_harness(path) else yaml_text.load(text, where, Loader)
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a mapping, found {type(config).__name__}")
    included = config.pop("include", [])
    names = included if isinstance(included, list) else [included]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: include must be the path of a YAML file, or a list of them")
    merged: dict[str, Any] = {}
    for name in names:
        inner = read_yaml((path.parent / name).resolve(), seen | {path})
        functions += inner.pop(FUNCTIONS, ())
        merged |= inner
    return merged | config | ({FUNCTIONS: list(dict.fromkeys(functions))} if functions else {})


def is_path(name: str) -> bool:
    """Whether a task is given by its YAML, not by its name in the harness."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def _metric_name(entry: dict[str, Any]) -> str:
    name = str(entry["metric"]).removeprefix("!function ").rpartition(".")[2]
    return "pass@1" if name == "pass_at_k" else name


def _from_path(path: Path) -> Spec:
    if not path.is_file():
        raise InputError(f"evaluate.tasks: no task file {path}; give a path relative to the working directory")
    config = read_yaml(path.resolve())
    if not isinstance(config.get("task"), str):
        raise InputError(f"evaluate.tasks: {path} has no `task: NAME`; it must be a single task of lm-eval")
    _check_fields(config, path)
    return Spec(config["task"], path.resolve(), config)


def _check_fields(config: dict[str, Any], path: Path) -> None:
    """Raise InputError where a field of a task's YAML that we read is not what the harness takes there."""
    kind = config.get("output_type", "generate_until")
    if not isinstance(kind, str) or kind not in DEFAULT_METRICS:
        raise InputError(
            f"evaluate.tasks: {path} has output_type={kind!r}; it must be one of {', '.join(DEFAULT_METRICS)}"
        )
    for field, key in (("metric_list", "metric"), ("filter_list", "name")):
        entries = config.get(field)
        named = isinstance(entries, list) and all(
            isinstance(entry, dict) and isinstance(entry.get(key), str) for entry in entries
        )
        if entries is not None and not (named and entries):
            raise InputError(f"evaluate.tasks: {path} must have a list in {field}, each entry with a `{key}`")
    for field in ("dataset_kwargs", "fewshot_config"):
        if not isinstance(config.get(field) or {}, dict):
            raise InputError(f"evaluate.tasks: {path} must have a mapping in {field}")
    for field in SPLITS:
        if not isinstance(config.get(field) or "", str):
            raise InputError(f"evaluate.tasks: {path} must have the name of a split in {field}")


def _beside(spec: Spec, file: str) -> Path:
    for folder in (Path(), *spec.path.parents):
        if (folder / file).is_file():
            return (folder / file).resolve()
    raise InputError(
        f"evaluate.tasks: the task {spec.name!r} reads {file}, which is neither in the working directory "
        f"nor in a folder above {spec.path}"
    )


@cache
def _harness() -> Path | None:
    from importlib.util import find_spec

    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _index() -> dict[str, Path]:
    root = _harness()
    if root is None:
        raise InputError("evaluate.tasks: lm-evaluation-harness is not installed; install ptl's extra `evaluate`")
    index: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        for name in NAME.findall(path.read_bytes()):
            index.setdefault(name.decode(), path)
    return index
