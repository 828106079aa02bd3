"""The data sets that a run was made from, with their digests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptl.config.recover import DataSource, TrainingData
from ptl.config.run import Calibration, Evaluate, Task
from ptl.data.sources import local_file
from ptl.evaluation import task_data, tasks
from ptl.storage.manifest import file_digest

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
    # One data set may serve several purposes, but is named once for each.
    return list(dict.fromkeys(records))


def _data_set(context: str, source: DataSource) -> DataSet:
    address = source.source
    path = local_file(source)
    # A file, on this machine or fetched from a bucket.
    if path is not None:
        kind = "s3" if address.startswith("s3://") else "local"
        return DataSet(context, Path(address).name, file_digest(path)[:DIGITS], kind, address)
    # On the hub, where the revision stands for the content.
    digest = source.revision or UNPINNED
    full_name = _joined(address, source.subset, source.split)
    return DataSet(context, address, digest[:DIGITS], "hf", full_name)


def _benchmark(task: Task, settings: Evaluate) -> Iterator[DataSet]:
    """The scored split of a task, or of each member of a group; nothing where the harness is not installed."""
    if not tasks.can_find(task.name):
        return
    for spec in tasks.find(task.name):
        config = spec.config
        splits = task_data.local_splits(spec, settings.data_dir, task.num_fewshot)
        if spec.scored_split in splits:
            file = splits[spec.scored_split].file
            yield DataSet("evaluation", spec.name, file_digest(Path(file))[:DIGITS], "local", file)
        elif config.get("dataset_path"):
            full_name = _joined(config["dataset_path"], config.get("dataset_name"), spec.scored_split)
            yield DataSet("evaluation", spec.name, UNPINNED, "hf", full_name)


def _joined(*parts: str | None) -> str:
    """The parts of a hub id that are set, such as `org/chats test`."""
    return " ".join(filter(None, parts))
