"""What the page of a pipeline run shows in MLflow: parameters, commit and data sets first, the result at the end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.config.recover import DataSource, TrainingData
from ptl.config.run import Calibration, Evaluate, Task
from ptl.data.sources import local_file
from ptl.evaluation import task_data, tasks
from ptl.lineage import mlflow_client, mlflow_values
from ptl.lineage.run_status import RESULT, TAG, StepRun
from ptl.storage.manifest import file_digest

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

    from ptl.report.result import Result

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
    named = [_data_set("calibration", calibration.data)]
    named += [_data_set("training", source) for source in training.sources]
    named += [_data_set("decontamination", source) for source in training.decontaminate.against]
    for task in evaluate.tasks:
        named += _benchmark(task, evaluate)
    return list(dict.fromkeys(named))


def _data_set(context: str, source: DataSource) -> DataSet:
    address, path = source.source, local_file(source)
    if path is not None:
        kind = "s3" if address.startswith("s3://") else "local"
        return DataSet(context, Path(address).name, file_digest(path)[:DIGITS], kind, address)
    # On the hub the revision stands for the content.
    name = _joined(address, source.subset, source.split)
    return DataSet(context, address, (source.revision or UNPINNED)[:DIGITS], "hf", name)


def _benchmark(task: Task, settings: Evaluate) -> Iterator[DataSet]:
    """The scored split of a task, or of each member of a group; nothing where the harness is not installed."""
    for spec in tasks.find(task.name) if tasks.can_find(task.name) else ():
        splits = task_data.local_splits(spec, settings.data_dir, task.num_fewshot)
        if spec.scored_split in splits:
            file = splits[spec.scored_split].file
            yield DataSet("evaluation", spec.name, file_digest(Path(file))[:DIGITS], "local", file)
        elif spec.config.get("dataset_path"):
            name = _joined(spec.config["dataset_path"], spec.config.get("dataset_name"), spec.scored_split)
            yield DataSet("evaluation", spec.name, UNPINNED, "hf", name)


def _joined(*parts: str | None) -> str:
    """The parts of a hub id that are set, such as `org/chats test`."""
    return " ".join(filter(None, parts))


def describe(run: StepRun, params: dict[str, Any], revision: str = "", data: Sequence[DataSet] = ()) -> None:
    """Give the pipeline run parameters (`ptl.<name>`), the commit and data sets. What it has already stays as it is."""
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    with mlflow_client.connected() as client:
        parent = client.get_run(run.parent_run_id)
        mlflow_values.add_params(client, parent, params)
        if revision and MLFLOW_GIT_COMMIT not in parent.data.tags:
            client.set_tag(run.parent_run_id, MLFLOW_GIT_COMMIT, revision)
        # MLflow keeps one entry for a name and digest: its contexts are listed there.
        grouped: dict[tuple[str, str], list[DataSet]] = defaultdict(list)
        for data_set in data:
            grouped[data_set.name, data_set.digest].append(data_set)
        # An earlier attempt may have logged them.
        for entry in parent.inputs.dataset_inputs if parent.inputs else []:
            grouped.pop((entry.dataset.name, entry.dataset.digest), None)
        if grouped:
            client.log_inputs(run.parent_run_id, datasets=[_dataset_input(same) for same in grouped.values()])


def _dataset_input(same: list[DataSet]) -> DatasetInput:
    """MLflow's entry for data sets of one name and digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    first = same[0]
    # As MLflow's own sources of these kinds are written.
    source = json.dumps({"path" if first.kind == "hf" else "uri": first.source})
    contexts = InputTag(MLFLOW_DATASET_CONTEXT, ", ".join(data_set.context for data_set in same))
    return DatasetInput(Dataset(first.name, first.digest, first.kind, source), [contexts])


def log_result(run: StepRun, metrics: dict[str, float], beginning: str = "") -> None:
    """Metrics of the pipeline run, such as `final/accuracy`, and the beginning of its report, for its description.

    Calling it again changes nothing.
    """
    with mlflow_client.connected() as client:
        mlflow_values.add_metrics(client, client.get_run(run.parent_run_id), metrics)
        if beginning:
            client.set_tag(run.parent_run_id, RESULT, beginning[:TAG])


def result_metrics(result: Result) -> dict[str, float]:
    """The final model in numbers: its score, what was removed, and p beside the dense one."""
    metrics = {"final/removed": result.final.share_removed}
    # It has no score of its own where the run ended with another checkpoint than it scored.
    if result.final_row is not None:
        metrics["final/accuracy"] = result.final_row.accuracy
    pair = result.pair("dense")
    return metrics | {"final/p": pair.p_different} if pair else metrics
