"""What the doctor checks of MLflow, and of the store that its experiment names: both are written to, and cleaned up."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import Any

from ptl import address
from ptl.config.run import Config
from ptl.preflight import doctor_http as http
from ptl.preflight.finding import Finding, as_finding
from ptl.storage import s3_client

FORBIDDEN = 403
CONFLICTS = (409, 412)  # HTTP statuses of a conditional write that another one was before


def tracking_uri() -> str:
    """Address of MLflow in this environment; empty where none is set."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def tracking_and_store(config: Config, *, elsewhere: bool = False) -> list[Finding]:
    """MLflow, and the store that it names; `elsewhere`: the steps run on a cluster, with settings of their own."""
    storage = config.storage
    step = "with resources.doctor, the first step of the run checks it"
    # A local database is nothing that a pod could use.
    if elsewhere and not address.is_server(tracking_uri()):
        return [
            Finding(
                "MLflow and store",
                "warning",
                "not checked: MLFLOW_TRACKING_URI names no server here; the steps take it from ConfigMap "
                f"{storage.config_map}",
                f"set it to check both from here; {step}",
            )
        ]

    # The store is where MLflow's experiment keeps its artifacts, so MLflow comes first.
    tracking = as_finding("MLflow", mlflow, config)
    if tracking.state == "error":
        unknown = Finding("store", "warning", "not checked: MLflow says where it is", "fix MLflow first")
        return [tracking, unknown]

    # On a cluster the pods have keys of their own, which this machine need not have.
    has_keys = any(os.environ.get(name) for name in s3_client.CREDENTIALS)
    if elsewhere and not has_keys and _store_root(config).startswith("s3://"):
        return [
            tracking,
            Finding(
                "store",
                "warning",
                f"not checked: no S3 credentials are set here; the steps take them from Secret {storage.s3_secret}",
                f"set them to check it from here; {step}",
            ),
        ]
    return [tracking, as_finding("store", store, config)]


def mlflow(config: Config) -> Finding:
    """MLflow answers under this name, lets this user in, and takes a run."""
    from mlflow.exceptions import MlflowException

    address.split_login()  # no message below shows a password
    uri = tracking_uri()
    if not uri:
        return Finding(
            "MLflow",
            "error",
            "MLFLOW_TRACKING_URI is not set",
            "set it to the server's address; on a cluster it is a key of the ConfigMap storage.config_map",
        )
    # MLflow's client retries for minutes where nobody answers, and says little of why.
    if address.is_server(uri):
        http.check_mlflow(uri)
    experiment = config.storage.experiment
    try:
        _make_a_run(experiment)
    except MlflowException as error:
        reason = str(error)[:200]
        return Finding(
            "MLflow",
            "error",
            f"answers, but does not take a run: {reason}",
            "the user needs the right to write: EDIT on the experiment, or the right to create it",
        )
    message = f"{address.without_login(uri)} takes runs in experiment {experiment!r}"
    ui = address.mlflow_ui()
    # A Service's name is an address of steps: people open a forwarded port, or what PTL_MLFLOW_UI names.
    is_opened = address.is_server(uri) and ".svc" not in address.origin(ui)
    refusal = http.page_refusal(uri, ui) if is_opened else ""
    if refusal:
        return Finding(
            "MLflow",
            "warning",
            f"{message}, but its page at {ui}, to which links lead, shows only errors: it is refused ({refusal})",
            f"start it with MLFLOW_SERVER_CORS_ALLOWED_ORIGINS={address.origin(ui)}, or set PTL_MLFLOW_UI to the "
            "address that people open",
        )
    return Finding("MLflow", "ok", message)


def _make_a_run(experiment_name: str) -> None:
    """Make a run and delete it; the experiment is made where there is none, as a run would."""
    from ptl.lineage import mlflow_client, mlflow_objects

    client = mlflow_client.connect()
    experiment = mlflow_objects.experiment(client, experiment_name, os.environ.get("PTL_ARTIFACT_ROOT"))
    run = client.create_run(experiment.experiment_id, tags={"ptl.role": "doctor"}, run_name="doctor")
    # A run that stays open would be listed as one that still works.
    client.set_terminated(run.info.run_id, "FINISHED")
    client.delete_run(run.info.run_id)


def _store_root(config: Config) -> str:
    """The experiment's artifact location."""
    from ptl.lineage import mlflow_client

    experiment = mlflow_client.connect().get_experiment_by_name(config.storage.experiment)
    assert experiment is not None  # made by the check of MLflow
    return str(experiment.artifact_location).rstrip("/")


def store(config: Config) -> Finding:
    """The experiment's artifact location can be written, and a second writer of one name is refused."""
    from ptl.storage import store as checkpoints

    root = _store_root(config)
    checkpoints.check(root)
    if not root.startswith("s3://"):
        return _writable_folder(root)

    # An object of its own, which is deleted again.
    bucket, prefix = s3_client.split(root)
    key = f"{prefix}/doctor-{uuid.uuid4().hex}"
    client = s3_client.client(attempts=2)  # a step tries longer; here somebody waits
    with s3_client.explained(root):
        client.put_object(Bucket=bucket, Key=key, Body=b"ptl doctor", IfNoneMatch="*")
        refused = _second_put_is_refused(client, bucket, key)
        _delete(client, bucket, key)
    if refused:
        return Finding("store", "ok", f"{root} is writable and refuses a second writer")
    return Finding(
        "store",
        "warning",
        f"{root} is writable, but ignores If-None-Match",
        "use a store with conditional writes (AWS, SeaweedFS 4, MinIO), or never retry a step while it still runs",
    )


def _writable_folder(root: str) -> Finding:
    from ptl.storage.local_files import path_of

    folder = path_of(root)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9  # GB
    return Finding("store", "ok", f"{folder} is writable, {free:.0f} GB free")


def _second_put_is_refused(client: Any, bucket: str, key: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        client.put_object(Bucket=bucket, Key=key, Body=b"second", IfNoneMatch="*")
    except ClientError as error:
        if _http_status(error) not in CONFLICTS:
            raise
        return True
    return False


def _delete(client: Any, bucket: str, key: str) -> None:
    """Clean up where the policy allows it; steps themselves never delete."""
    from botocore.exceptions import ClientError

    try:
        client.delete_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _http_status(error) != FORBIDDEN:
            raise


def _http_status(error: Any) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
