"""What the page of a pipeline run shows in MLflow: parameters, commit and data sets first, the result at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.config.recover import DataSource, TrainingData
from ptl.config.run import Calibration
from ptl.data.sources import local_file
from ptl.lineage import mlflow_client, mlflow_objects
from ptl.lineage.run_status import RESULT, TAG, StepRun
from ptl.storage.manifest import file_digest

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

    from ptl.report.result import Result

UNPINNED = "unpinned"  # digest of a data set on the hub without a revision: its content may change
DIGITS = 32  # of a digest; MLflow takes at most 36


@dataclass
class DataSet:
    """One data set as MLflow shows it."""

    name: str  # of the file, or the id on the hub
    digest: str  # of the file, or the revision on the hub
    kind: str  # local, s3 or hf
    source: str  # path, URI or id
    contexts: list[str]  # calibration, training, decontamination


def data_sets(calibration: Calibration, training: TrainingData) -> list[DataSet]:
    """Every data set of a run; MLflow keeps one entry for a name and digest."""
    sources = [("calibration", calibration.data)]
    sources += [("training", source) for source in training.sources]
    sources += [("decontamination", source) for source in training.decontaminate.against]
    named: dict[tuple[str, str], DataSet] = {}
    for context, source in sources:
        data_set = _data_set(source)
        data_set = named.setdefault((data_set.name, data_set.digest), data_set)
        if context not in data_set.contexts:
            data_set.contexts.append(context)
    return list(named.values())


def _data_set(source: DataSource) -> DataSet:
    path = local_file(source)
    if path is None:
        # On the hub the revision stands for the content.
        return DataSet(
            source.source,
            (source.revision or UNPINNED)[:DIGITS],
            "hf",
            source.source,
            [],
        )
    kind = "s3" if source.source.startswith("s3://") else "local"
    return DataSet(
        Path(source.source).name,
        file_digest(path)[:DIGITS],
        kind,
        source.source,
        [],
    )


def describe(run: StepRun, params: dict[str, Any], revision: str = "", data: Sequence[DataSet] = ()) -> None:
    """Give the pipeline run parameters (`ptl.<name>`), the commit and data sets. What it has already stays as it is."""
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    with mlflow_client.connected() as client:
        parent = client.get_run(run.parent_run_id)
        mlflow_objects.add_params(client, parent, params)
        if revision and MLFLOW_GIT_COMMIT not in parent.data.tags:
            client.set_tag(run.parent_run_id, MLFLOW_GIT_COMMIT, revision)
        # An earlier attempt may have logged them.
        inputs = parent.inputs.dataset_inputs if parent.inputs else []
        logged = [(entry.dataset.name, entry.dataset.digest) for entry in inputs]
        new = [_dataset_input(data_set) for data_set in data if (data_set.name, data_set.digest) not in logged]
        if new:
            client.log_inputs(run.parent_run_id, datasets=new)


def _dataset_input(data_set: DataSet) -> DatasetInput:
    """MLflow's entry for a data set."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    # As MLflow's own sources of these kinds are written.
    source = json.dumps({"path" if data_set.kind == "hf" else "uri": data_set.source})
    contexts = InputTag(MLFLOW_DATASET_CONTEXT, ", ".join(data_set.contexts))
    return DatasetInput(Dataset(data_set.name, data_set.digest, data_set.kind, source), [contexts])


def log_result(run: StepRun, metrics: dict[str, float], beginning: str = "") -> None:
    """Metrics of the pipeline run, such as `final/accuracy`, and the beginning of its report, for its description.

    Calling it again changes nothing.
    """
    with mlflow_client.connected() as client:
        mlflow_objects.add_metrics(client, client.get_run(run.parent_run_id), metrics)
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
