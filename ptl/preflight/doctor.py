"""`ptl doctor`: what a run will need is tried out before a GPU hour is spent; each finding is ok, warning or error."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptl import address, extras
from ptl.config.export import Export
from ptl.config.image_names import with_options
from ptl.config.run import Config, check
from ptl.errors import InputError
from ptl.evaluation import language_models
from ptl.preflight import doctor_cluster, gpus
from ptl.preflight.doctor_cluster import Health
from ptl.preflight.finding import DoubtError, Finding, as_finding
from ptl.storage import s3_client
from ptl.units import listed, size

# Somebody waits, and a redirect leads to a login page.
BRIEF = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",
}
# By a pattern in what MLflow's client says.
REMEDIES = {
    "Invalid Host": "start it with --allowed-hosts and this host name (host:*), which replaces the default list",
    "code 40|UNAUTH|PERMISSION": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, of a user with EDIT",
    "": "is the server up, is MLFLOW_TRACKING_URI right, may this machine reach it?",
}
OPTIMIZER_STATE = 8  # bytes a parameter: Adam's two averages in float32

MissingImages = Callable[[Sequence[str]], list[str]]  # those of the images that the local engine does not hold
# (exports of one format, the dense model if it is here): raises InputError for what cannot be made on this machine
CheckExports = Callable[[Sequence[Export], Path | None], None]


def local(
    config: Config,
    *,
    home: Path,
    missing_images: MissingImages,
    check_exports: CheckExports,
    runner: str = "subprocess",
) -> list[Finding]:
    """What `ptl run` needs on this machine; the Docker engine only where its containers run the steps."""
    # Tracked where the run would be: in `home`, unless the environment names another location.
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    if not address.is_server(os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")):
        os.environ.setdefault("PTL_ARTIFACT_ROOT", (home / "artifacts").as_uri())
    findings = [as_finding("packages", packages, config, runner), *step_environment(config)]
    findings.append(as_finding("disk", disk, config, home))
    if runner == "docker":
        return [*findings, as_finding("images", engine, config, missing_images)]
    folder = Path(config.model.path).expanduser()
    src = folder if folder.exists() else None
    for kind in dict.fromkeys(export.format for export in config.export):
        of_format = [export for export in config.export if export.format == kind]
        findings.append(as_finding(kind, exports, of_format, src, check_exports))
    return findings


def cluster(config: Config, *, health: Health | None, namespace: str | None, kubeflow_namespace: str) -> list[Finding]:
    """What a run on Kubeflow needs: images in a registry, a backend of the right version, objects of the namespace.

    MLflow and the store are tried from here where this environment says how; the steps have their own addresses and
    credentials, so what is not set here is a warning.
    """
    findings = [*tracking_and_store(config, elsewhere=True), as_finding("images", doctor_cluster.images, config)]
    findings.append(as_finding("Kubeflow", doctor_cluster.kubeflow, config, health))
    findings.append(as_finding("retry policy", doctor_cluster.retry_policy, kubeflow_namespace))
    return [*findings, *doctor_cluster.objects(config, namespace)]


def task(settings: dict[str, Any], experiment: str) -> None:
    """The work of the optional first step of a pipeline. Raises InputError that names every error."""
    config = check(Config, settings, "settings")
    # The run's parameter wins over the config's value.
    storage = config.storage.model_copy(update={"experiment": experiment})
    findings = step_environment(config.model_copy(update={"storage": storage}))
    # All findings go to the step's log, the errors into its message too.
    print(*findings, sep="\n", flush=True)
    lines = "\n".join(str(finding) for finding in findings if finding.state == "error")
    if lines:
        raise InputError(f"doctor:\n{lines}")  # of the input: another attempt would find the same


def step_environment(config: Config) -> list[Finding]:
    """What a step sees from where this runs: MLflow, the store, accelerators."""
    return [*tracking_and_store(config), as_finding("GPU", gpu, config)]


def tracking_uri() -> str:
    """Address of MLflow in this environment; empty where none is set."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def tracking_and_store(config: Config, *, elsewhere: bool = False) -> list[Finding]:
    """MLflow, and the store that it names; `elsewhere`: the steps run on a cluster, with settings of their own."""
    # A local database is nothing that a pod could use.
    if elsewhere and not address.is_server(tracking_uri()):
        message = (
            "not checked: MLFLOW_TRACKING_URI names no server here; the steps take it from ConfigMap "
            f"{config.storage.config_map}"
        )
        return [Finding("MLflow and store", "warning", message, "set it, or resources.doctor: true")]
    tracking = as_finding("MLflow", mlflow, config)
    if tracking.state == "error":
        return [tracking, Finding("store", "warning", "not checked: MLflow says where it is", "fix MLflow first")]
    return [tracking, as_finding("store", store, config, elsewhere)]


def mlflow(config: Config) -> str:
    """MLflow takes a run from this user."""
    from mlflow.exceptions import MlflowException

    from ptl.lineage import mlflow_client, mlflow_objects

    client = mlflow_client.connect()  # no message below shows a password
    uri, name = tracking_uri(), config.storage.experiment
    try:
        with mlflow_client.briefly(BRIEF):
            experiment = mlflow_objects.experiment(client, name, os.environ.get("PTL_ARTIFACT_ROOT"))
            run = client.create_run(experiment.experiment_id, tags={"ptl.role": "doctor"}, run_name="doctor")
            # A run that stays open would be listed as one that still works.
            client.set_terminated(run.info.run_id, "FINISHED")
            client.delete_run(run.info.run_id)
    except MlflowException as error:
        message = str(error)
        remedy = next(remedy for sign, remedy in REMEDIES.items() if re.search(sign, message))
        raise InputError(f"does not take a run: {message[:300]}", field=uri, remedy=remedy) from error
    return f"{uri} takes runs in experiment {name!r}"


