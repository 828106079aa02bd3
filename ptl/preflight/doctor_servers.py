"""What the doctor checks of MLflow, and of the store that its experiment names: both are written to, and cleaned up."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from typing import Any

from ptl import address
from ptl.config.run import Config
from ptl.errors import InputError
from ptl.preflight.finding import DoubtError, Finding, as_finding
from ptl.storage import s3_client

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
    """MLflow takes a run from this user, and its page may be opened where links lead."""
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
            if address.is_server(uri):
                _check_page(uri, address.mlflow_ui())
    except MlflowException as error:
        message = str(error)
        remedy = next(remedy for sign, remedy in REMEDIES.items() if re.search(sign, message))
        raise InputError(f"does not take a run: {message[:300]}", field=uri, remedy=remedy) from error
    return f"{uri} takes runs in experiment {name!r}"


def _check_page(uri: str, ui: str) -> None:
    """Raise DoubtError where MLflow refuses what its own page asks when it is open at `ui`."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    # A browser sends the page's address with each POST. A Service's name is one that no browser opens.
    if ".svc" in address.origin(ui):
        return
    answer = http_request(
        get_default_host_creds(uri),
        "/api/2.0/mlflow/experiments/search",
        "POST",
        extra_headers={"Origin": address.origin(ui)},
        json={"max_results": 1},
        raise_on_status=False,
    )
    if answer.status_code != 200:
        raise DoubtError(
            f"takes runs, but its page at {ui}, to which links lead, shows only errors ({answer.status_code} "
            f"{answer.text[:100]})",
            remedy=f"start it with MLFLOW_SERVER_CORS_ALLOWED_ORIGINS={address.origin(ui)}, or set PTL_MLFLOW_UI to "
            "the address that people open",
        )


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
