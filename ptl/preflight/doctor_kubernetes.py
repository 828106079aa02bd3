"""What the doctor sees by kubectl: names of Secrets, the cluster's retry policy, Kubeflow's MLflow plugin.

Only names are read of Secrets. A kubectl that is missing or not allowed to look gives one warning, never an error.
"""

from __future__ import annotations

import json
import shutil
from typing import Any, Literal

import yaml

from ptl.config.run import Config
from ptl.preflight import kubectl
from ptl.preflight.finding import Finding
from ptl.preflight.kubectl import NoSuchObjectError, NotSeenError

CONTROLLER = "workflow-controller-configmap"  # Argo's, in the namespace of Kubeflow
API_SERVER = "ml-pipeline"  # Kubeflow's Deployment
MOUNTS = ("/config", "/config/config.json")  # where that has its config: the folder, or the file alone
IMAGE_CONFIG = (
    "the API server has the config of its image, in which no MLflow of yours is set (2.17.0's names an endpoint that "
    "does not answer, which Kubeflow ignores); ptl makes its own runs"
)
LAUNCHER = "kfp-launcher"  # the ConfigMap of a namespace that may override the plugin's settings
BEARER = ("kubernetes", "bearer")  # authTypes of the plugin that send a bearer token
ONLY_DELETED_PODS = ("OnError", "OnTransientError")  # retry policies under which no failed pod is started again

MAKE = "make it (manifests/overlays/*/runs), or set the field that names {name} to null"
MAKE_BUNDLE = (
    "make it with the key ca.crt, the PEM bundle of your organisation's CA, or set storage.ca_config_map to null; "
    "without it the steps trust the public CAs only"
)


def cluster_objects(config: Config, namespace: str | None, kubeflow_namespace: str) -> list[Finding]:
    """Everything that kubectl is asked. `namespace` is where the steps' pods start, None if nobody says it."""
    if shutil.which("kubectl") is None:
        return [
            Finding(
                "kubectl",
                "warning",
                "Secrets, retry policy and MLflow plugin were not checked: kubectl is not on PATH",
                "install it, or check by hand (docs/install.md)",
            )
        ]
    # First what Kubeflow's own namespace says, which not everybody may read.
    findings = [retry_policy(kubeflow_namespace), plugin(kubeflow_namespace, namespace)]
    if namespace is None:
        return [
            *findings,
            Finding(
                "Secrets and ConfigMaps",
                "warning",
                "not checked: the namespace of the run is not known",
                "give --namespace, or set KFP_NAMESPACE: your profile in multi-user Kubeflow",
            ),
        ]
    return [*findings, *objects(config, namespace)]


def objects(config: Config, namespace: str) -> list[Finding]:
    """ConfigMaps, Secrets and the claim that the config names exist."""
    storage = config.storage
    # Kind and name of each object, and state and remedy where it is missing.
    names: list[tuple[str, str | None, Literal["warning", "error"], str]] = [
        # Without these no run works: MLflow's address, and a volume that pods wait for.
        ("configmap", storage.config_map, "error", MAKE),
        ("persistentvolumeclaim", storage.cache_claim, "error", MAKE),
        # Without these a run may work: a cloud identity needs no keys, a public model no token.
        ("configmap", storage.ca_config_map, "warning", MAKE_BUNDLE),
        ("secret", storage.s3_secret, "warning", MAKE),
        ("secret", storage.mlflow_secret, "warning", MAKE),
        ("secret", storage.hf_secret, "warning", MAKE),
        *[("secret", name, "error", MAKE) for name in config.resources.image_pull_secrets],
    ]
    return [_exists(kind, name, namespace, absent, remedy) for kind, name, absent, remedy in names if name is not None]


def _exists(kind: str, name: str, namespace: str, absent: Literal["warning", "error"], remedy: str) -> Finding:
    """Whether an object exists; `absent` is what a run without it is."""
    subject = f"{kind} {name}"
    try:
        kubectl.get(kind, name, namespace, "name")
    except NoSuchObjectError:
        return Finding(subject, absent, f"is not in {namespace}", remedy.format(name=name))
    except NotSeenError as error:
        return Finding(subject, "warning", f"not checked: {error}", "check kubectl's context and your rights")
    return Finding(subject, "ok", f"is in {namespace}")


def retry_policy(kubeflow_namespace: str) -> Finding:
    """What the workflow controller's default retries do to a step's attempts."""
    subject = "retry policy"
    try:
        policy = _default_retries(_config_map(CONTROLLER, kubeflow_namespace))
    except NotSeenError as error:
        return _not_seen(subject, error)
    in_pod = "failed attempts are repeated inside the step's pod (resources.retries)"
    # Without a default the task's own retries hold, which ptl sets together with those in the pod.
    if policy is None:
        return Finding(
            subject,
            "ok",
            "the cluster sets no default: Argo repeats a task's failed pods, as often as the task says; "
            f"{in_pod}, and all attempts count together",
        )
    # A default is inherited by every template: by steps, and by the DAGs around them.
    name = policy.get("retryPolicy") or "OnFailure"  # Argo's own default
    if name in ONLY_DELETED_PODS:
        return Finding(
            subject, "ok", f"{name}: the cluster starts only pods again that were deleted or evicted; {in_pod}"
        )
    limit = policy.get("limit", "no limit")
    return Finding(
        subject,
        "warning",
        f"{name} (limit {limit}) is the default for every template, so the cluster repeats a failed step at every "
        "level of the DAG: with a limit of 2, one failing step was started 36 times. ptl counts attempts in the store: "
        "after resources.retries + 1 of them each further pod ends at once, but it is started and waited for",
        f"ask the administrator for retryPolicy: OnError in {CONTROLLER} (Kubeflow 2.17's own), or for no default",
    )


