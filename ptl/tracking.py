"""What MLflow shows of a run: a parent, a child per step, a LoggedModel per checkpoint, versions and aliases."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl import address, mlflow_database, mlflow_objects, store
from ptl.errors import InputError, WorkError
from ptl.log import say
from ptl.run_status import TAG, StepRun, node, settle, steps_of, tags_of_parent, untag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

# MLflow's default of 7 retries takes four minutes; 6 outlast a restart of the server (sleeps of 0, 4, 8, 16, 32, 64 s).
RETRIES = "6"
REPORTING = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # 12 s of sleep
BATCH = 100  # parameters that MLflow takes in one request
LONGEST = 6000  # characters of a parameter


def pipeline_run() -> str:
    """The pipeline run's id: `PTL_RUN_ID` (local) or `KFP_RUN_ID` (cluster). Raises InputError when neither is set."""
    run = os.environ.get("PTL_RUN_ID") or os.environ.get("KFP_RUN_ID")
    if not run:
        raise InputError(
            "environment: neither PTL_RUN_ID nor KFP_RUN_ID is set; start steps with `ptl run`, or set one"
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
    with explained():
        client = connect()
        own = {"ptl.run": run, "ptl.step": step, "ptl.arm": arm, "ptl.iteration": str(iteration), "ptl.node": node()}
        given = _plugin_run()
        if given:
            found, root, parent, child = _resume(client, given, run, own)
        else:
            found = mlflow_objects.experiment(client, experiment, artifact_location)
            root = found.artifact_location.rstrip("/") + "/ptl"
            parent = mlflow_objects.run(client, found.experiment_id, root, run, "", tags_of_parent(run), title or run)
            if title and parent.info.run_name == run:  # made by a doctor that failed
                client.update_run(parent.info.run_id, name=title)
            tags = {**own, "mlflow.parentRunId": parent.info.run_id}
            child = mlflow_objects.run(client, found.experiment_id, root, run, step, tags, step)
        if child.info.status != "RUNNING":
            client.update_run(child.info.run_id, status="RUNNING")
        if child.data.tags.get("ptl.node") != node():  # an earlier attempt ran elsewhere
            client.set_tag(child.info.run_id, "ptl.node", node())
        ids = (child.info.run_id, parent.info.run_id, found.experiment_id)
        step_run = StepRun(*ids, root, run, child.info.artifact_uri, step, arm)
        settle(client, step_run)
        return step_run


def new_model(step_run: StepRun, name: str, params: dict[str, Any], tags: dict[str, Any]) -> tuple[str, str]:
    """A LoggedModel in state PENDING, named by pipeline run and `name`: its id, and a fresh location for the files."""
    with explained():
        client = connect()
        run_name = client.get_run(step_run.parent_run_id).info.run_name
        model = mlflow_objects.logged_model(
            client,
            step_run.experiment_id,
            name=re.sub(r"[/:.%\"']", "-", f"{run_name}-{name}"),  # MLflow allows none of these
            source_run_id=step_run.run_id,
            tags={_own(key): str(value) for key, value in {**tags, "run": step_run.run}.items()},
            params={_own(key): str(value) for key, value in params.items()},
            model_type="ptl",
        )
        return model.model_id, model.artifact_location


def log_metrics(step_run: StepRun, metrics: dict[str, float], step: int) -> None:
    """Metrics while a step works; `step` is the x-coordinate."""
    with explained():
        _log_metrics(connect(), step_run.run_id, metrics, step)


def finish(
    step_run: StepRun,
    *,
    params: dict[str, Any],
    metrics: dict[str, float],
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

    with explained():
        client, run_id = connect(), step_run.run_id
        models = [*inputs, output] if output else inputs
        existing = mlflow_objects.existing_models(client, models)
        if lost := sorted(set(models) - set(existing)):
            say(step_run.step, f"warning: MLflow has lost {', '.join(lost)}: left out of the lineage of this run")
        inputs, output = [each for each in inputs if each in existing], output if output in existing else None
        run = client.get_run(run_id)
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")  # lineage can only be logged while it runs
        for key, before, now in add_params(client, run, params):
            log.warning("%s: %s was %s in an earlier attempt, now %s", step_run.step, key, before, now)
        add_metrics(client, run, metrics, step, output or (inputs[0] if len(inputs) == 1 else None))
        had = {model.model_id for model in (run.inputs.model_inputs if run.inputs else [])}
        new_inputs = [LoggedModelInput(each) for each in dict.fromkeys(inputs) if each not in had]
        if new_inputs:
            client.log_inputs(run_id, models=new_inputs)
        if output:
            mlflow_objects.log_output(client, run_id, output, step)
            client.finalize_logged_model(output, "READY")
        _abandon(client, step_run)
        if "ptl.error" in run.data.tags:  # of an earlier attempt
            untag(client, run_id, "ptl.error")
        client.set_terminated(run_id, "FINISHED")
        settle(client, step_run)


def tag(step_run: StepRun, values: dict[str, Any]) -> None:
    """Set tags `ptl.<name>` of a step's run."""
    with explained():
        for key, value in values.items():
            connect().set_tag(step_run.run_id, _own(key), str(value))


def note_error(step_run: StepRun, message: str) -> None:
    """Keep why an attempt failed, as tag `ptl.error`; another attempt may follow. It never hides the error itself."""
    try:
        with briefly(), explained():
            connect().set_tag(step_run.run_id, "ptl.error", message[:TAG])
    except Exception as error:
        say(step_run.step, f"warning: the failure could not be recorded: {error}")


def error_of(step_run: StepRun) -> str:
    """Why the last attempt of a step failed, as far as it could tell."""
    with explained():
        return str(connect().get_run(step_run.run_id).data.tags.get("ptl.error", ""))


def fail(step_run: StepRun, message: str) -> None:
    """Mark a step as failed for good, with the message as tag `ptl.error`; a retry reopens it.

    A step of the loop fails its pipeline run too, whose page then tells which step and why.
    """
    with explained():
        client = connect()
        client.set_tag(step_run.run_id, "ptl.error", message[:TAG])
        _abandon(client, step_run)
        client.set_terminated(step_run.run_id, "FAILED")
        settle(client, step_run)


def computing_beside(step_run: StepRun) -> list[str]:
    """Names of the run's other steps that are at work on the same node now."""
    with explained():
        runs = steps_of(connect(), step_run)
    here = [run for run in runs if run.info.status == "RUNNING" and run.data.tags.get("ptl.node") == node()]
    return [name for run in here if (name := run.data.tags["ptl.step"]) != step_run.step]


def register(step_run: StepRun, registered_model: str, pointer: store.Pointer, tags: dict[str, Any]) -> str:
    """The version of a checkpoint in the registry: found by its model id, else created.

    Its tags say where its score and its items are: run, step and root of the evaluate step that registers it.
    """
    scored = {"run": step_run.run, "step": step_run.step, "root": step_run.root}
    own = {**scored, **tags, "model_id": pointer.model_id, "digest": pointer.digest, "params": pointer.params}
    with explained():
        return mlflow_objects.version(
            connect(),
            registered_model,
            pointer.model_id,
            source=pointer.uri,
            run_id=pointer.run_id or step_run.run_id,
            tags={_own(key): str(value) for key, value in own.items()},
        )


def set_alias(registered_model: str, alias: str, version: str) -> None:
    """Point an alias (`best`, `smallest`) at a version."""
    with explained():
        connect().set_registered_model_alias(registered_model, alias, version)


def log_progress(
    step_run: StepRun, params: int, accuracy: float, *, low: float | None = None, high: float | None = None
) -> None:
    """Accuracy against size, on the parent run: the number of parameters is the x-coordinate of the chart."""
    prefix = "by_params/" if step_run.arm == "loop" else f"by_params/{step_run.arm}_"
    values = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    with explained():
        client = connect()
        for name, value in ((name, value) for name, value in values.items() if value is not None):
            logged = client.get_metric_history(step_run.parent_run_id, prefix + name)
            if (params, value) not in {(point.step, point.value) for point in logged}:
                _log_metrics(client, step_run.parent_run_id, {prefix + name: value}, params)


def log_report(step_run: StepRun, files: list[Path]) -> None:
    """Attach files to the parent run, under `report/`."""
    with explained():
        for file in files:
            connect().log_artifact(step_run.parent_run_id, str(file), "report")


def links(step_run: StepRun) -> dict[str, str]:
    """Where a report finds the pipeline run in MLflow; `mlflow_url` is empty when tracking is not on a server."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return {
        "run_id": step_run.run,
        "mlflow_run_id": step_run.parent_run_id,
        "experiment_id": step_run.experiment_id,
        "mlflow_url": address.bare(uri).rstrip("/") if address.is_server(uri) else "",
    }


def connect() -> MlflowClient:
    """Checked settings first: without them mlflow falls back to a database of its own, or fails in confusing ways."""
    address.split_login()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError("environment: MLFLOW_TRACKING_URI is not set; set it to your MLflow server's address")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if not address.is_server(uri) and importlib.util.find_spec("sqlalchemy") is None:
        raise InputError(
            f"environment: MLFLOW_TRACKING_URI={uri} needs the full mlflow package, here is mlflow-skinny: "
            "pip install 'ptl[pipelines]', or give the address of a server (http://...)"
        )
    mlflow_database.create(uri, os.environ.get("PTL_ARTIFACT_ROOT", "mlruns"))  # mlruns: MLflow's own default
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


@contextmanager
def briefly() -> Iterator[None]:
    """Give up on a server sooner, where a failure is reported: the failure itself must not wait for minutes."""
    before = {name: os.environ.get(name) for name in REPORTING}
    ours = [name for name, value in before.items() if value in (None, RETRIES)]  # not what a user has set
    os.environ.update({name: REPORTING[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name)
        os.environ.update({name: value for name in ours if (value := before[name]) is not None})


@contextmanager
def explained() -> Iterator[None]:
    """MLflow's own errors become one WorkError that names the server."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        raise WorkError(f"MLflow at {uri}: {error}; is the server up and is the address right?") from error


def _own(key: str) -> str:
    return key if key.startswith("ptl.") else f"ptl.{key}"


def _plugin_run() -> str | None:
    """The MLflow run that Kubeflow's MLflow plugin made for this task; a run id that a shell has set is not meant."""
    on_cluster = os.environ.get("KFP_RUN_ID") and not os.environ.get("PTL_RUN_ID")
    return os.environ.get("MLFLOW_RUN_ID") if on_cluster else None


def _resume(client: MlflowClient, given: str, run: str, tags: dict[str, str]) -> tuple[Any, str, Run, Run]:
    """The plugin's runs, marked as ours: its experiment, the root there, the pipeline run's parent, the step's run."""
    child = client.get_run(given)
    found = client.get_experiment(child.info.experiment_id)
    root = found.artifact_location.rstrip("/") + "/ptl"
    above = child.data.tags.get("mlflow.parentRunId")
    own = tags_of_parent(run)
    if above:
        parent = client.get_run(above)
    else:
        parent = mlflow_objects.run(client, found.experiment_id, root, run, "", own, run)
    marks = {given: {**tags, "ptl.role": "step"}, parent.info.run_id: {**own, "ptl.role": "parent"}}
    if not above:
        marks[given]["mlflow.parentRunId"] = parent.info.run_id
    for run_id, entries in marks.items():
        for key, value in entries.items():
            client.set_tag(run_id, key, value)
    return found, root, parent, child


def add_params(client: MlflowClient, run: Run, params: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Give a run the parameters `ptl.<name>` that it has not yet; returns name, old and new value of changed ones.

    MLflow never changes a parameter: what was logged first stays.
    """
    from mlflow.entities import Param

    known = run.data.params
    wanted = {_own(key): str(value)[:LONGEST] for key, value in params.items()}
    new = [Param(key, value) for key, value in wanted.items() if key not in known]
    for start in range(0, len(new), BATCH):
        client.log_batch(run.info.run_id, params=new[start : start + BATCH])
    return [(key, known[key], value) for key, value in wanted.items() if known.get(key, value) != value]


def add_metrics(
    client: MlflowClient, run: Run, metrics: dict[str, float], step: int = 0, model_id: str | None = None
) -> None:
    """Log the metrics whose newest value is another; of a run as it was read."""
    changed = {key: value for key, value in metrics.items() if run.data.metrics.get(key) != float(value)}
    _log_metrics(client, run.info.run_id, changed, step, model_id)


def _log_metrics(
    client: MlflowClient, run_id: str, metrics: dict[str, float], step: int, model_id: str | None = None
) -> None:
    from mlflow.entities import Metric

    if metrics:
        now = int(time.time() * 1000)
        points = [Metric(key, float(value), now, step, model_id=model_id) for key, value in metrics.items()]
        client.log_batch(run_id, metrics=points)


def _abandon(client: MlflowClient, step_run: StepRun) -> None:
    """Models that earlier, killed attempts of this step left PENDING are marked FAILED."""
    where = f"source_run_id = '{step_run.run_id}'"
    for model in client.search_logged_models([step_run.experiment_id], where):
        if str(model.status) == "PENDING":  # the server cannot filter by status
            client.finalize_logged_model(model.model_id, "FAILED")
