"""Start a run on a cluster: compile, upload, run; returns an exit code. Compiling never imports this."""

import datetime
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.prune_tune_loop.follow import DONE, Say, watch
from pipelines.prune_tune_loop.kfp_api import CONFLICT, Api, RefusedError, Server, call, connect
from ptl import __version__, address, progress
from ptl.config import Config, Gate, check
from ptl.errors import InputError, PtlError, WorkError


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

    parameters = parameters or {}
    unknown = set(parameters) - set(pipeline.parameters(config))
    if unknown:
        known = ", ".join(pipeline.parameters(config))
        raise InputError(f"--param: {', '.join(sorted(unknown))} is no parameter of the run; there are {known}")
    if "gate" in parameters:
        _check_gate(config, parameters["gate"])
    api = connect(server)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        pipeline.compile_pipeline(config, path)
        pipeline_id = _pipeline(api, config.name)
        version_id = _upload(api, pipeline_id, path, version)
    name_of_group = experiment or config.storage.experiment
    group = call(api, api.client.create_experiment, name_of_group, namespace=api.namespace, needs=("experiment_id",))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{config.name}-{stamp}-{os.urandom(2).hex()}"
    from kfp_server_api import V2beta1PipelineVersionReference, V2beta1Run, V2beta1RuntimeConfig

    run = V2beta1Run(  # what `kfp.Client.run_pipeline` sends, which takes no description
        experiment_id=group.experiment_id,
        display_name=name,
        description=_description(name, parameters.get("experiment", config.storage.experiment)),
        pipeline_version_reference=V2beta1PipelineVersionReference(pipeline_id, version_id),
        runtime_config=V2beta1RuntimeConfig(parameters=parameters),
        service_account=service_account,
    )
    run_id = _start(api, run)
    say(f"started run {name} ({run_id})")
    say(api.link(run_id))
    return watch(api, run_id, config, timeout, poll, say) if wait else DONE


def _check_gate(config: Config, parameter: Any) -> None:
    """Whether the gate is on decides which tasks are compiled, and how they depend on each other."""
    enabled = check(Gate, parameter, "--param gate").enabled
    if enabled != config.gate.enabled:
        raise InputError(
            f"--param gate: enabled is {enabled} there (or by default) and {config.gate.enabled} in the config, which "
            f"decides the pipeline's structure; submit with --set gate.enabled={str(enabled).lower()}, or give "
            f"enabled={str(config.gate.enabled).lower()} in the parameter"
        )


def _description(name: str, experiment: str) -> str | None:
    """A link to the run in MLflow, where MLFLOW_TRACKING_URI is a server here: its parent run is named as the run."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address.is_server(uri):
        return None
    page = f"{address.page(address.bare(uri)).rstrip('/')}/#/experiments"
    try:
        experiment_id = progress.experiment_id(experiment)
    except PtlError:
        experiment_id = None
    if experiment_id is None:  # the first run in it makes the experiment
        return f"MLflow: {page}, experiment {experiment}, run {name}"
    # The tab is in the path: without it MLflow 3 redirects to one of its own and drops the filter.
    run = quote(f"attributes.run_name = '{name}'", safe="")
    return f"MLflow: {page}/{experiment_id}/runs?searchFilter={run}"


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
            create = api.client._pipelines_api.pipeline_service_create_pipeline
            return str(call(api, create, wanted, needs=("pipeline_id",)).pipeline_id)
        except RefusedError as error:
            pipeline_id = find() if error.status == CONFLICT else None  # another submit was first
            if pipeline_id is None:
                raise
    return pipeline_id


def _upload(api: Api, pipeline_id: str, path: Path, version: str | None) -> str:
    """The id of the uploaded version."""
    name = version or f"{__version__}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    try:
        upload = api.client.upload_pipeline_version
        made = call(api, upload, str(path), name, pipeline_id=pipeline_id, needs=("pipeline_version_id",))
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


def _start(api: Api, run: Any) -> str:
    """Start a run once: after a server error, look whether it was started before asking again."""
    for last in (False, True):
        try:
            create = api.client._run_api.run_service_create_run
            return str(call(api, create, run=run, again=False, needs=("run_id",)).run_id)
        except WorkError:
            wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": run.display_name}]}
            listed = call(api, api.client.list_runs, experiment_id=run.experiment_id, filter=json.dumps(wanted)).runs
            found = [entry for entry in listed or [] if entry.display_name == run.display_name]
            if found:
                return str(found[0].run_id)
            if last:
                raise
    raise AssertionError("unreachable")
