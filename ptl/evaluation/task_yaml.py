"""Task files of lm-evaluation-harness: a task's YAML with its includes, and the index of the tasks that it ships.

Nothing here imports lm_eval: the harness's own index reads 14,000 files for 6 seconds and more, and its reader imports
what a file names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

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

TaskConfig = dict[str, Any]  # the fields of a task's YAML


@dataclass(frozen=True)
class Spec:
    """One task of the harness: its YAML and what it says, with `!function` tags as text."""

    name: str  # in the harness, or in the user's file
    path: Path  # of the YAML
    config: TaskConfig  # with its includes

    @property
    def metrics(self) -> list[str]:
        """Names of its metrics. A function's result may be a dict, whose keys are metrics too (HumanEval's pass@1)."""
        entries = self.config.get("metric_list")
        if entries is None:
            return DEFAULT_METRICS[self.config.get("output_type", "generate_until")]
        return [metric_name(entry) for entry in entries]

    @property
    def filters(self) -> list[str]:
        """Names of the ways in which an answer is extracted; the first one counts unless the metric names another."""
        return [entry["name"] for entry in self.config.get("filter_list") or [{"name": "none"}]]

    @property
    def scored_split(self) -> str:
        """The split whose items are scored; empty where the YAML names none."""
        return self.config.get("test_split") or self.config.get("validation_split") or ""

    @property
    def files(self) -> set[Path]:
        """The YAML and what it includes; where these name functions, all Python beside them too."""
        files = {Path(path) for path in self.config[FILES]}
        if FUNCTIONS in self.config:
            files |= {module for path in files for module in path.parent.glob("*.py")}
        return files

    @property
    def splits(self) -> list[str]:
        """All splits that the YAML names, each once."""
        return list(dict.fromkeys(name for field in SPLITS if (name := self.config.get(field))))

    @property
    def runs_code(self) -> bool:
        """Whether scoring runs what the model wrote."""
        return bool(self.config.get("unsafe_code"))


def _error(problem: str, remedy: str = "") -> InputError:
    return InputError(problem, field="evaluate.tasks", remedy=remedy)


def metric_name(entry: dict[str, Any]) -> str:
    """The metric's name in the results, from its entry in metric_list."""
    name = str(entry["metric"]).removeprefix(f"{FUNCTIONS} ").rpartition(".")[2]
    return "pass@1" if name == "pass_at_k" else name


@cache
def harness_folder() -> Path | None:
    """The folder of the tasks that the harness ships; None where it is not installed."""
    package = find_spec("lm_eval")
    return Path(str(package.origin)).parent / "tasks" if package else None


def is_of_the_harness(path: Path) -> bool:
    """Whether the file is one that the harness ships."""
    root = harness_folder()
    return root is not None and path.resolve().is_relative_to(root.resolve())


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


def load_spec(path: Path) -> Spec:
    """The task of a user's own file. Raises InputError where it is not a single task of the harness."""
    if not path.is_file():
        raise _error(
            f"no task file {path}",
            "correct the path: in a config it is relative to the config's folder, in an option to this one",
        )
    config = read_yaml(path.resolve())
    if not isinstance(config.get("task"), str):
        raise _error(f"{path} has no `task: NAME`", "give a single task of lm-eval")
    # Only the first is reported.
    for problem in _wrong_fields(config):
        raise _error(f"{path} {problem}")
    return Spec(config["task"], path.resolve(), config)


def _wrong_fields(config: TaskConfig) -> Iterator[str]:
    """What is wrong with the fields of a task's YAML that we read: not what the harness takes there."""
    output_type = config.get("output_type", "generate_until")
    if not isinstance(output_type, str) or output_type not in DEFAULT_METRICS:
        yield f"has output_type={output_type!r}; it must be one of {', '.join(DEFAULT_METRICS)}"
    # The harness goes through both and takes the key from each entry.
    for field, key in (("metric_list", "metric"), ("filter_list", "name")):
        entries = config.get(field, [{key: ""}])
        named = isinstance(entries, list) and [
            isinstance(entry, dict) and type(entry.get(key)) is str for entry in entries
        ]
        if entries is not None and not (named and all(named)):
            yield f"must have a list in {field}, each entry with a `{key}`"
    # These may be null or left out.
    for fields, kind, name in (
        (("dataset_kwargs", "fewshot_config"), dict, "a mapping"),
        (SPLITS, str, "a split's name"),
    ):
        for field in fields:
            if not isinstance(config.get(field) or kind(), kind):
                yield f"must have {name} in {field}"


def read_yaml(path: Path, including: frozenset[Path] = frozenset()) -> TaskConfig:
    """A task's YAML with its includes, `!function` tags as text. Raises InputError where it cannot be read.

    All tags are under the key FUNCTIONS too: the harness imports a function also where a later field or the file that
    includes this one replaces it. The files are under FILES.
    """
    if path in including:
        raise _error(f"{path} includes itself")
    config, functions = _read_file(path)
    # Paths are relative to the file that includes them.
    included = config.pop("include", [])
    names = included if isinstance(included, list) else [included]
    if not all(isinstance(name, str) for name in names):
        raise _error(f"{path}: include must be the path of a YAML file, or a list of them")
    merged: TaskConfig = {}
    files = [str(path)]
    for name in names:
        inner = read_yaml((path.parent / name).resolve(), including | {path})
        functions += inner.pop(FUNCTIONS, ())
        files += inner[FILES]
        merged |= inner
    # The including file wins; a function that it replaces is imported all the same.
    merged |= {**config, FILES: files}
    if functions:
        merged[FUNCTIONS] = list(dict.fromkeys(functions))
    return merged


def _read_file(path: Path) -> tuple[TaskConfig, list[str]]:
    """One file without its includes, and the `!function` tags in it."""
    functions: list[str] = []

    # A class of its own: constructors belong to the class, and these note the tags of this file.
    class Loader(yaml.SafeLoader):
        pass

    def note_function(_loader: Any, node: yaml.Node) -> str:
        functions.append(f"{FUNCTIONS} {node.value}")
        return functions[-1]

    Loader.add_constructor(FUNCTIONS, note_function)
    # Nor is a pipe read, which may never end.
    if not path.is_file():
        raise _error(f"{path} is no file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"{path} cannot be read: {error}") from error
    # The harness's own files are trusted, and some name a field twice.
    if is_of_the_harness(path):
        config = yaml.load(text, Loader=Loader)
    else:
        config = yaml_text.load(text, f"evaluate.tasks: {path}", Loader)
    if not isinstance(config, dict):
        raise _error(f"{path} must hold a mapping, found {type(config).__name__}")
    return config, functions
