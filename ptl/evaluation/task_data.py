"""Data of benchmarks from local files: which file holds a split, and its rows in the form that the harness expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.errors import InputError
from ptl.evaluation.task_yaml import SPLITS, Spec
from ptl.json_lines import read_json_lines

Row = dict[str, Any]


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


def local_splits(
    spec: Spec,
    data_dir: str | None,
    num_fewshot: int | None = None,  # none: what the task says
) -> dict[str, LocalFile]:
    """Split -> file, absolute, for a task that reads local files; {} where the task is to fetch its data itself.

    Local are tasks whose YAML names `data_files` (relative to the working directory or to a folder above the YAML),
    and every task once `data_dir` is given. Raises InputError that names a missing file which the task needs: that of
    the scored split, and that of the few-shot examples where they are not part of the task.
    """
    data_files = (spec.dataset_kwargs or {}).get("data_files")
    # The YAML has local files of its own.
    if spec.dataset_path == "json" and isinstance(data_files, dict):
        return {split: LocalFile(_data_file(spec, str(file))) for split, file in data_files.items()}
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
        raise InputError(f"the task {spec.name!r} names no test or validation split", field="evaluate.tasks")
    # The split of the examples, as the harness chooses it.
    shots = spec.num_fewshot if num_fewshot is None else num_fewshot
    examples = spec.fewshot_split or spec.training_split or spec.validation_split
    # Some tasks write their examples down.
    own_examples = "samples" in (spec.fewshot_config or {})
    return {scored, examples} if shots and examples and not own_examples else {scored}


def _data_file(spec: Spec, file: str) -> str:
    """A path of a task's YAML, relative to the working directory or to a folder above the YAML."""
    for folder in (Path(), *spec.path.parents):
        if (folder / file).is_file():
            return str((folder / file).resolve())
    neither = f"which is neither in the working directory nor in a folder above {spec.path}"
    raise InputError(f"the task {spec.name!r} reads {file}, {neither}", field="evaluate.tasks")


def read_splits(splits: dict[str, LocalFile]) -> dict[str, Any]:
    """Split -> datasets.Dataset, from JSONL (also gzipped) or Parquet. Raises InputError that names a bad line."""
    from datasets import Dataset

    data_sets = {}
    for split, local in splits.items():
        if local.file.endswith(".parquet"):
            raw = Dataset.from_parquet(local.file)
        else:
            raw = read_json_lines(Path(local.file), "evaluate.data_dir", local.file)
        # None: a row of another split of the same file.
        data_sets[split] = Dataset.from_list([row for row in map(local.row, raw) if row is not None])
    return data_sets
