"""What the doctor sees by kubectl: names of Secrets, the cluster's retry policy, Kubeflow's MLflow plugin.

Only names are read of Secrets. A kubectl that is missing or not allowed to look gives one warning, never an error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import yaml

from ptl.config import Config
from ptl.doctor_line import Line

SECONDS = 15
CONTROLLER = "workflow-controller-configmap"  # Argo's, in the namespace of Kubeflow
API_SERVER = "ml-pipeline"  # Kubeflow's Deployment
CONFIG_FOLDER = "/config"  # where that has its config.json
IMAGE_CONFIG = (
    "the API server has the config of its image, in which no MLflow of yours is set (2.17.0's names an endpoint that "
    "does not answer, which Kubeflow ignores); ptl makes its own runs"
)
LAUNCHER = "kfp-launcher"  # the ConfigMap of a namespace that may override the plugin's settings


class NotSeenError(Exception):
    """kubectl did not answer with the object; `missing` says that the cluster has none of that name."""

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


def cluster(config: Config, namespace: str | None, kubeflow_namespace: str) -> list[Line]:
    """Everything that kubectl is asked. `namespace` is where the steps' pods start, None if nobody says it."""
    if shutil.which("kubectl") is None:
        message = "Secrets, retry policy and MLflow plugin were not looked at: kubectl is not on PATH"
        return [Line("kubectl", "warning", message, "install it, or look by hand (docs/install.md)")]
    lines = [retry_policy(kubeflow_namespace), plugin(kubeflow_namespace, namespace)]
    if namespace is None:
        remedy = "give --namespace, or set KFP_NAMESPACE: your profile in multi-user Kubeflow"
        message = "not looked at: the namespace of the run is not known"
        return [*lines, Line("Secrets and ConfigMaps", "warning", message, remedy)]
    return [*lines, *objects(config, namespace)]


def objects(config: Config, namespace: str) -> list[Line]:
    """ConfigMaps, Secrets and the claim that the config names exist."""
    storage = config.storage
    # (kind, name, what a run without it is: an error, or a warning with the remedy)
    keys = "make it (manifests/overlays/*/runs), or set the field that names {name} to null"
    bundle = (
        "make it with the key ca.crt, the PEM bundle of your organisation's CA, or set storage.ca_config_map to null; "
        "without it the steps trust the public CAs only"
    )
    asked = [
        ("configmap", storage.config_map, "error", keys),
        ("persistentvolumeclaim", storage.cache_claim, "error", keys),
        ("configmap", storage.ca_config_map, "warning", bundle),
        *(("secret", name, "warning", keys) for name in (storage.s3_secret, storage.mlflow_secret, storage.hf_secret)),
        *(("secret", name, "error", keys) for name in config.resources.image_pull_secrets),
    ]
    return [_exists(namespace, kind, name, absent, remedy) for kind, name, absent, remedy in asked if name is not None]


def _exists(namespace: str, kind: str, name: str, absent: str, remedy: str) -> Line:
    what = f"{kind} {name}"
    try:
        _kubectl("get", kind, name, "--namespace", namespace, "--output", "name")
    except NotSeenError as error:
        if error.missing:
            return Line(what, absent, f"is not in {namespace}", remedy.format(name=name))
        return Line(what, "warning", f"not looked at: {error}", "check kubectl's context and your rights")
    return Line(what, "ok", f"is in {namespace}")


def retry_policy(kubeflow_namespace: str) -> Line:
    """What the workflow controller's default retries do to a step's attempts."""
    what = "retry policy"
    try:
        policy = _default_retries(_config_map(CONTROLLER, kubeflow_namespace))
    except NotSeenError as error:
        return _not_seen(what, error)
    own = "failed attempts are repeated inside the step's pod (resources.retries)"
    if policy is None:
        message = f"the cluster sets no default: Argo repeats a task's failed pods, as often as the task says; {own}"
        return Line(what, "ok", f"{message}, and all attempts count together")
    name, limit = policy.get("retryPolicy") or "OnFailure", policy.get("limit", "no limit")
    if name in ("OnError", "OnTransientError"):
        return Line(what, "ok", f"{name}: the cluster starts only pods again that were deleted or evicted; {own}")
    message = (
        f"{name} (limit {limit}) is the default for every template, so the cluster repeats a failed step at every "
        "level of the DAG: with a limit of 2, one failing step was started 36 times. ptl counts attempts in the store: "
        "after resources.retries + 1 of them each further pod ends at once, but it is started and waited for"
    )
    remedy = f"ask the administrator for retryPolicy: OnError in {CONTROLLER} (Kubeflow 2.17's own), or for no default"
    return Line(what, "warning", message, remedy)


