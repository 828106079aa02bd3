"""Runs on a cluster: submit, watch, cancel, retry; each returns an exit code. Compiling never imports this."""

import datetime
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.prune_tune_loop.kfp_api import CONFLICT, Api, RefusedError, Server, call, connect
from ptl import __version__
from ptl.config import Config, Gate, check
from ptl.errors import InputError, WorkError

DONE, FAILED, GATE, TIMEOUT = 0, 1, 3, 4
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
OUTAGE = 600.0  # seconds without an answer after which a wait gives up; the run does not need us
STEP = re.compile(r"import-model|report|doctor|(evaluate|prune|recover)-\d+|control-(prune|recover|evaluate)")
Say = Callable[[str], None]


def submit(
    config: Config,
    server: Server,
    *,
    experiment: str | None = None,
    parameters: dict[str, Any] | None = None,
    version: str | None = None,
    service_account: str | None = None,
    wait: bool = False,
    timeout: float | None = None,
    poll: float = 15.0,
    say: Say = print,
) -> int:
    """Compile, upload as a version of the pipeline, start a run; with `wait` follow it to its end.

    `parameters` replace the run's parameters. Without `version` the version is named by the content, and a pipeline
    that was uploaded before is used again. Raises InputError for what the server refuses, WorkError when it fails.
    """
    from pipelines.prune_tune_loop import pipeline

    unknown = set(parameters or {}) - set(pipeline.parameters(config))
    if unknown:
        known = ", ".join(pipeline.parameters(config))
        raise InputError(f"--param: {', '.join(sorted(unknown))} is no parameter of the run; there are {known}")
    if "gate" in (parameters or {}):  # it decides the exit code
        config = config.model_copy(update={"gate": check(Gate, (parameters or {})["gate"], "--param gate")})
    api = connect(server)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        pipeline.compile_pipeline(config, path)
        pipeline_id = _pipeline(api, config.name)
        version_id = _upload(api, pipeline_id, path, version)
    group = call(api, api.client.create_experiment, experiment or config.storage.experiment, namespace=api.namespace)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{config.name}-{stamp}-{os.urandom(2).hex()}"
    run_id = _start(api, group.experiment_id, name, pipeline_id, version_id, parameters or {}, service_account)
    say(f"started run {name} ({run_id})")
    say(api.link(run_id))
    return watch(api, run_id, config, timeout, poll, say) if wait else DONE


def status(run_id: str, server: Server, *, say: Say = print) -> int:
    """Print the state of a run and of its steps. 1 when it failed or was canceled."""
    api = connect(server)
    run = call(api, api.client.get_run, run_id)
    for name, task in sorted(_steps(run).items(), key=lambda item: str(item[1].start_time or "9")):
        say(f"{name}: {task.state}{_reason(task)}")
    say(f"{run.display_name}: {run.state}  {api.link(run_id)}")
    return FAILED if run.state in ("FAILED", "CANCELED") else DONE


def cancel(run_id: str, server: Server, *, say: Say = print) -> int:
    """Ask Kubeflow to end a run; a run that has ended stays as it is."""
    api = connect(server)
    run = call(api, api.client.get_run, run_id)
    if run.state in ENDED:
        say(f"{run.display_name}: has ended before ({run.state})")
        return DONE
    call(api, api.client.terminate_run, run_id)
    say(f"{run.display_name}: asked to end; `ptl status {run_id}` shows when it has")
    return DONE


def retry(
    run_id: str,
    server: Server,
    *,
    config: Config | None = None,
    wait: bool = False,
    timeout: float | None = None,
    poll: float = 15.0,
    say: Say = print,
) -> int:
    """Run the failed steps of a run again, under the same id: what was finished is taken from the store."""
    api = connect(server)
    run = call(api, api.client.get_run, run_id)
    if run.state not in ("FAILED", "CANCELED"):
        raise InputError(f"run: {run_id} is {run.state}; only a run that failed or was canceled can be retried")
    call(api, api.client._run_api.run_service_retry_run, run_id)
    say(f"{run.display_name}: runs again  {api.link(run_id)}")
    # Until the server has taken the retry in, the state is still the old one.
    return watch(api, run_id, config, timeout, poll, say, ended_before=run.finished_at) if wait else DONE


