"""Files of a benchmark of lm-evaluation-harness: its YAML with its includes, and local data in place of the hub's.

Nothing here imports lm_eval: the harness's own index reads 14,000 files for 6 seconds and more, and its reader imports
what a file names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from ptl.config import yaml_text
from ptl.errors import InputError
from ptl.json_lines import read_json_lines

NAME = re.compile(
    rb"""^["']?(?:task|group)["']?:[ \t]*["']?([\w.:+-]+)["']?[ \t\r]*(?:\#.*)?$""", re.M
)
# a tag of YAML: the harness imports what it names; also the key that keeps all of a file
FUNCTIONS = "!function"
FILES = "!include"  # the key that keeps the paths of a file and of all that it includes
FORMATS = ("json", "parquet", "csv")  # dataset_path of local files
# Of generation_kwargs, by the harness's order
ANSWER_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SPLITS = ("test_split", "validation_split", "fewshot_split", "training_split")
# The metrics of a task that names none, by output_type (lm_eval.api.registry.DEFAULT_METRIC_REGISTRY).
DEFAULT_METRICS = {
    "loglikelihood": ["perplexity", "acc"],
    "loglikelihood_rolling": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    "multiple_choice": ["acc", "acc_norm"],
    "generate_until": ["exact_match"],
}
SHOWN = 80  # characters of a wrong value, in an error

TaskConfig = dict[str, Any]  # the fields of a task's YAML
Row = dict[str, Any]


class Metric(BaseModel):
    """An entry of `metric_list`."""

    metric: str  # a metric of the harness, or a function that computes it
    aggregation: str = "mean"
    higher_is_better: bool = True
    hf_evaluate: bool = False  # fetch it from the hub

    @property
    def name(self) -> str:
        """Its name in the results; those of a function's result, a dict, may be others (HumanEval's pass@1)."""
        name = self.metric.removeprefix(f"{FUNCTIONS} ").rpartition(".")[2]
        return "pass@1" if name == "pass_at_k" else name


class Extraction(BaseModel):
    """An entry of `filter_list`: a way in which an answer is extracted."""

    name: str


class Spec(BaseModel):
    """One task of the harness: the fields of its YAML that are read here, with `!function` tags as text."""

    name: str = Field(alias="task")
    path: Path  # of the YAML
    files: list[Path] = Field(alias=FILES)  # the YAML and what it includes
    functions: list[str] = Field([], alias=FUNCTIONS)  # of all these files
    class_name: Any = Field(None, alias="class")  # of a class in place of the harness's
    output_type: Literal[
        "loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until"
    ] = "generate_until"
    metric_list: list[Metric] | None = Field(None, min_length=1)
    filter_list: list[Extraction] | None = Field(None, min_length=1)
    unsafe_code: bool = False  # scoring runs what the model wrote
    num_fewshot: int | None = None
    fewshot_config: dict[str, Any] | None = None
    generation_kwargs: dict[str, Any] | None = None
    custom_dataset: Any = None  # a function that makes the data
    dataset_path: str | None = None
    dataset_kwargs: dict[str, Any] | None = None
    test_split: str | None = None
    validation_split: str | None = None
    fewshot_split: str | None = None
    training_split: str | None = None

    @property
    def metrics(self) -> list[str]:
        """Names of its metrics."""
        if self.metric_list is None:
            return DEFAULT_METRICS[self.output_type]
        return [metric.name for metric in self.metric_list]

    @property
    def filters(self) -> list[str]:
        """Names of the ways in which an answer is extracted; the first one counts unless the metric names another."""
        return [entry.name for entry in self.filter_list or ()] or ["none"]


def answer_tokens(generation_kwargs: Mapping[str, Any] | None) -> int:
    """Tokens of a task's longest answer, under any of the names that the harness takes; 256 without one, as there."""
    options = generation_kwargs or {}
    given = (options.get(name) for name in ANSWER_LENGTHS)
    return next((int(tokens) for tokens in given if tokens is not None), 256)


def task_error(problem: str, remedy: str = "") -> InputError:
    """An error about a task of the config."""
    return InputError(problem, field="evaluate.tasks", remedy=remedy)


@cache
def harness_folder() -> Path | None:
    """The folder of the tasks that the harness ships; None where it is not installed."""
    package = find_spec("lm_eval")
    return (Path(str(package.origin)).parent / "tasks").resolve() if package else None


def is_of_the_harness(path: Path) -> bool:
    """Whether the harness ships this YAML, which is trusted then."""
    root = harness_folder()
    return root is not None and path.resolve().is_relative_to(root)


