"""A pipeline run that a user names: where it is in MLflow, its steps, and the files of its report.

A run is named by its id (of Kubeflow, or of a local run) or by its MLflow run id; `RUN:recover-2` is one of its steps.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError
from ptl.lineage import mlflow_client, mlflow_objects
from ptl.lineage.mlflow_client import if_there
from ptl.lineage.run_status import parent_among, records_root, steps_of
from ptl.storage import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORMS = "a run's directory, RUN_ID, RUN_ID:recover-2, models:/NAME@ALIAS, models:/NAME/VERSION, s3://... or file://..."


@dataclass(frozen=True)
class PipelineRun:
    """A run of the pipeline, as MLflow knows it."""

    id: str  # of Kubeflow, or of a local run
    experiment_id: str
    state: str  # of the MLflow run: RUNNING, FINISHED, FAILED, ...
    root: str  # where the records of its steps are
    artifacts: str  # where its report is


def find_run(reference: str) -> tuple[PipelineRun, str]:
    """The run and the step that a user names ("" for the run itself). Raises InputError where MLflow has none."""
    name, _, step = reference.partition(":")
    # Both become parts of addresses.
    for part in (name, step or name):
        if not store.is_name(part):
            problem = f"{reference!r} is neither a folder nor the name of a run"
            raise InputError(problem, field="run", remedy=f"give {FORMS}")
    with reading() as client:
        # It may be the id of an MLflow run, of the parent or of a step.
        if re.fullmatch("[0-9a-f]{32}", name):
            mlflow_run = if_there(client.get_run, name)
            tags = mlflow_run.data.tags if mlflow_run else {}
            if "ptl.run" in tags:
                name = tags["ptl.run"]
                step = step or tags.get("ptl.step", "")
        run = run_by_id(client, name)
    # Often the wrong MLflow was asked.
    if run is None:
        raise InputError(
            f"{reference!r} is neither a folder nor a run that this MLflow has",
            field="run",
            remedy=f"give {FORMS}, and look at MLFLOW_TRACKING_URI (or --home and --s3)",
        )
    return run, step


def run_by_id(client: MlflowClient, run_id: str) -> PipelineRun | None:
    """The pipeline run with this id, in whichever experiment it is: Kubeflow's MLflow plugin has one of its own."""
    parents = mlflow_objects.search(client, mlflow_client.experiment_ids(client), run_id, step="")
    if not parents:
        return None
    info = parent_among(parents).info
    experiment = client.get_experiment(info.experiment_id)
    return PipelineRun(
        id=run_id,
        experiment_id=info.experiment_id,
        state=info.status,
        root=records_root(experiment.artifact_location),
        artifacts=info.artifact_uri,
    )


def finished_steps(run: PipelineRun) -> list[str]:
    """The steps of a run that have finished, in the order in which they began."""
    return [step for step, state in _step_states(run).items() if state == "FINISHED"]


def _step_states(run: PipelineRun) -> dict[str, str]:
    """The steps of a run that have begun, in order, with the states of their MLflow runs."""
    with reading() as client:
        steps = steps_of(client, run.experiment_id, run.id)
    return {step: mlflow_run.info.status for step, mlflow_run in steps.items()}


def result_of(run: PipelineRun) -> dict[str, Any]:
    """The result.json of a run in MLflow. Raises InputError with the run's state and steps where there is none yet."""
    data = report_file(run, "result.json")
    if data is not None:
        return dict(json.loads(data))
    by_state: dict[str, list[str]] = defaultdict(list)
    for step, state in _step_states(run).items():
        by_state[state].append(step)
    progress = [f"{state}: {', '.join(steps)}" for state, steps in by_state.items()]
    states = "; ".join(progress) or "no step has begun"
    # A checkpoint of the run that can be fetched meanwhile.
    finished = filter(makes_model, by_state["FINISHED"])
    fetchable = ", ".join(f"{run.id}:{step}" for step in finished) or "none is finished"
    raise InputError(
        f"{run.id} has no result yet, its state is {run.state} ({states})",
        field="run",
        remedy=f"wait for its report, or name one step ({fetchable}) or a registered version (models:/NAME@ALIAS)",
    )


def makes_model(step: str) -> bool:
    """Whether a step's output is a checkpoint of its own, by the step's name."""
    return "evaluate" not in step and step != "report"


def report_file(run: PipelineRun, name: str) -> bytes | None:
    """A file of the run's report; None before there is one."""
    return store.read(f"{run.artifacts.rstrip('/')}/report/{name}")


@contextmanager
def reading() -> Iterator[MlflowClient]:
    """A client of the MLflow that the environment names; refused credentials are an InputError."""
    from mlflow.exceptions import MlflowException

    # Other errors of MLflow name the server.
    with mlflow_client.explained():
        try:
            yield mlflow_client.connect()
        except MlflowException as error:
            if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                raise
            raise InputError(
                f"MLflow does not accept these credentials ({error})",
                field="MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD",
                remedy="set them, or MLFLOW_TRACKING_TOKEN, to those of a user who may read the experiment",
            ) from error
