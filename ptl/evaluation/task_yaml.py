"""Task files of lm-evaluation-harness: a task's YAML with its includes, and the index of the tasks that it ships.

Nothing here imports lm_eval: the harness's own index reads 14,000 files for 6 seconds and more, and its reader imports
what a file names.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from ptl.config import yaml_text
from ptl.errors import InputError

NAME = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]*["']?([\w.:+-]+)["']?[ \t\r]*(?:\#.*)?$""", re.M)
FUNCTIONS = "!function"  # a tag of YAML: the harness imports what it names; also the key that keeps all of a file
FILES = "!include"  # the key that keeps the paths of a file and of all that it includes
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
    output_type: Literal["loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until"] = (
        "generate_until"
    )
    metric_list: list[Metric] | None = None
    filter_list: list[Extraction] | None = None
    unsafe_code: bool = False  # scoring runs what the model wrote
    num_fewshot: int | None = None
    fewshot_config: dict[str, Any] | None = None
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

    @property
    def is_shipped(self) -> bool:
        """Whether it is one that the harness ships, which is trusted."""
        return _is_of_the_harness(self.path)


def _error(problem: str, remedy: str = "") -> InputError:
    return InputError(problem, field="evaluate.tasks", remedy=remedy)


@cache
def harness_folder() -> Path | None:
    """The folder of the tasks that the harness ships; None where it is not installed."""
    package = find_spec("lm_eval")
    return (Path(str(package.origin)).parent / "tasks").resolve() if package else None


def _is_of_the_harness(path: Path) -> bool:
    root = harness_folder()
    return root is not None and path.resolve().is_relative_to(root)


@cache
def task_index() -> dict[str, Path]:
    """Name of a task or group -> its YAML, of all that the harness ships."""
    root = harness_folder()
    if root is None:
        raise _error("lm-evaluation-harness is not installed", "install ptl's extra `evaluate`")
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
        raise _error(f"{path} has no `task: NAME`", "give a single task of lm-eval")
    try:
        return Spec.model_validate({**config, "path": path.resolve()})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise _error(f"{path}: {field}: {str(first['input'])[:SHOWN]!r}: {first['msg']}") from error


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
        raise _error(
            f"no task file {path}, or it includes itself",
            "correct the path: in a config it is relative to the config's folder, in an option to this one",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"{path} cannot be read: {error}") from error
    # The harness's own files are trusted, and some name a field twice.
    if _is_of_the_harness(path):
        config = yaml.load(text, Loader=Loader)
    else:
        config = yaml_text.load(text, str(path), Loader, field="evaluate.tasks")
    if not isinstance(config, dict):
        raise _error(f"{path} must hold a mapping, found {type(config).__name__}")
    functions = [
        f"{FUNCTIONS} {getattr(event, 'value', '')}"
        for event in yaml.parse(text, Loader=Loader)
        if getattr(event, "tag", None) == FUNCTIONS
    ]
    # Paths are relative to the file that includes them.
    included = config.pop("include", [])
    names = included if isinstance(included, list) else [included]
    if not all(isinstance(name, str) for name in names):
        raise _error(f"{path}: include must be the path of a YAML file, or a list of them")
    merged: TaskConfig = {}
    files = [path]
    for name in names:
        inner = read_yaml((path.parent / name).resolve(), including | {path})
        functions += inner[FUNCTIONS]
        files += inner[FILES]
        merged |= inner
    # The including file wins; a function that it replaces is imported all the same.
    return {**merged, **config, FILES: files, FUNCTIONS: list(dict.fromkeys(functions))}
