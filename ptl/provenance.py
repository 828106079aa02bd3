"""What a run was made from, beside its model: the commit of this package, and the data sets with their digests."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptl import task_data, tasks
from ptl.config import Calibration, DataSource, Evaluate, Task, TrainingData
from ptl.sources import local_file

UNPINNED = "unpinned"  # digest of a data set on the hub without a revision: its content may change
DIGITS = 32  # of a digest; MLflow takes at most 36


@dataclass(frozen=True)
class DataSet:
    """One data set as MLflow shows it."""

    context: str  # training, calibration, evaluation or decontamination
    name: str
    digest: str
    kind: str  # local, s3 or hf
    source: str  # path, URI or id, with the subset and split of a hub id


def revision() -> str:
    """The commit of this package: an image says it, else its checkout. Empty where neither knows."""
    return os.environ.get("PTL_REVISION", "").removeprefix("unknown") or revision_of(Path(__file__).parents[1])


def revision_of(root: Path) -> str:
    """The commit of a checkout, with `-dirty` where files differ from it; empty where `root` is not the top of one."""
    if not (root / ".git").exists():  # a repository that merely contains an installed package is not meant
        return ""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def data_sets(calibration: Calibration, training: TrainingData, evaluate: Evaluate) -> list[DataSet]:
    """Every data set of a run, in the order of its config; each context and source once."""
    named = [("calibration", calibration.data)]
    named += [("training", source) for source in training.sources]
    named += [("decontamination", source) for source in training.decontaminate.against]
    found = [_data_set(context, source) for context, source in named]
    found += [each for task in evaluate.tasks for each in _benchmark(task, evaluate)]
    return list(dict.fromkeys(found))


def _data_set(context: str, source: DataSource) -> DataSet:
    path = local_file(source)
    if path is not None:
        kind = "s3" if source.source.startswith("s3://") else "local"
        return DataSet(context, Path(source.source).name, digest_of(path), kind, source.source)
    parts = [part for part in (source.source, source.subset, source.split) if part]
    return DataSet(context, source.source, (source.revision or UNPINNED)[:DIGITS], "hf", " ".join(parts))


def _benchmark(task: Task, settings: Evaluate) -> Iterator[DataSet]:
    """The scored split of a task, or of each member of a group; nothing where the harness is not installed."""
    if not tasks.can_find(task.name):
        return
    for spec in tasks.find(task.name):
        scored = spec.config.get("test_split") or spec.config.get("validation_split") or ""
        local = task_data.local_splits(spec, settings.data_dir, task.num_fewshot).get(scored)
        if local is not None:
            yield DataSet("evaluation", spec.name, digest_of(Path(local.file)), "local", local.file)
        elif spec.config.get("dataset_path"):
            parts = [str(spec.config[key]) for key in ("dataset_path", "dataset_name") if spec.config.get(key)]
            yield DataSet("evaluation", spec.name, UNPINNED, "hf", " ".join([*parts, scored]).strip())


def digest_of(path: Path) -> str:
    """The first half of a file's sha256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
