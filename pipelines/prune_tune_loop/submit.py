"""Start a run on a cluster: compile, upload, run; returns an exit code. Compiling never imports this."""

import datetime
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.prune_tune_loop import descriptions, pipeline
from pipelines.prune_tune_loop.follow import DONE, watch
from pipelines.prune_tune_loop.kfp_api import (
    CONFLICT,
    Api,
    RefusedError,
    Server,
    by_name,
    connect,
    explained,
    ids_of,
    required,
)
from ptl import __version__, address
from ptl.config.parameters import by_input, check_compiled, parameters, run_config, structure
from ptl.config.run import Config
from ptl.errors import InputError, PtlError, WorkError
from ptl.lineage import run_status
from ptl.log import Show


def submit(
    config: Config,
    server: Server,
    *,
    given: dict[str, Any] | None = None,
    service_account: str | None = None,
    fresh: bool = False,
    wait: bool = False,
    timeout: float | None = None,
    poll: float = 15.0,
    say: Show = print,
) -> int:
    """Compile, upload as a version of the pipeline, start a run; with `wait` follow it to its end.

    `given` replace the run's parameters. Unless it is `fresh`, it takes over steps of unfinished runs. The version
    is named by the content: what was uploaded before is used again. Raises InputError for what the server refuses,
    WorkError when it fails.
    """
    # What is wrong with the input is reported before anything is sent.
    given = given or {}
    _check_parameters(config, given)
    api = connect(server)
    reference = _upload_pipeline(api, config)
    # The MLflow experiment is a run parameter, Kubeflow's is not.
    mlflow_experiment = given.get("experiment", config.storage.experiment)
    ui = address.mlflow_ui()  # empty where no MLflow server is set here
    earlier: list[str] = []
    looks_for_earlier = not fresh and "earlier_runs" not in given
    if looks_for_earlier and not ui:
        say(
            "steps of earlier runs are not taken over: MLFLOW_TRACKING_URI, which would find them, is not set"
        )
    elif looks_for_earlier:
        # No MLflow must not prevent the start.
        with suppress(PtlError):
            earlier = run_status.unfinished(config.name)
    if earlier:
        given = {**given, "earlier_runs": " ".join(earlier)}
        say(f"{run_status.TAKEN_OVER} {', '.join(earlier)} (--new: from none)")
    # Hexadecimal digits, which differ between runs of the same second
    name = f"{config.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"
    from kfp_server_api import V2beta1Run, V2beta1RuntimeConfig

    with explained(api.host):
        # The client returns the one that there is already.
        created = api.client.create_experiment(config.storage.experiment, namespace=api.namespace)
        run = V2beta1Run(  # what `kfp.Client.run_pipeline` sends, which takes no description
            experiment_id=required(created, "experiment_id"),
            display_name=name,
            # MLflow's parent run has the same name.
            description=f"MLflow: experiment {mlflow_experiment}, run {name}: {address.experiments_page(ui)}"
            if ui
            else None,
            pipeline_version_reference=reference,
            runtime_config=V2beta1RuntimeConfig(parameters=given),
            service_account=service_account,
        )
    run_id = _start(api, run)
    say(f"started run {name} ({run_id})")
    say(api.link(run_id))
    return watch(api, run_id, config.gate.enabled, timeout, poll, say) if wait else DONE


def _check_parameters(config: Config, given: dict[str, Any]) -> None:
    known = parameters(config)
    unknown = sorted(given.keys() - known)
    if unknown:
        raise InputError(
            f"{', '.join(unknown)} is no parameter of the run",
            field="--param",
            remedy=f"there are {', '.join(known)}",
        )
    run = run_config({"settings": structure(config), **by_input(known | given)})
    check_compiled(run, gated=config.gate.enabled, answered=config.training.answers == "self")


def _upload_pipeline(api: Api, config: Config) -> Any:
    """Compile a config and upload it; returns the API's reference to the version."""
    from kfp_server_api import V2beta1PipelineVersionReference

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        pipeline.compile_pipeline(config, path)
        description = descriptions.markdown(config)
        pipeline_id = _pipeline_id(api, config.name, description)
        # The name follows the content: the same content is one version.
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        name = f"{__version__}-{digest[:12]}"

        def upload() -> str:
            version = api.client.upload_pipeline_version(
                str(path), name, pipeline_id=pipeline_id, description=description
            )
            return required(version, "pipeline_version_id")

        def find() -> list[str]:
            answer = api.client.list_pipeline_versions(pipeline_id, filter=by_name(name))
            return ids_of(answer.pipeline_versions, name, "pipeline_version_id")

        return V2beta1PipelineVersionReference(pipeline_id, _once(api, upload, find))


def _pipeline_id(api: Api, name: str, description: str) -> str:
    """The id of the pipeline with this name, which is created when there is none.

    Its description is never changed again, so it says that it is that of the first version.

    `kfp.Client.get_pipeline_id` asks without a namespace, and so lists none of a profile's pipelines.
    """
    from kfp_server_api import V2beta1Pipeline

    def create() -> str:
        of_first = f"Each version has a description of its own. The first one:\n\n{description}"
        new = V2beta1Pipeline(
            display_name=name, name=name, namespace=api.namespace, description=of_first
        )
        return required(
            api.client._pipelines_api.pipeline_service_create_pipeline(new), "pipeline_id"
        )

    def find() -> list[str]:
        found = api.client.list_pipelines(filter=by_name(name), namespace=api.namespace).pipelines
        return [required(pipeline, "pipeline_id") for pipeline in found or []]

    with explained(api.host):
        ids = find()
    return ids[0] if ids else _once(api, create, find)


def _start(api: Api, run: Any) -> str:
    """Start a run; returns its id."""

    def start() -> str:
        return required(api.client._run_api.run_service_create_run(run=run), "run_id")

    def find() -> list[str]:
        answer = api.client.list_runs(
            experiment_id=run.experiment_id, filter=by_name(run.display_name)
        )
        return ids_of(answer.runs, run.display_name, "run_id")

    return _once(api, start, find)


def _once(api: Api, create: Callable[[], str], find: Callable[[], list[str]]) -> str:
    """The id of what is created once: after an error it is looked for before the server is asked again."""
    try:
        with explained(api.host):
            return create()
    except (RefusedError, WorkError) as error:
        # The content was uploaded before, or the request has taken effect although its answer was lost.
        status = getattr(error, "status", None)  # of a refusal
        if status not in (None, CONFLICT):
            raise
        with explained(api.host):
            ids = find()
        if status and not ids:
            raise
    with explained(api.host):
        return ids[0] if ids else create()
