"""What MLflow shows of a run: a parent, a child for each step, a LoggedModel for each checkpoint, and the metrics."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ptl import address, processes
from ptl.errors import InputError
from ptl.lineage import mlflow_client, mlflow_objects
from ptl.lineage.mlflow_objects import Metrics, Tags, Values, ptl_keys, set_tags
from ptl.lineage.run_status import (
    TAG,
    StepRun,
    put_tag,
    records_root,
    settle,
    steps_of,
    tags_of_parent,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

# tag of a parent: ids of unfinished runs to take over from, the newest first
EARLIER_RUNS = "ptl.earlier_runs"


def pipeline_run() -> str:
    """The pipeline run's id: `PTL_RUN_ID` (local) or `KFP_RUN_ID` (cluster). Raises InputError when neither is set."""
    run = os.environ.get("PTL_RUN_ID") or os.environ.get("KFP_RUN_ID")
    if not run:
        raise InputError(
            "neither PTL_RUN_ID nor KFP_RUN_ID is set",
            field="environment",
            remedy="start steps with `ptl run`, or set one",
        )
    return run


def start(
    experiment: str,
    step: str,
    *,
    arm: str,
    iteration: int,
    artifact_location: str | None = None,
    title: str | None = None,
) -> StepRun:
    """Find or create the run of a step, reopened when it had ended, under the pipeline run's parent.

    `artifact_location` is where a new experiment keeps its files; None leaves it to the server. `title` is the name of
    a new parent; None: the pipeline run's id. Raises InputError for a missing setting, WorkError when the server does
    not answer.
    """
    run = pipeline_run()
    own = {"run": run, "role": "step", "step": step, "arm": arm, "iteration": iteration}
    tags = ptl_keys(own)
    with mlflow_client.connected() as client:
        # Kubeflow's MLflow plugin may have made a run, in an experiment that is not ours to choose; off a cluster a
        # run id that a shell has set is not meant.
        plugin_run_id = os.environ.get("MLFLOW_RUN_ID") if processes.on_a_cluster() else None
        if plugin_run_id:
            child = client.get_run(plugin_run_id)
            home = client.get_experiment(child.info.experiment_id)
            parent = _adopt(client, child, home, run, tags)
        else:
            home = mlflow_objects.experiment(client, experiment, artifact_location)
            parent = mlflow_objects.run(client, home, tags_of_parent(run), title or run)
            if title and parent.info.run_name == run:  # made by a doctor that failed
                client.update_run(parent.info.run_id, name=title)
            tags["mlflow.parentRunId"] = parent.info.run_id
            child = mlflow_objects.run(client, home, tags, step)
        if child.info.status != "RUNNING":
            client.update_run(child.info.run_id, status="RUNNING")
        step_run = StepRun(
            run_id=child.info.run_id,
            parent_run_id=parent.info.run_id,
            experiment_id=home.experiment_id,
            root=records_root(home.artifact_location),
            run=run,
            artifact_uri=child.info.artifact_uri,
            step=step,
            arm=arm,
            earlier=tuple(parent.data.tags.get(EARLIER_RUNS, "").split()),
        )
        settle(client, step_run)
        return step_run


def _adopt(client: MlflowClient, child: Run, experiment: Experiment, run: str, tags: Tags) -> Run:
    """Tag the step's run that the plugin has made, and its parent, by which other steps find it; returns the parent."""
    parent_id = child.data.tags.get("mlflow.parentRunId")
    if parent_id:
        parent = client.get_run(parent_id)
        set_tags(client, parent_id, tags_of_parent(run))
    else:
        parent = mlflow_objects.run(client, experiment, tags_of_parent(run), run)
    set_tags(client, child.info.run_id, tags | {"mlflow.parentRunId": parent.info.run_id})
    return parent


def new_model(step_run: StepRun, name: str, params: Values, tags: Values) -> tuple[str, str]:
    """A LoggedModel in state PENDING, named by pipeline run and `name`: its id, and a fresh location for the files."""
    with mlflow_client.connected() as client:
        parent = client.get_run(step_run.parent_run_id)
        # MLflow allows none of these characters.
        full_name = re.sub(r"[/:.%\"']", "-", f"{parent.info.run_name}-{name}")
        # A request that was sent twice makes two: the other one stays PENDING, as one of a killed attempt.
        model = client.create_logged_model(
            step_run.experiment_id,
            name=full_name,
            source_run_id=step_run.run_id,
            tags=ptl_keys({**tags, "run": step_run.run}),
            params=ptl_keys(params),
            model_type="ptl",
        )
        return model.model_id, model.artifact_location


def log_metrics(step_run: StepRun, metrics: Metrics, step: int) -> None:
    """Metrics while a step works; `step` is the x-coordinate."""
    with mlflow_client.connected() as client:
        mlflow_objects.log_metrics(client, step_run.run_id, metrics, step)


