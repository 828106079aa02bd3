"""`ptl doctor`: what a run will need is tried out before a GPU hour is spent; each line is ok, warning or error."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptl import address, doctor_kubernetes, doctor_local, s3_client
from ptl import doctor_http as http
from ptl.cluster_config import StepName
from ptl.config import Config, check
from ptl.doctor_line import Line as Line
from ptl.doctor_line import guard
from ptl.errors import InputError, PtlError


def here(config: Config) -> list[Line]:
    """What a step sees from where this runs: MLflow, the store, accelerators. The doctor's own step checks these."""
    return [*tracking_and_store(config), gpu(config)]


def local(config: Config, *, home: Path, runner: str = "subprocess") -> list[Line]:
    """What `ptl run` needs on this machine; the Docker engine only where its containers run the steps."""
    doctor_local.as_run_does(home)
    model = guard("model and data", lambda: doctor_local.model_and_data(config))
    lines = [guard("packages", lambda: doctor_local.packages(config, runner)), model, *here(config)]
    if model.state == "ok":
        lines.append(guard("disk", lambda: doctor_local.disk(config, home)))
    if runner == "docker":
        lines.append(guard("images", lambda: doctor_local.engine(config)))
    return lines


def cluster(config: Config, *, host: str | None, namespace: str | None, kubeflow_namespace: str) -> list[Line]:
    """What a run on Kubeflow needs: images in a registry, a backend of the right version, objects of the namespace.

    MLflow and the store are tried from here where this environment says how; the steps have their own addresses and
    credentials, so what is not set here is a warning.
    """
    lines = [*tracking_and_store(config, elsewhere=True), guard("images", lambda: images(config))]
    if host is None:
        message = "not looked at: neither --host nor KF_PIPELINES_ENDPOINT is set"
        lines.append(Line("Kubeflow", "warning", message, "give the address of the API; `ptl submit` needs it too"))
    else:
        lines.append(guard("Kubeflow", lambda: kubeflow(config, host)))
        if namespace is None:
            namespace = _standalone_namespace(host, kubeflow_namespace)
    return [*lines, *doctor_kubernetes.cluster(config, namespace, kubeflow_namespace)]


def names_a_cluster(host: str | None) -> str | None:
    """What of the environment says that the run goes to a cluster; None for a run on this machine."""
    if host:
        return "the address of Kubeflow is given"
    return "MLFLOW_TRACKING_URI is a server" if address.is_server(os.environ.get("MLFLOW_TRACKING_URI", "")) else None


def tracking_and_store(config: Config, *, elsewhere: bool = False) -> list[Line]:
    """MLflow, and the store that it names; `elsewhere`: the steps run on a cluster, with settings of their own."""
    storage = config.storage
    step = "with resources.doctor, the first step of the run checks it"
    if elsewhere and not address.is_server(os.environ.get("MLFLOW_TRACKING_URI", "")):
        message = (
            "not looked at: MLFLOW_TRACKING_URI names no server here; the steps take it from ConfigMap "
            f"{storage.config_map}"
        )
        return [Line("MLflow and store", "warning", message, f"set it to check both from here; {step}")]
    line = guard("MLflow", lambda: mlflow(config))
    if line.state != "ok":
        return [line, Line("store", "warning", "not looked at: MLflow says where it is", "fix MLflow first")]
    with_keys = any(os.environ.get(name) for name in s3_client.CREDENTIALS)
    if elsewhere and not with_keys and _store_root(config).startswith("s3://"):
        message = f"not looked at: no S3 credentials are set here; the steps take them from Secret {storage.s3_secret}"
        return [line, Line("store", "warning", message, f"set them to check it from here; {step}")]
    return [line, guard("store", lambda: store(config))]


def _standalone_namespace(host: str, kubeflow_namespace: str) -> str | None:
    """Where the pods of runs start when nobody names a profile: beside Kubeflow, unless it has several users."""
    try:
        return kubeflow_namespace if http.kubeflow(host).multi_user is False else None
    except PtlError:
        return None  # the check of Kubeflow says why


def task(settings: dict[str, Any], experiment: str) -> None:
    """The body of the optional first step of a pipeline. Raises InputError that names every fault."""
    config = check(Config, settings, "settings")
    storage = config.storage.model_copy(update={"experiment": experiment})  # the run's parameter wins
    lines = here(config.model_copy(update={"storage": storage}))
    print("\n".join(map(str, lines)), flush=True)
    faults = [line for line in lines if line.state == "error"]
    if faults:
        raise InputError("doctor:\n" + "\n".join(map(str, faults)))  # another attempt would find the same


def exit_code(lines: Iterable[Line]) -> int:
    """1 when anything is an error."""
    return int(any(line.state == "error" for line in lines))


def mlflow(config: Config) -> Line:
    """MLflow answers under this name, lets this user in, and takes a run."""
    from mlflow.exceptions import MlflowException

    from ptl import mlflow_client, mlflow_objects

    address.split_login()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        remedy = "set it to the server's address; on a cluster it is a key of the ConfigMap storage.config_map"
        return Line("MLflow", "error", "MLFLOW_TRACKING_URI is not set", remedy)
    if address.is_server(uri):
        fault = http.mlflow_fault(uri)
        if fault:
            return Line("MLflow", "error", *fault)
    try:
        client = mlflow_client.connect()
        experiment = mlflow_objects.experiment(client, config.storage.experiment, os.environ.get("PTL_ARTIFACT_ROOT"))
        run = client.create_run(experiment.experiment_id, tags={"ptl.role": "doctor"}, run_name="doctor")
        client.set_terminated(run.info.run_id, "FINISHED")
        client.delete_run(run.info.run_id)
    except MlflowException as error:
        remedy = "the user needs the right to write: EDIT on the experiment, or the right to create it"
        return Line("MLflow", "error", f"answers, but does not take a run: {str(error)[:200]}", remedy)
    experiment_name = config.storage.experiment
    return Line("MLflow", "ok", f"{address.without_login(uri)} takes runs in experiment {experiment_name!r}")


