"""`ptl doctor`: what a run will need is tried out before a GPU hour is spent; each finding is ok, warning or error.

Here is what every machine needs: MLflow and the store that its experiment names (both are written to, and cleaned up),
accelerators and disk. doctor_cluster has what only Kubeflow needs.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ptl import address, connections
from ptl.config.run import Config
from ptl.errors import InputError, PtlError
from ptl.kubernetes import DoubtError, ForbiddenError
from ptl.lineage import mlflow_client, mlflow_objects, run_status
from ptl.storage import s3
from ptl.units import size

# Somebody waits, and a redirect leads to a login page.
BRIEF = run_status.WATCHING | {"MLFLOW_ALLOW_HTTP_REDIRECTS": "false"}

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What a check says."""

    subject: str  # for example MLflow
    state: State
    message: str
    remedy: str = ""  # empty where all is well
    rule: str = ""  # what a role must allow for the check; empty where it was made

    def __str__(self) -> str:
        remedy = f"\n        -> {self.remedy}" if self.remedy else ""
        return address.without_login(f"{self.state:7} {self.subject}: {self.message}{remedy}")


def as_finding(subject: str, check: Callable[..., str], *arguments: Any) -> Finding:
    """What a check says where all is well; an explained error that it raises is a finding too."""
    try:
        return Finding(subject, "ok", check(*arguments))
    # whose sentence ends with the remedy, which is shown on a line of its own
    except PtlError as error:
        message = f"{error.field}: {error.problem}" if error.field else error.problem
        state: State = "warning" if isinstance(error, DoubtError) else "error"
        return Finding(
            subject,
            state,
            message,
            error.remedy,
            error.rule if isinstance(error, ForbiddenError) else "",
        )


def local(config: Config, home: Path) -> list[Finding]:
    """What a run on this machine needs besides what `ptl run` checks itself, before it starts."""
    # Tracked where the run would be: in `home`, unless the environment names another location.
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = (
        os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home}/mlflow.db"
    )
    if not address.is_server(os.environ["MLFLOW_TRACKING_URI"]):
        os.environ["PTL_ARTIFACT_ROOT"] = (home / "artifacts").as_uri()
    return [*step_environment(config), as_finding("disk", disk, config, home)]


def step_environment(config: Config) -> list[Finding]:
    """What a step sees from where this runs: MLflow, the store, accelerators."""
    return [*tracking_and_store(config), as_finding("GPU", gpu, config)]


def tracking_and_store(config: Config, *, elsewhere: bool = False) -> list[Finding]:
    """MLflow, and the store that it names; `elsewhere`: the steps run on a cluster, with settings of their own."""
    # A local database is nothing that a pod could use.
    if elsewhere and not address.is_server(os.environ.get("MLFLOW_TRACKING_URI", "")):
        message = (
            "not checked: MLFLOW_TRACKING_URI names no server here; the steps take it from ConfigMap "
            f"{config.storage.config_map}"
        )
        return [
            Finding("MLflow and store", "warning", message, "set it, or resources.doctor: true")
        ]
    tracking = as_finding("MLflow", mlflow, config)
    # MLflow says where the store is.
    if tracking.state == "error":
        return [tracking]
    findings = [tracking, as_finding("store", store, config, elsewhere)]
    ui = address.mlflow_ui()
    return [*findings, as_finding("MLflow's pages", pages, ui)] if ui else findings


def mlflow(config: Config) -> str:
    """MLflow takes a run from this user."""
    name = config.storage.experiment
    mlflow_client.ask()
    with mlflow_client.briefly(BRIEF), mlflow_client.connected() as client:
        experiment = mlflow_objects.experiment(client, name, os.environ.get("PTL_ARTIFACT_ROOT"))
        run = client.create_run(
            experiment.experiment_id, tags={"ptl.role": "doctor"}, run_name="doctor"
        )
        # A run that stays open would be listed as one that still works.
        client.set_terminated(run.info.run_id, "FINISHED")
        client.delete_run(run.info.run_id)
    return f"{os.environ['MLFLOW_TRACKING_URI']} takes runs in experiment {name!r}"