@cache
def task_index() -> dict[str, Path]:
    """Name of a task or group -> its YAML, of all that the harness ships."""
    root = harness_folder()
    if root is None:
        raise task_error("lm-evaluation-harness is not installed", "install ptl's extra `evaluate`")
    # By a pattern: parsing 14,000 files takes far longer than reading them.
    paths: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        for name in NAME.findall(path.read_bytes()):
            paths.setdefault(name.decode(), path)
    return paths


def load_spec(path: Path, config: TaskConfig | None = None) -> Spec:
    """The task of a file, which may have been read. Raises InputError where it is not a single task of the harness."""
    config = read_yaml(path.resolve()) if config is None else config
    if not isinstance(config.get("task"), str):
        raise task_error(f"{path} has no `task: NAME`", "give a single task of lm-eval")
    try:
        return Spec.model_validate({**config, "path": path.resolve()})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise task_error(
            f"{path}: {field}: {str(first['input'])[:SHOWN]!r}: {first['msg']}"
        ) from error


class Loader(yaml.SafeLoader):
    """YAML with `!function` tags as text."""


Loader.add_constructor(FUNCTIONS, lambda _, node: f"{FUNCTIONS} {node.value}")


def read_yaml(path: Path, including: frozenset[Path] = frozenset()) -> TaskConfig:
    """A task's YAML with its includes, `!function` tags as text. Raises InputError where it cannot be read.

    All tags are under the key FUNCTIONS too: the harness imports a function also where a later field or the file that
    includes this one replaces it. The files are under FILES.
    """
    # Nor is a pipe read, which may never end.
    if path in including or not path.is_file():
        raise task_error(
            f"no task file {path}, or it includes itself",
            "correct the path: in a config it is relative to the config's folder, in an option to this one",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise task_error(f"{path} cannot be read: {error}") from error
    # The harness's own files are trusted, and some name a field twice.
    if is_of_the_harness(path):
        config = yaml.load(text, Loader=Loader)
    else:
        config = yaml_text.load(text, str(path), Loader, field="evaluate.tasks")
    if not isinstance(config, dict):
        raise task_error(f"{path} must hold a mapping, found {type(config).__name__}")
    functions = [
        f"{FUNCTIONS} {getattr(event, 'value', '')}"
        for event in yaml.parse(text, Loader=Loader)
        if getattr(event, "tag", None) == FUNCTIONS
    ]
    # Paths are relative to the file that includes them.
    included = config.pop("include", [])
    names = included if isinstance(included, list) else [included]
    if not all(isinstance(name, str) for name in names):
        raise task_error(f"{path}: include must be the path of a YAML file, or a list of them")
    merged: TaskConfig = {}
    files = [path]
    for name in names:
        inner = read_yaml((path.parent / name).resolve(), including | {path})
        functions += inner[FUNCTIONS]
        files += inner[FILES]
        merged |= inner
    # The including file wins; a function that it replaces is imported all the same.
    return {**merged, **config, FILES: files, FUNCTIONS: list(dict.fromkeys(functions))}


@dataclass(frozen=True)
class LocalFile:
    """The file of a benchmark's split, and how a row becomes one of the harness's (None: not in the split)."""

    file: str  # relative to `data_dir`, or absolute
    row: Callable[[Row], Row | None] = lambda row: row


def _math_row(row: Row) -> Row:
    # The harness takes the answer from the solution's last \boxed{}; MATH-500 as a plain list has only the answer.
    if "solution" in row:
        return row
    return {**row, "solution": f"\\boxed{{{row['answer']}}}"}


def _mbpp_row(row: Row) -> Row | None:
    # The authors' split (Austin et al. 2021): 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 training.
    return row if 11 <= int(row["task_id"]) <= 510 else None


GSM8K = {"train": LocalFile("gsm8k_train.jsonl"), "test": LocalFile("gsm8k_test.jsonl")}
HUMANEVAL = {"test": LocalFile("HumanEval.jsonl.gz")}
MBPP = {"test": LocalFile("mbpp.jsonl", _mbpp_row)}
# Files under the names by which the benchmarks are distributed; others: data_dir/<task>/<split>.jsonl
LOCAL: dict[str, dict[str, LocalFile]] = {
    "gsm8k": GSM8K,
    "gsm8k_perplexity": GSM8K,  # examples/smollm2
    "gsm8k_cot": GSM8K,
    "gsm8k_cot_zeroshot": GSM8K,
    "minerva_math500": {"test": LocalFile("math500.jsonl", _math_row)},
    "boxed_math500": {"test": LocalFile("math500.jsonl")},  # examples/math_suite
    "humaneval": HUMANEVAL,
    "humaneval_instruct": HUMANEVAL,
    "mbpp": MBPP,
    "mbpp_chat": MBPP,
    "mbpp_code": MBPP,
}


def local_splits(
    spec: Spec,
    data_dir: str | None,
    num_fewshot: int | None = None,  # none: what the task says
) -> dict[str, LocalFile]:
    """Split -> file, absolute, for a task that reads local files; {} where the task is to fetch its data itself.

    Local are tasks whose YAML names `data_files` (relative to its folder, to one above it or to the working directory),
    and every task once `data_dir` is given. Raises InputError that names a missing file which the task needs: that of
    the scored split, and that of the few-shot examples where they are not part of the task.
    """
    data_files = (spec.dataset_kwargs or {}).get("data_files")
    # The YAML has local files of its own.
    if data_files and spec.dataset_path in FORMATS and "://" not in str(data_files):
        # As in `datasets`, what names no split is for training.
        by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
        for split in _needed_splits(spec, num_fewshot) - by_split.keys():
            raise task_error(
                f"the task {spec.name!r} reads the split {split!r}, and its data_files has {', '.join(by_split)}",
                f"correct data_files, or which of {', '.join(SPLITS)} names it",
            )
        return {split: LocalFile(_data_file(spec, file)) for split, file in by_split.items()}
    # Nobody names files, or a function of the task makes its data.
    if data_dir is None or spec.custom_dataset is not None:
        return {}
    # Under the names of LOCAL, or by task and split.
    needed = _needed_splits(spec, num_fewshot)
    splits = {}
    for split in filter(None, (getattr(spec, field) for field in SPLITS)):
        local = LOCAL.get(spec.name, {}).get(split, LocalFile(f"{spec.name}/{split}.jsonl"))
        path = Path(data_dir, local.file)
        if path.is_file():
            splits[split] = LocalFile(str(path.resolve()), local.row)
        elif split in needed:
            raise InputError(
                f"{Path(data_dir)} has no {local.file}, which the task {spec.name!r} needs",
                field="evaluate.data_dir",
            )
    return splits


def _needed_splits(spec: Spec, num_fewshot: int | None) -> set[str]:
    """The scored split, and that of the few-shot examples where the task has no examples of its own."""
    scored = spec.test_split or spec.validation_split
    if not scored:
        raise task_error(f"the task {spec.name!r} names no test or validation split")
    # The split of the examples, as the harness chooses it.
    shots = spec.num_fewshot if num_fewshot is None else num_fewshot
    examples = spec.fewshot_split or spec.training_split or spec.validation_split
    # Some tasks write their examples down.
    own_examples = "samples" in (spec.fewshot_config or {})
    return {scored, examples} if shots and examples and not own_examples else {scored}


def _data_file(spec: Spec, named: Any) -> str:
    """A path of a task's YAML, relative to its folder, to one above it, or else to the working directory."""
    files = named if isinstance(named, list) else [named]
    if len(files) != 1:
        raise task_error(
            f"the task {spec.name!r} has {len(files)} files of one split in its data_files",
            "join them into one",
        )
    file = str(files[0])
    for folder in (*spec.path.parents, Path()):
        if (folder / file).is_file():
            return str((folder / file).resolve())
    neither = f"which is neither in the working directory nor in a folder above {spec.path}"
    raise task_error(f"the task {spec.name!r} reads {file}, {neither}")


def read_splits(splits: dict[str, LocalFile]) -> dict[str, Any]:
    """Split -> datasets.Dataset, from JSONL (also gzipped), Parquet or CSV. Raises InputError that names a bad line."""
    from datasets import Dataset

    data_sets = {}
    for split, local in splits.items():
        if local.file.endswith(".parquet"):
            raw = Dataset.from_parquet(local.file)
        elif local.file.endswith(".csv"):
            raw = Dataset.from_csv(local.file)
        else:
            raw = read_json_lines(Path(local.file), "evaluate.data_dir", local.file)
        # None: a row of another split of the same file.
        rows = [row for row in map(local.row, raw) if row is not None]
        if not rows:
            raise InputError(
                f"{local.file} has no row of the split {split!r}", field="evaluate.data_dir"
            )
        data_sets[split] = Dataset.from_list(rows)
    return data_sets