def _store_root(config: Config) -> str:
    """The experiment's artifact location."""
    from ptl import mlflow_client

    experiment = mlflow_client.connect().get_experiment_by_name(config.storage.experiment)
    assert experiment is not None  # made by the check of MLflow
    return str(experiment.artifact_location).rstrip("/")


def store(config: Config) -> Line:
    """The experiment's artifact location can be written, and a second writer of one name is refused."""
    from ptl import store as work

    root = _store_root(config)
    work.check(root)
    if not root.startswith("s3://"):
        return _folder(root)
    bucket, prefix = s3_client.split(root)
    key = f"{prefix}/doctor-{uuid.uuid4().hex}"
    client = s3_client.client(attempts=2)
    with s3_client.explained(root):
        client.put_object(Bucket=bucket, Key=key, Body=b"ptl doctor", IfNoneMatch="*")
        refused = _second_put_is_refused(client, bucket, key)
        _delete(client, bucket, key)
    if not refused:
        remedy = (
            "use a store with conditional writes (AWS, SeaweedFS 4, MinIO), or never retry a step while it still runs"
        )
        return Line("store", "warning", f"{root} is writable, but ignores If-None-Match", remedy)
    return Line("store", "ok", f"{root} is writable and refuses a second writer")


def gpu(config: Config) -> Line:
    """Whether accelerators that the config asks for are visible here."""
    inside = bool(os.environ.get("KFP_RUN_ID"))
    own, common = config.resources.steps, config.resources.accelerators
    # On the cluster this step has what prune has; elsewhere the largest step is to fit.
    steps: tuple[StepName, ...] = ("prune",) if inside else ("prune", "recover", "evaluate")
    asked = [own[step].accelerators if step in own else None for step in steps]
    needed = max(common if number is None else number for number in asked)
    tool = shutil.which("nvidia-smi")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout if tool else ""
    visible = sum(line.startswith("GPU ") for line in listed.splitlines())
    if visible < needed:
        remedy = "check resources.accelerator, tolerations and node_selector, and the nodes' device plugin"
        return Line(
            "GPU", "error" if inside else "warning", f"{visible} visible here, the config asks for {needed}", remedy
        )
    return Line("GPU", "ok", f"{visible} visible here, the config asks for {needed}")


def images(config: Config) -> Line:
    """The steps' images are in the registry, from which the cluster pulls them."""
    from ptl import images as work

    names = work.names(config.images.registry, config.images.tag, vllm=config.evaluate.backend == "vllm")
    if not config.images.registry:
        if config.resources.image_pull_policy == "Never":
            return Line("images", "ok", f"the nodes must hold {', '.join(names)}: resources.image_pull_policy is Never")
        message = "images.registry is not set: a cluster cannot pull from the Docker engine of this machine"
        remedy = "ptl images push --registry HOST/PATH, and set images.registry to it; where the nodes hold the images "
        return Line("images", "error", message, remedy + "already (kind load), set resources.image_pull_policy: Never")
    for name in names:
        status = http.manifest_status(name)
        if status == 404:
            remedy = "ptl images build, then ptl images push, with this registry and tag; or correct images.registry"
            return Line("images", "error", f"{name} is not in the registry", remedy)
        if status in (401, 403):
            remedy = "make sure that resources.image_pull_secrets names a Secret that can pull them"
            return Line("images", "warning", f"{name} needs a login ({status}), so it was not looked at", remedy)
        if status != 200:
            return Line("images", "error", f"the registry answers {status} for {name}", "is the registry healthy?")
    return Line("images", "ok", f"{', '.join(names)} can be pulled")


def kubeflow(config: Config, host: str) -> Line:
    """Kubeflow answers, in a version that takes the compiled YAML."""
    version = http.kubeflow(host).version
    if version is None:
        message = f"{host} answers, but does not say its version"
        return Line("Kubeflow", "warning", message, "make sure that it is 2.14 or newer")
    oldest = config.resources.kfp
    if http.numbers(version) < http.numbers(oldest):
        major, minor = http.numbers(version)
        remedy = f'upgrade Kubeflow Pipelines, or compile for it, from 2.14 on: resources.kfp: "{major}.{minor}"'
        return Line("Kubeflow", "error", f"{host} is {version}, the YAML is compiled for {oldest} and newer", remedy)
    if http.numbers(version) < (2, 17):
        return Line("Kubeflow", "warning", f"{host} is {version}", "it works with 2.14 and newer; 2.17 is recommended")
    return Line("Kubeflow", "ok", f"{host} is {version}")


def _folder(root: str) -> Line:
    from ptl.localfs import path_of

    folder = path_of(root)
    folder.mkdir(parents=True, exist_ok=True)
    return Line("store", "ok", f"{folder} is writable, {shutil.disk_usage(folder).free / 1e9:.0f} GB free")


def _second_put_is_refused(client: Any, bucket: str, key: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        client.put_object(Bucket=bucket, Key=key, Body=b"second", IfNoneMatch="*")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
            return True
        raise
    return False


def _delete(client: Any, bucket: str, key: str) -> None:
    """Clean up where the policy allows it; steps themselves never delete."""
    from botocore.exceptions import ClientError

    try:
        client.delete_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 403:
            raise
