"""What the page of a pipeline run shows in MLflow: parameters, commit and data sets first, the result at the end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ptl import tracking
from ptl.provenance import DataSet
from ptl.run_status import StepRun

if TYPE_CHECKING:
    from mlflow import MlflowClient


def describe(run: StepRun, params: dict[str, Any], revision: str = "", data_sets: list[DataSet] | None = None) -> None:
    """Give the pipeline run parameters (`ptl.<name>`), the commit and data sets. What it has already stays as it is."""
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    with tracking.explained():
        client = tracking.connect()
        parent = client.get_run(run.parent_run_id)
        tracking.add_params(client, parent, params)
        if revision and MLFLOW_GIT_COMMIT not in parent.data.tags:
            client.set_tag(run.parent_run_id, MLFLOW_GIT_COMMIT, revision)
        _log_data_sets(client, parent, data_sets or [])


def _log_data_sets(client: MlflowClient, parent: Any, data_sets: list[DataSet]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    entries = parent.inputs.dataset_inputs if parent.inputs else []
    logged = {(each.dataset.name, each.dataset.digest) for each in entries}
    contexts: dict[DataSet, list[str]] = {}  # MLflow keeps one entry for each name and digest
    for each in data_sets:
        same = next((one for one in contexts if (one.name, one.digest) == (each.name, each.digest)), each)
        contexts.setdefault(same, []).append(each.context)
    inputs = []
    for each, used in contexts.items():
        if (each.name, each.digest) not in logged:
            source = json.dumps({"path" if each.kind == "hf" else "uri": each.source})
            tag = InputTag(MLFLOW_DATASET_CONTEXT, ", ".join(used))
            inputs.append(DatasetInput(Dataset(each.name, each.digest, each.kind, source), [tag]))
    if inputs:
        client.log_inputs(parent.info.run_id, datasets=inputs)


def log_result(run: StepRun, metrics: dict[str, float]) -> None:
    """Metrics of the whole run, such as `final/accuracy`. Calling it again changes nothing."""
    with tracking.explained():
        client = tracking.connect()
        tracking.add_metrics(client, client.get_run(run.parent_run_id), metrics)


def result_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The final model of a result.json in numbers: its score, what was removed, and p beside the dense one."""
    from ptl.result import final_row

    final = final_row(result)
    metrics = {"final/removed": result["final"]["share_removed"]}
    if final is not None:
        metrics["final/accuracy"] = final["accuracy"]
    if "dense" in result["paired"]:
        metrics["final/p"] = result["paired"]["dense"]["p_different"]
    return metrics