def pages(ui: str) -> str:
    """MLflow answers a browser that has opened it at the address `ui`.

    A page opens at any address, but its tables are filled by requests with the page's origin, which MLflow may refuse.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    origin = "{0.scheme}://{0.netloc}".format(urlsplit(ui))
    with mlflow_client.briefly(BRIEF), mlflow_client.explained():
        answer = http_request(
            get_default_host_creds(os.environ["MLFLOW_TRACKING_URI"]),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            json={"max_results": 1},
            extra_headers={"Origin": origin},
            raise_on_status=False,
        )
    if answer.status_code == HTTPStatus.FORBIDDEN:
        raise DoubtError(
            f"MLflow refuses what a browser asks that has opened {ui}: {connections.shortened(answer.text)}",
            remedy=f"add {origin} to the server's MLFLOW_SERVER_CORS_ALLOWED_ORIGINS",
        )
    return f"open them at {ui}"


def store(config: Config, elsewhere: bool) -> str:
    """The experiment's artifact location can be written and read, and a second writer of one name is refused."""
    from ptl.storage import store as checkpoints

    experiment = mlflow_client.connect().get_experiment_by_name(config.storage.experiment)
    assert experiment is not None  # made by the check of MLflow
    root = str(experiment.artifact_location).rstrip("/")
    on_s3 = root.startswith("s3://")
    if elsewhere and on_s3 and not s3.keys():
        raise DoubtError(
            f"not checked: no S3 credentials are set here; the steps take them from Secret {config.storage.s3_secret}",
            remedy="set them, or resources.doctor: true",
        )
    checkpoints.check(root)
    return _s3(root) if on_s3 else f"{root} is writable"


def _s3(root: str) -> str:
    """Write, read and delete an object of its own."""
    from botocore.exceptions import ClientError

    bucket, prefix = s3.split(root)
    # Of the names that steps delete too: a policy may allow no others.
    item: dict[str, Any] = {"Bucket": bucket, "Key": f"{prefix}/doctor.training-{uuid.uuid4().hex}"}
    client = s3.client(attempts=2)  # a step tries longer; here somebody waits
    with s3.explained(root):
        client.put_object(**item, Body=b"ptl doctor", IfNoneMatch="*")
        client.get_object(**item)["Body"].read()
        try:
            client.put_object(**item, Body=b"second", IfNoneMatch="*")
        except ClientError as error:
            # another one was before
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):
                raise
            return f"{root} is writable and refuses a second writer"
        finally:
            client.delete_object(**item)
    raise DoubtError(
        f"{root} is writable, but ignores If-None-Match",
        remedy="use a store with conditional writes (AWS, SeaweedFS 4), or never retry a step while it still runs",
    )


def gpu(config: Config) -> str:
    """As many accelerators as the config asks for are visible here."""
    import torch

    # On the cluster this step has what prune has; elsewhere the largest step is to fit.
    in_step = bool(os.environ.get("KFP_RUN_ID"))
    needed = max(
        map(
            config.resources.accelerators_of,
            ["prune"] if in_step else ["prune", "recover", "evaluate"],
        )
    )
    message = f"{torch.cuda.device_count()} visible here, the config asks for {needed}"
    if torch.cuda.device_count() < needed:
        error = InputError if in_step else DoubtError
        remedy = "check resources.accelerator, tolerations and node_selector, and the nodes' device plugin"
        raise error(message, remedy=remedy)
    return message


def disk(config: Config, home: Path) -> str:
    """The checkpoints of a whole run fit beside what is there; on S3 only one at a time is here."""
    from ptl.preflight import forecast_model

    shape = forecast_model.shape_of(config.model.path, config.model.revision)
    needed = forecast_model.checkpoint_bytes(config, shape)
    free = shutil.disk_usage(home).free
    message = (
        f"{home} has {size(free)} free; the checkpoints of a whole run are at most {size(needed)}"
    )
    if free < needed:  # a run that stops for want of space can be resumed: no error
        remedy = "free some, give another --home, or keep checkpoints on S3; ptl gc removes those of earlier runs"
        raise DoubtError(message, remedy=remedy)
    return message
