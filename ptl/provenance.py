"""The data sets that a run was made from, with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptl import tasks
from ptl.config import Calibration, DataSource, Evaluate, Task, TrainingData
from ptl.sources import local_file

UNPINNED = "unpinned"  # digest of a data set on the hub without a revision: its content may change
DIGITS = 32  # of a digest; MLflow takes at most 36


@dataclass(frozen=True)
class DataSet:
    """One data set as MLflow shows it."""

    context: str  # training, calibration, evaluation or decontamination
    name: str  # of the file, or the id on the hub
    digest: str  # of the file, or the revision on the hub
    kind: str  # local, s3 or hf
    source: str  # path, URI or id, with the subset and split of a hub id


def data_sets(calibration: Calibration, training: TrainingData, evaluate: Evaluate) -> list[DataSet]:
    """Every data set of a run, in the order of its config, without repetitions of context and source."""
    records = [_data_set("calibration", calibration.data)]
    records += [_data_set("training", source) for source in training.sources]
    records += [_data_set("decontamination", source) for source in training.decontaminate.against]
    for task in evaluate.tasks:
        records += _benchmark(task, evaluate)
    return list(dict.fromkeys(records))


def _data_set(context: str, source: DataSource) -> DataSet:
    path = local_file(source)
    if path is not None:
        kind = "s3" if source.source.startswith("s3://") else "local"
        return DataSet(context, Path(source.source).name, _file_digest(path), kind, source.source)
    parts = [source.source, source.subset, source.split]
    digest = source.revision or UNPINNED
    return DataSet(context, source.source, digest[:DIGITS], "hf", _joined(parts))


def _benchmark(task: Task, settings: Evaluate) -> Iterator[DataSet]:
    """The scored split of a task, or of each member of a group; nothing where the harness is not installed."""
    if not tasks.can_find(task.name):
        return
    for spec in tasks.find(task.name):
        config = spec.config
        scored = config.get("test_split") or config.get("validation_split") or ""
        local = tasks.local_splits(spec, settings.data_dir, task.num_fewshot).get(scored)
        if local is not None:
            yield DataSet("evaluation", spec.name, _file_digest(Path(local.file)), "local", local.file)
        elif config.get("dataset_path"):
            parts = [config["dataset_path"], config.get("dataset_name"), scored]
            yield DataSet("evaluation", spec.name, UNPINNED, "hf", _joined(parts))


def _joined(parts: list[str | None]) -> str:
    """The parts of a hub id that are set, such as `org/chats test`."""
    return " ".join(str(part) for part in parts if part)


def _file_digest(path: Path) -> str:
    """The first half of a file's sha256, in hex."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return digest.hexdigest()[:DIGITS]
