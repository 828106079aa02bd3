"""What the page of a pipeline run shows in MLflow: parameters, commit and data sets first, the result at the end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ptl.lineage import mlflow_client, mlflow_values
from ptl.lineage.run_status import RESULT, TAG, StepRun
from ptl.report import wording
from ptl.report.answer import answer
from ptl.report.provenance import DataSet
from ptl.report.result import Result, final_row

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run


def describe(
    run: StepRun,
    params: dict[str, Any],
    revision: str = "",
    data_sets: Sequence[DataSet] = (),
) -> None:
    """Give the pipeline run parameters (`ptl.<name>`), the commit and data sets. What it has already stays as it is."""
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    with mlflow_client.connected() as client:
        parent = client.get_run(run.parent_run_id)
        mlflow_values.add_params(client, parent, params)
        if revision and MLFLOW_GIT_COMMIT not in parent.data.tags:
            client.set_tag(run.parent_run_id, MLFLOW_GIT_COMMIT, revision)
        _log_data_sets(client, parent, data_sets)


def _log_data_sets(client: MlflowClient, parent: Run, data_sets: Sequence[DataSet]) -> None:
    """Data sets as inputs of the run, those that are not yet."""
    # MLflow keeps one entry for a name and digest: its contexts are listed there.
    grouped: dict[tuple[str, str], list[DataSet]] = defaultdict(list)
    for data_set in data_sets:
        grouped[data_set.name, data_set.digest].append(data_set)
    # An earlier attempt may have logged them.
    logged = parent.inputs.dataset_inputs if parent.inputs else []
    for entry in logged:
        grouped.pop((entry.dataset.name, entry.dataset.digest), None)
    if grouped:
        inputs = [_dataset_input(same) for same in grouped.values()]
        client.log_inputs(parent.info.run_id, datasets=inputs)


def _dataset_input(same: list[DataSet]) -> DatasetInput:
    """MLflow's entry for data sets of one name and digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    first = same[0]
    # As MLflow's own sources of these kinds are written.
    source = json.dumps({"path" if first.kind == "hf" else "uri": first.source})
    contexts = ", ".join(data_set.context for data_set in same)
    return DatasetInput(
        Dataset(first.name, first.digest, first.kind, source),
        [InputTag(MLFLOW_DATASET_CONTEXT, contexts)],
    )


def log_result(run: StepRun, metrics: dict[str, float], beginning: str = "") -> None:
    """Metrics of the pipeline run, such as `final/accuracy`, and the beginning of its report, for its description.

    Calling it again changes nothing.
    """
    with mlflow_client.connected() as client:
        mlflow_values.add_metrics(client, client.get_run(run.parent_run_id), metrics)
        if beginning:
            client.set_tag(run.parent_run_id, RESULT, beginning[:TAG])


def first_lines(result: Result) -> str:
    """How the report begins: whether the final model may be shipped, and by which scores."""
    return f"{answer(result).text}. {wording.verdict(result)}"


def result_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The final model of a result.json in numbers: its score, what was removed, and p beside the dense one."""
    final = final_row(result)
    metrics = {"final/removed": result["final"]["share_removed"]}
    # It has no score of its own where the run ended with another checkpoint than it scored.
    if final is not None:
        metrics["final/accuracy"] = final["accuracy"]
    pair = result["paired"].get("dense")
    if pair:
        metrics["final/p"] = pair["p_different"]
    return metrics
