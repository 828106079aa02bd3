"""`ptl doctor`: what a run will need is tried out before a GPU hour is spent; each line is ok, warning or error."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ptl import doctor_http as http
from ptl.cluster_config import StepName
from ptl.config import Config, check
from ptl.errors import PtlError, WorkError


@dataclass(frozen=True)
class Line:
    """One finding; `remedy` is empty where all is well."""

    what: str
    state: str  # ok, warning, error
    said: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:7} {self.what}: {self.said}" + (f"\n        -> {self.remedy}" if self.remedy else "")


def here(config: Config) -> list[Line]:
    """What a step sees from where this runs: MLflow, the store, accelerators."""
    lines = [_guard("MLflow", lambda: mlflow(config))]
    if lines[0].state == "ok":
        lines.append(_guard("store", lambda: store(config)))
    else:
        lines.append(Line("store", "warning", "not checked: MLflow says where it is", "mend MLflow first"))
    return [*lines, gpu(config)]


def outside(config: Config, *, host: str | None, namespace: str | None) -> list[Line]:
    """What the cluster will need: images, names of Secrets, Kubeflow's version."""
    lines = [_guard("images", lambda: images(config))]
    if host:
        lines.append(_guard("Kubeflow", lambda: kubeflow(config, host)))
    if namespace:
        lines += secrets(config, namespace)
    return lines


def task(settings: dict[str, Any], experiment: str) -> None:
    """The body of the optional first step of a pipeline. Raises WorkError that names every fault."""
    config = check(Config, settings, "settings")
    storage = config.storage.model_copy(update={"experiment": experiment})  # the run's parameter wins
    lines = here(config.model_copy(update={"storage": storage}))
    print("\n".join(map(str, lines)), flush=True)
    faults = [line for line in lines if line.state == "error"]
    if faults:
        raise WorkError("doctor:\n" + "\n".join(map(str, faults)))


def exit_code(lines: Iterable[Line]) -> int:
    """1 when anything is an error."""
    return int(any(line.state == "error" for line in lines))


def mlflow(config: Config) -> Line:
    """MLflow answers under this name, lets this user in, and takes a run."""
    from mlflow.exceptions import MlflowException

    from ptl import tracking

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        remedy = "set it to the server's address; on a cluster it is a key of the ConfigMap storage.config_map"
        return Line("MLflow", "error", "MLFLOW_TRACKING_URI is not set", remedy)
    if uri.startswith("http"):
        fault = http.mlflow_fault(uri)
        if fault:
            return Line("MLflow", "error", *fault)
    try:
        client = tracking.connect()
        experiment = tracking._experiment(client, config.storage.experiment, os.environ.get("PTL_ARTIFACT_ROOT"))
        run = client.create_run(experiment.experiment_id, tags={"ptl.role": "doctor"}, run_name="doctor")
        client.set_terminated(run.info.run_id, "FINISHED")
        client.delete_run(run.info.run_id)
    except MlflowException as error:
        remedy = "the user needs the right to write: EDIT on the experiment, or the right to create it"
        return Line("MLflow", "error", f"answers, but does not take a run: {str(error)[:200]}", remedy)
    return Line(
        "MLflow", "ok", f"{tracking._without_password(uri)} takes runs in experiment {config.storage.experiment!r}"
    )


def store(config: Config) -> Line:
    """The experiment's artifact location can be written, and a second writer of one name is refused."""
    from ptl import store as work
    from ptl import tracking

    found = tracking.connect().get_experiment_by_name(config.storage.experiment)
    assert found is not None  # made by the check of MLflow
    root = found.artifact_location.rstrip("/")
    work.check(root)
    if not root.startswith("s3://"):
        return _folder(root)
    from ptl import s3_client

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
    wanted = max(common if number is None else number for number in asked)
    tool = shutil.which("nvidia-smi")
    said = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout if tool else ""
    seen = sum(line.startswith("GPU ") for line in said.splitlines())
    if seen < wanted:
        remedy = "check resources.accelerator, tolerations and node_selector, and the nodes' device plugin"
        return Line(
            "GPU", "error" if inside else "warning", f"{seen} visible here, the config asks for {wanted}", remedy
        )
    return Line("GPU", "ok", f"{seen} visible here, the config asks for {wanted}")


def images(config: Config) -> Line:
    """The steps' images exist: in the registry, or in the local engine when the config names no registry."""
    from ptl import images as work

    names = work.names(config.images.registry, config.images.tag, vllm=config.evaluate.backend == "vllm")
    if not config.images.registry:
        absent = work.missing(names)
        if absent:
            return Line("images", "error", f"the engine has no {', '.join(absent)}", "build them: ptl images build")
        return Line("images", "ok", f"{', '.join(names)} are in the local engine")
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
    version = http.kubeflow_version(host)
    if version is None:
        return Line(
            "Kubeflow",
            "warning",
            f"{host} answers, but does not tell its version",
            "make sure that it is 2.14 or newer",
        )
    oldest = config.resources.kfp
    if http.numbers(version) < http.numbers(oldest):
        remedy = "set resources.kfp to the backend's version (2.14 or 2.15), or upgrade Kubeflow Pipelines"
        return Line("Kubeflow", "error", f"{host} is {version}, the YAML is compiled for {oldest} and newer", remedy)
    if http.numbers(version) < (2, 17):
        return Line("Kubeflow", "warning", f"{host} is {version}", "it works with 2.14 and newer; 2.17 is recommended")
    return Line("Kubeflow", "ok", f"{host} is {version}")


def secrets(config: Config, namespace: str) -> list[Line]:
    """Secrets and ConfigMaps that the config names exist; only their names are read."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return [Line("secrets", "warning", "not checked: kubectl is not on PATH", "install it, or look by hand")]
    own, lines = config.storage, []
    wanted = [
        ("configmap", own.config_map),
        ("configmap", own.ca_config_map),
        ("persistentvolumeclaim", own.cache_claim),
    ]
    wanted += [("secret", name) for name in (own.s3_secret, own.mlflow_secret, own.hf_secret)]
    wanted += [("secret", name) for name in config.resources.image_pull_secrets]
    for kind, name in wanted:
        if name is None:
            continue
        command = [kubectl, "get", kind, name, "--namespace", namespace, "--output", "name"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        what = f"{kind} {name}"
        if done.returncode == 0:
            lines.append(Line(what, "ok", f"is in {namespace}"))
        elif "NotFound" in done.stderr:
            hint = f"make it (manifests/overlays/*/runs), or set the field that names {name} to null"
            optional = kind == "secret" and name in (own.s3_secret, own.mlflow_secret, own.hf_secret)
            lines.append(Line(what, "warning" if optional else "error", f"is not in {namespace}", hint))
        else:
            lines.append(Line(what, "warning", f"not checked: {done.stderr.strip()[:200]}", "check kubectl's context"))
    return lines


def _guard(what: str, look: Callable[[], Line]) -> Line:
    """A check that raises an explained error is a line too."""
    try:
        return look()
    except PtlError as error:
        said, _, remedy = str(error).rpartition("; ")
        return Line(what, "error", said or remedy, remedy if said else "see the message")


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