def store(config: Config, elsewhere: bool) -> str:
    """The experiment's artifact location can be written and read, and a second writer of one name is refused."""
    from ptl.lineage import mlflow_client
    from ptl.storage import local_files
    from ptl.storage import store as checkpoints

    experiment = mlflow_client.connect().get_experiment_by_name(config.storage.experiment)
    assert experiment is not None  # made by the check of MLflow
    root = str(experiment.artifact_location).rstrip("/")
    if elsewhere and root.startswith("s3://") and not any(map(os.environ.get, s3_client.CREDENTIALS)):
        raise DoubtError(
            f"not checked: no S3 credentials are set here; the steps take them from Secret {config.storage.s3_secret}",
            remedy="set them, or resources.doctor: true",
        )
    checkpoints.check(root)
    if root.startswith("s3://"):
        return _s3(root)
    folder = local_files.path_of(root)
    folder.mkdir(parents=True, exist_ok=True)
    return f"{folder} is writable, {shutil.disk_usage(folder).free / 1e9:.0f} GB free"


def _s3(root: str) -> str:
    """Write, read and delete an object of its own."""
    from botocore.exceptions import ClientError

    bucket, prefix = s3_client.split(root)
    item: dict[str, Any] = {"Bucket": bucket, "Key": f"{prefix}/doctor-{uuid.uuid4().hex}"}
    client = s3_client.client(attempts=2)  # a step tries longer; here somebody waits
    with s3_client.explained(root):
        client.put_object(**item, Body=b"ptl doctor", IfNoneMatch="*")
        client.get_object(**item)["Body"].read()
        try:
            client.put_object(**item, Body=b"second", IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):  # another one was before
                raise
            return f"{root} is writable and refuses a second writer"
        finally:
            with contextlib.suppress(ClientError):  # the policy of the steps need not allow it: they never delete
                client.delete_object(**item)
    raise DoubtError(
        f"{root} is writable, but ignores If-None-Match",
        remedy="use a store with conditional writes (AWS, SeaweedFS 4), or never retry a step while it still runs",
    )


def gpu(config: Config) -> str:
    """As many accelerators as the config asks for are visible here."""
    # On the cluster this step has what prune has; elsewhere the largest step is to fit.
    in_step = bool(os.environ.get("KFP_RUN_ID"))
    steps = ["prune"] if in_step else ["prune", "recover", "evaluate"]
    needed = max(map(config.resources.accelerators_of, steps))
    message = f"{gpus.visible()} visible here, the config asks for {needed}"
    if gpus.visible() < needed:
        error = InputError if in_step else DoubtError
        remedy = "check resources.accelerator, tolerations and node_selector, and the nodes' device plugin"
        raise error(message, remedy=remedy)
    return message


def packages(config: Config, runner: str) -> str:
    """What the steps import is installed on this machine; in containers they bring their own."""
    needed = ["pipelines"] if runner == "docker" else ["prune", "recover", "evaluate", "pipelines"]
    missing = extras.absent(needed)
    if missing:
        raise InputError(f"not installed: {', '.join(missing)}", remedy=extras.install(*needed))
    if runner != "docker":
        language_models.check_backend(config.evaluate)
    return f"what the steps import is installed ({', '.join(needed)})"


def disk(config: Config, home: Path) -> str:
    """The checkpoints of a whole run fit beside what is there; on S3 only one at a time is here."""
    from ptl.preflight import forecast_model

    shape = forecast_model.shape_of(config.model.path, config.model.revision)
    needed = checkpoint_bytes(config, shape.params, shape.itemsize)
    free = shutil.disk_usage(home).free
    message = f"{home} has {size(free)} free; the checkpoints of a whole run are at most {size(needed)}"
    if free < needed:  # a run that stops for want of space can be resumed: no error
        remedy = "free some, give another --home, or keep checkpoints on S3; ptl gc removes those of earlier runs"
        raise DoubtError(message, remedy=remedy)
    return message


def checkpoint_bytes(config: Config, params: int, itemsize: int) -> int:
    """The most that a run publishes: the model, and two of its size by each iteration and by the control.

    All but the last iteration's hold the optimizer's state.
    """
    iterations = config.schedule.num_iterations
    checkpoints = 1 + 2 * iterations + 2 * config.control
    return params * (checkpoints * itemsize + 2 * (iterations - 1) * OPTIMIZER_STATE)


def exports(of_format: Sequence[Export], src: Path | None, check_exports: CheckExports) -> str:
    """What makes the exports of one format is installed, and they can be made of the model, if it is here."""
    check_exports(of_format, src)
    types = listed([export.type for export in of_format])
    return f"{types} can be made of the model" if src else f"what {types} needs is installed"


def engine(config: Config, missing_images: MissingImages) -> str:
    """The steps' images are in the local engine, and MLflow is a server, which is all that they speak to."""
    names = config.image_names()
    absent = ", ".join(missing_images(names))
    if absent:
        options = with_options(config.optional_images())
        raise InputError(f"the engine has no {absent}", remedy=f"build them: ptl images build{options}")
    if not address.is_server(tracking_uri()):  # a database's file is outside of the containers
        raise DoubtError(
            "the images speak to an MLflow server only, and none is set",
            remedy="run with --s3, which starts one, or set MLFLOW_TRACKING_URI",
        )
    return f"{', '.join(names)} are in the local engine"