def _default_retries(data: dict[str, str]) -> dict[str, Any] | None:
    """templateDefaults.retryStrategy of the controller's ConfigMap; older ones hold everything in the key `config`."""
    try:
        if "workflowDefaults" in data:
            section = yaml.safe_load(data["workflowDefaults"])
        else:
            older = yaml.safe_load(data.get("config", "")) or {}
            section = older.get("workflowDefaults")
        # Each level may be missing, or null.
        for key in ("spec", "templateDefaults", "retryStrategy"):
            section = (section or {}).get(key)
    except (yaml.YAMLError, AttributeError) as error:
        raise NotSeenError(f"{CONTROLLER} cannot be read ({type(error).__name__})") from error
    return section if isinstance(section, dict) else None


def plugin(kubeflow_namespace: str, namespace: str | None) -> Finding:
    """Whether Kubeflow's own MLflow plugin is on, and what that means for the runs that the steps make."""
    subject = "MLflow plugin"
    try:
        mounted = _mounted_config(kubeflow_namespace)
        if mounted is None:
            return Finding(subject, "ok", IMAGE_CONFIG)
        settings = _plugin_settings(_config_map(mounted, kubeflow_namespace), namespace)
        if settings is None:
            return Finding(subject, "ok", "off; ptl makes its own runs")
        injects = _injects_by_namespace(namespace)
    except NotSeenError as error:
        return _not_seen(subject, error)
    # Whether the steps get the plugin's run by environment variables.
    if injects is None:
        injects = settings.get("injectUserEnvVars")

    # Both are allowed: ptl's runs take the plugin's as their parent where there is one.
    login = settings.get("authType", "kubernetes")
    message = f"on ({settings['endpoint']}, login {login})"
    if injects:
        message += ", and injects its run into the steps: ptl's runs hang below the plugin's"
    else:
        message += " without injectUserEnvVars: it keeps runs of its own beside ptl's"
    # The manifests' own MLflow has basic auth.
    if login not in BEARER:
        return Finding(subject, "ok", message)
    return Finding(
        subject,
        "warning",
        message,
        "it sends a bearer token, which an MLflow with basic auth (manifests/base/mlflow) refuses: give the plugin an "
        "MLflow that takes it, or authType basic-auth with its Secret",
    )


def _mounted_config(kubeflow_namespace: str) -> str | None:
    """Name of the ConfigMap that is mounted as the API server's config.json; None if the image's own is used."""
    deployment = kubectl.get_json("deployment", API_SERVER, kubeflow_namespace)
    pod = deployment["spec"]["template"]["spec"]

    # Volumes that are mounted at the config's path, and the one among them that is a ConfigMap.
    mounts = [mount for container in pod["containers"] for mount in container.get("volumeMounts", [])]
    volumes = {mount["name"] for mount in mounts if mount["mountPath"].rstrip("/") in MOUNTS}
    for volume in pod.get("volumes", []):
        if volume["name"] in volumes and "configMap" in volume:
            return str(volume["configMap"]["name"])
    return None


def _plugin_settings(data: dict[str, str], namespace: str | None) -> dict[str, Any] | None:
    """Settings and endpoint of the API server's plugins.mlflow for this namespace; None where the plugin is off."""
    try:
        config = json.loads(data.get("config.json", "{}"))
        common = config.get("plugins", {}).get("mlflow")
        if common is None:
            return None
        # A namespace may have values of its own; its settings are merged, not replaced.
        own = common.get("namespaces", {}).get(namespace or "", {})
        endpoint = own.get("endpoint", common.get("endpoint", "no endpoint"))
        return {**common.get("settings", {}), **own.get("settings", {}), "endpoint": endpoint}
    except (ValueError, AttributeError) as error:
        raise NotSeenError(f"the API server's config.json cannot be read ({type(error).__name__})") from error


def _injects_by_namespace(namespace: str | None) -> Any:
    """injectUserEnvVars as the run's namespace sets it in its own ConfigMap; None where it does not."""
    if namespace is None:
        return None
    try:
        data = _config_map(LAUNCHER, namespace)
        overrides = json.loads(data.get("plugins.mlflow", "{}"))
        return overrides.get("settings", {}).get("injectUserEnvVars")
    except NoSuchObjectError:
        return None
    except (ValueError, AttributeError) as error:
        raise NotSeenError(f"{LAUNCHER} in {namespace}: plugins.mlflow is not JSON ({error})") from error


def _not_seen(subject: str, error: NotSeenError) -> Finding:
    return Finding(
        subject,
        "warning",
        f"not checked: {error}",
        "somebody who may read Kubeflow's namespace can check it; --kubeflow-namespace names another one than kubeflow",
    )


def _config_map(name: str, namespace: str) -> dict[str, str]:
    config_map = kubectl.get_json("configmap", name, namespace)
    return dict(config_map.get("data") or {})