def _default_retries(data: dict[str, str]) -> dict[str, Any] | None:
    """templateDefaults.retryStrategy of the controller's ConfigMap; older ones hold everything in the key `config`."""
    try:
        if "workflowDefaults" in data:
            found = yaml.safe_load(data["workflowDefaults"])
        else:
            found = (yaml.safe_load(data.get("config", "")) or {}).get("workflowDefaults")
        for key in ("spec", "templateDefaults", "retryStrategy"):
            found = (found or {}).get(key)
    except (yaml.YAMLError, AttributeError) as error:
        raise NotSeenError(f"{CONTROLLER} cannot be read ({type(error).__name__})") from error
    return found if isinstance(found, dict) else None


def plugin(kubeflow_namespace: str, namespace: str | None) -> Line:
    """Whether Kubeflow's own MLflow plugin is on, and what that means for the runs that the steps make."""
    what = "MLflow plugin"
    try:
        mounted = _mounted_config(kubeflow_namespace)
        if mounted is None:
            return Line(what, "ok", IMAGE_CONFIG)
        settings = _plugin_settings(_config_map(mounted, kubeflow_namespace).get("config.json", "{}"), namespace)
        if settings is None:
            return Line(what, "ok", "off; ptl makes its own runs")
        injects = _overridden(namespace, settings)
    except NotSeenError as error:
        return _not_seen(what, error)
    login = settings["authType"]
    message = f"on ({settings['endpoint']}, login {login})"
    if injects:
        message += ", and injects its run into the steps: ptl's runs hang below the plugin's"
    else:
        message += " without injectUserEnvVars: it keeps runs of its own beside ptl's"
    if login in ("kubernetes", "bearer"):
        remedy = (
            "it sends a bearer token, which an MLflow with basic auth (manifests/base/mlflow) refuses: give the plugin "
        )
        return Line(
            what, "warning", message, remedy + "an MLflow that takes it, or authType basic-auth with its Secret"
        )
    return Line(what, "ok", message)


def _mounted_config(kubeflow_namespace: str) -> str | None:
    """Name of the ConfigMap that is mounted as the API server's config.json; None if the image's own is used."""
    deployment = _json("get", "deployment", API_SERVER, "--namespace", kubeflow_namespace)
    pod = deployment["spec"]["template"]["spec"]
    mounts = [mount for container in pod["containers"] for mount in container.get("volumeMounts", [])]
    names = {
        mount["name"]
        for mount in mounts
        if mount["mountPath"].rstrip("/") in (CONFIG_FOLDER, f"{CONFIG_FOLDER}/config.json")
    }
    for volume in pod.get("volumes", []):
        if volume["name"] in names and "configMap" in volume:
            return str(volume["configMap"]["name"])
    return None


def _plugin_settings(text: str, namespace: str | None) -> dict[str, Any] | None:
    """endpoint, authType and injectUserEnvVars of plugins.mlflow for this namespace; None where the plugin is off."""
    try:
        common = json.loads(text).get("plugins", {}).get("mlflow")
        if common is None:
            return None
        own = common.get("namespaces", {}).get(namespace or "", {})
        merged = {**common, **own, "settings": {**common.get("settings", {}), **own.get("settings", {})}}
    except (ValueError, AttributeError) as error:
        raise NotSeenError(f"the API server's config.json cannot be read ({type(error).__name__})") from error
    settings = merged["settings"]
    return {
        "endpoint": merged.get("endpoint", "no endpoint"),
        "authType": settings.get("authType", "kubernetes"),
        "injectUserEnvVars": bool(settings.get("injectUserEnvVars")),
    }


def _overridden(namespace: str | None, settings: dict[str, Any]) -> bool:
    """injectUserEnvVars, which the run's namespace may override in its kfp-launcher ConfigMap."""
    own = None
    if namespace is not None:
        try:
            text = _config_map(LAUNCHER, namespace).get("plugins.mlflow", "{}")
            own = json.loads(text).get("settings", {}).get("injectUserEnvVars")
        except NotSeenError as error:
            if not error.missing:
                raise
        except (ValueError, AttributeError) as error:
            raise NotSeenError(f"{LAUNCHER} in {namespace}: plugins.mlflow is not JSON ({error})") from error
    return bool(settings["injectUserEnvVars"] if own is None else own)


def _not_seen(what: str, error: NotSeenError) -> Line:
    remedy = "somebody who may read Kubeflow's namespace can look; --kubeflow-namespace names another one than kubeflow"
    return Line(what, "warning", f"not looked at: {error}", remedy)


def _config_map(name: str, namespace: str) -> dict[str, str]:
    return dict(_json("get", "configmap", name, "--namespace", namespace).get("data") or {})


def _json(*arguments: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_kubectl(*arguments, "--output", "json")))
    except ValueError as error:
        raise NotSeenError(f"kubectl {' '.join(arguments[:3])} gave no JSON") from error


def _kubectl(*arguments: str) -> str:
    command = ["kubectl", *arguments, f"--request-timeout={SECONDS}s"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSeenError(f"kubectl gave no answer ({type(error).__name__})") from error
    if done.returncode != 0:
        message = done.stderr.strip()[:200] or f"kubectl ended with exit code {done.returncode}"
        raise NotSeenError(message, missing="NotFound" in done.stderr)
    return done.stdout