def watch(
    api: Api,
    run_id: str,
    config: Config | None,
    timeout: float | None,
    poll: float,
    say: Say,
    ended_before: datetime.datetime | None = None,
) -> int:
    """Follow a run until it ends: 0 succeeded, 1 failed or canceled, 3 gate not passed, 4 out of time.

    kfp's own wait ignores CANCELED (kubeflow/pipelines#14473). A run that is out of time goes on. A server that is away
    for up to OUTAGE seconds, as in an upgrade, does not end the wait.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    shown: dict[str, str] = {}
    answered = time.monotonic()
    while True:
        try:
            run = call(api, api.client.get_run, run_id)
        except WorkError as error:
            now = time.monotonic()
            if now - answered > OUTAGE:
                raise
            if deadline is not None and now + poll > deadline:
                say(f"not seen to finish in {timeout:.0f} s, and Kubeflow does not answer: {error}")
                return TIMEOUT
            say(f"still waiting: {error}")
            time.sleep(poll)
            continue
        answered = time.monotonic()
        for name, task in _steps(run).items():
            if task.state and shown.get(name) != task.state:
                shown[name] = task.state
                say(f"{name}: {task.state}{_reason(task)}")
        if run.state in ENDED and (ended_before is None or run.finished_at != ended_before):
            return _outcome(run, config, say)
        if deadline is not None and time.monotonic() + poll > deadline:
            say(f"not finished after {timeout:.0f} s ({run.state}); it goes on: `ptl status {run_id}`")
            return TIMEOUT
        time.sleep(poll)


def _outcome(run: Any, config: Config | None, say: Say) -> int:
    if run.state != "SUCCEEDED":
        reason = f": {run.error.message}" if run.error and run.error.message else ""
        say(f"{run.display_name}: {run.state}{reason}; `ptl retry {run.run_id}` goes on from what is finished")
        return FAILED
    if config is None or not config.gate.enabled:
        say(f"{run.display_name}: SUCCEEDED")
        return DONE
    passed, why = gate_passed(result_of(run.run_id, config.storage.experiment))
    say(f"{run.display_name}: SUCCEEDED, gate {'passed' if passed else 'not passed'}: {why}")
    return DONE if passed else GATE


def result_of(run_id: str, experiment: str) -> dict[str, Any]:
    """A run's result.json, from its MLflow run. Raises WorkError: without it nobody knows whether the gate passed."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise WorkError(
            "the run succeeded, but MLFLOW_TRACKING_URI is not set here, so its gate cannot be read; set it (and the "
            "S3 credentials), or do without --wait"
        )
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient()
        found = client.get_experiment_by_name(experiment)
        where = f"tags.`ptl.run` = '{run_id}' and tags.`ptl.role` = 'parent'"
        runs = client.search_runs([found.experiment_id], where, max_results=1) if found else []
        if not runs:  # Kubeflow's MLflow plugin puts runs into an experiment of its own
            everywhere = [place.experiment_id for place in client.search_experiments()]
            runs = client.search_runs(everywhere, where, max_results=1)
        if not runs:
            raise WorkError(f"the run succeeded, but MLflow has no run {run_id}, in {experiment!r} or elsewhere")
        with tempfile.TemporaryDirectory() as folder:
            path = client.download_artifacts(runs[0].info.run_id, "report/result.json", folder)
            return dict(json.loads(Path(path).read_text()))
    except (MlflowException, OSError) as error:
        raise WorkError(f"the run succeeded, but its result.json cannot be read from MLflow: {error}") from error


def gate_passed(result: dict[str, Any]) -> tuple[bool, str]:
    """Whether the loop went on to its end: its last round was accepted."""
    rounds = [row for row in result["rows"] if row["arm"] == "loop" and row["iteration"] > 0]
    if not rounds:
        return False, "no round was scored"
    last = max(rounds, key=lambda row: row["iteration"])
    share = result["final"]["share_removed"]
    return last["verdict"] == "accepted", f"round {last['iteration']} {last['verdict']}, {share:.1%} removed"


def _pipeline(api: Api, name: str) -> str:
    """The id of the pipeline with this name, created when there is none. `kfp.Client` finds none of a namespace."""
    from kfp_server_api import V2beta1Pipeline

    def find() -> str | None:
        wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
        found = call(api, api.client.list_pipelines, filter=json.dumps(wanted), namespace=api.namespace).pipelines
        return str(found[0].pipeline_id) if found else None

    pipeline_id = find()
    if pipeline_id is None:
        wanted = V2beta1Pipeline(display_name=name, name=name, namespace=api.namespace)
        try:
            made = call(api, api.client._pipelines_api.pipeline_service_create_pipeline, wanted)
            return str(made.pipeline_id)
        except RefusedError as error:
            pipeline_id = find() if error.status == CONFLICT else None  # another submit was first
            if pipeline_id is None:
                raise
    return pipeline_id


def _upload(api: Api, pipeline_id: str, path: Path, version: str | None) -> str:
    """The id of the uploaded version."""
    name = version or f"{__version__}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    try:
        made = call(api, api.client.upload_pipeline_version, str(path), name, pipeline_id=pipeline_id)
        return str(made.pipeline_version_id)
    except RefusedError as error:
        if error.status != CONFLICT:
            raise
        if version is not None:
            raise InputError(f"--version-name: {version!r} exists already; choose another one") from error
    wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
    listed = call(api, api.client.list_pipeline_versions, pipeline_id, filter=json.dumps(wanted))
    found = [entry for entry in listed.pipeline_versions or [] if entry.display_name == name]
    if not found:
        raise WorkError(f"Kubeflow Pipelines has a version {name} but does not list it; use --version-name")
    return str(found[0].pipeline_version_id)


def _start(
    api: Api,
    experiment_id: str,
    name: str,
    pipeline_id: str,
    version_id: str,
    parameters: dict[str, Any],
    service_account: str | None,
) -> str:
    """Start a run once: after a server error, look whether it was started before asking again."""
    for last in (False, True):
        try:
            made = call(
                api,
                api.client.run_pipeline,
                experiment_id,
                name,
                params=parameters,
                pipeline_id=pipeline_id,
                version_id=version_id,
                service_account=service_account,
                again=False,
            )
            return str(made.run_id)
        except WorkError:
            wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
            listed = call(api, api.client.list_runs, experiment_id=experiment_id, filter=json.dumps(wanted)).runs
            found = [run for run in listed or [] if run.display_name == name]
            if found:
                return str(found[0].run_id)
            if last:
                raise
    raise AssertionError("unreachable")


def _steps(run: Any) -> dict[str, Any]:
    """The pipeline's own steps among the tasks; drivers and the root are Kubeflow's."""
    details = (run.run_details and run.run_details.task_details) or []
    return {task.display_name: task for task in details if STEP.fullmatch(task.display_name or "")}


def _reason(task: Any) -> str:
    return f" ({task.error.message})" if task.error and task.error.message else ""