def finish(
    step_run: StepRun,
    *,
    params: Values,
    metrics: Metrics,
    inputs: list[str],
    output: str | None,
    step: int,
) -> None:
    """End a step: parameters, metrics and lineage. Calling it again changes nothing.

    `inputs` and `output` are ids of LoggedModels; metrics also appear on the page of the output, or of the only input.
    A parameter that an earlier attempt logged keeps its value, and a model that MLflow has lost is left out. The last
    step, `report`, ends the parent too.
    """
    from mlflow.entities import LoggedModelInput

    run_id = step_run.run_id
    with mlflow_client.connected() as client:
        existing = mlflow_objects.existing_models(client, [*inputs, *([output] if output else [])])
        inputs = [model for model in inputs if model in existing]
        output = output if output in existing else None
        run = client.get_run(run_id)
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")  # lineage can only be logged while it runs
        mlflow_objects.add_params(client, run, params)
        # The metrics belong to the model that was made, else to the one that was scored.
        scored = inputs[0] if output is None and len(inputs) == 1 else output
        mlflow_objects.add_metrics(client, run, metrics, step, scored)
        # Those that are not inputs of the run yet
        logged = run.inputs.model_inputs if run.inputs else []
        new = sorted(set(inputs) - {model.model_id for model in logged})
        if new:
            client.log_inputs(run_id, models=[LoggedModelInput(model) for model in new])
        if output:
            # READY last: until then the model counts as one of a killed attempt.
            mlflow_objects.log_output(client, run_id, output, step)
            client.finalize_logged_model(output, "READY")
        _end(client, step_run, "FINISHED", "")


def fail(step_run: StepRun, message: str) -> None:
    """Mark a step as failed for good, with the message as tag `ptl.error`; a retry reopens it.

    A step of the loop fails its pipeline run too, whose page then shows which step and why.
    """
    with mlflow_client.connected() as client:
        _end(client, step_run, "FAILED", message)


def _end(client: MlflowClient, step_run: StepRun, status: str, error: str) -> None:
    """End a step's run; models that earlier, killed attempts left PENDING are marked FAILED."""
    query = f"source_run_id = '{step_run.run_id}'"
    for model in client.search_logged_models([step_run.experiment_id], query):
        if str(model.status) == "PENDING":  # the server cannot filter by status
            client.finalize_logged_model(model.model_id, "FAILED")
    # The reason first: a watcher reads it as soon as the status changes.
    put_tag(client, step_run.run_id, "ptl.error", error[:TAG])
    client.set_terminated(step_run.run_id, status)
    settle(client, step_run)


def tag(step_run: StepRun, values: Values) -> None:
    """Set tags `ptl.<name>` of a step's run."""
    with mlflow_client.connected() as client:
        set_tags(client, step_run.run_id, ptl_keys(values))


def name_earlier_runs(step_run: StepRun, runs: list[str]) -> None:
    """Let the pipeline run's later steps take over from these runs."""
    with mlflow_client.connected() as client:
        client.set_tag(step_run.parent_run_id, EARLIER_RUNS, " ".join(runs))


def error_of(step_run: StepRun) -> str:
    """Why the last attempt of a step failed, as far as it could record it."""
    return errors_of(step_run, [step_run.step]).get(step_run.step, "")


def errors_of(step_run: StepRun, steps: Collection[str]) -> dict[str, str]:
    """Why the last attempts of these steps of the run failed, of those that did."""
    errors = {}
    with mlflow_client.connected() as client:
        runs = steps_of(client, step_run.experiment_id, step_run.run)
    for step, run in runs.items():
        error = run.data.tags.get("ptl.error")
        if error and step in steps:
            errors[step] = error
    return errors


def log_progress(
    step_run: StepRun,
    removed: int,
    accuracy: float,
    *,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Accuracy against the number of removed parameters, on the parent run.

    MLflow's tables show the value with the largest x-coordinate, which is the most pruned model's.
    """
    # The control has charts of its own: both arms end at the same size.
    arm = "" if step_run.arm == "loop" else f"{step_run.arm}_"
    values = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    points = {
        f"by_removed/{arm}{name}": value for name, value in values.items() if value is not None
    }
    # A point that an earlier attempt has logged is drawn in the same place.
    with mlflow_client.connected() as client:
        mlflow_objects.log_metrics(client, step_run.parent_run_id, points, removed)


def log_report(step_run: StepRun, files: list[Path]) -> None:
    """Attach files to the parent run, under `report/`."""
    with mlflow_client.connected() as client:
        for file in files:
            client.log_artifact(step_run.parent_run_id, str(file), "report")


def links(step_run: StepRun) -> dict[str, str]:
    """Where a report finds the pipeline run in MLflow; `mlflow_url` is empty when tracking is not on a server."""
    return {
        "run_id": step_run.run,
        "mlflow_run_id": step_run.parent_run_id,
        "experiment_id": step_run.experiment_id,
        "mlflow_url": address.mlflow_ui(),  # without a password: a report is handed around
    }
