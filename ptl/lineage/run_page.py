"""What the page of a pipeline run shows in MLflow: parameters, commit and data sets first, the result at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.config.data import DataSource, TrainingData
from ptl.config.run import Calibration
from ptl.lineage import mlflow_client, mlflow_objects
from ptl.lineage.run_status import RESULT, TAG, StepRun
from ptl.storage.manifest import file_digest

if TYPE_CHECKING:
    from mlflow.entities import Dataset, DatasetInput

UNPINNED = "unpinned"  # digest of a data set on the hub without a revision: its content may change
DIGITS = 32  # of a digest; MLflow takes at most 36


def data_sets(
    calibration: Calibration,
    training: TrainingData,
    local_file: Callable[[DataSource], Path | None],
) -> list[DatasetInput]:
    """Every data set of a run as MLflow shows it, with what it is for; `local_file` returns None for a hub id."""
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    uses = {
        "calibration": calibration.data,
        "training": training.sources,
        "decontamination": training.decontaminate.against,
    }
    found: dict[str, DatasetInput] = {}
    for use, sources in uses.items():
        for source in sources:
            data_set = _data_set(source, local_file(source))
            tag = InputTag(MLFLOW_DATASET_CONTEXT, use)
            if data_set.source in found:
                earlier = found[data_set.source].tags[0].value
                tag = InputTag(
                    MLFLOW_DATASET_CONTEXT, earlier if use in earlier else f"{earlier}, {use}"
                )
            found[data_set.source] = DatasetInput(data_set, [tag])
    return list(found.values())


def _data_set(source: DataSource, path: Path | None) -> Dataset:
    """Describe a file by its digest, or an id on the hub, where the revision stands for the content."""
    from mlflow.entities import Dataset

    # As MLflow's own sources of these kinds are written.
    if path is None:
        digest = source.revision or UNPINNED
        return Dataset(source.source, digest[:DIGITS], "hf", json.dumps({"path": source.source}))
    kind = "s3" if source.source.startswith("s3://") else "local"
    name = Path(source.source).name
    return Dataset(name, file_digest(path)[:DIGITS], kind, json.dumps({"uri": source.source}))


def describe(
    run: StepRun, params: dict[str, Any], revision: str = "", data: Sequence[DatasetInput] = ()
) -> None:
    """Give the pipeline run parameters (`ptl.<name>`), the commit and data sets. What it has already stays as it is."""
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    with mlflow_client.connected() as client:
        parent = client.get_run(run.parent_run_id)
        mlflow_objects.add_params(client, parent, params)
        if revision and MLFLOW_GIT_COMMIT not in parent.data.tags:
            client.set_tag(run.parent_run_id, MLFLOW_GIT_COMMIT, revision)
        if data:
            client.log_inputs(run.parent_run_id, datasets=list(data))


def log_result(run: StepRun, metrics: dict[str, float], beginning: str = "") -> None:
    """Metrics of the pipeline run, such as `final/accuracy`, and the beginning of its report, for its description.

    Calling it again changes nothing.
    """
    with mlflow_client.connected() as client:
        mlflow_objects.add_metrics(client, client.get_run(run.parent_run_id), metrics)
        if beginning:
            client.set_tag(run.parent_run_id, RESULT, beginning[:TAG])


def link_final_model(run: StepRun, model_id: str) -> None:
    """Let the page of the pipeline run list its final model and the versions of it; repeating it changes nothing."""
    with mlflow_client.connected() as client:
        if mlflow_objects.existing_models(client, [model_id]):
            mlflow_objects.log_output(client, run.parent_run_id, model_id, step=0)
