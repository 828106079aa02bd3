"""What the doctor checks of a cluster: images, Kubeflow's version, the objects that the config names, Trainer."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import yaml

from ptl.config.cluster import TRAINED
from ptl.config.image_names import with_options
from ptl.config.run import Config
from ptl.errors import InputError
from ptl.preflight import in_cluster
from ptl.preflight.finding import DoubtError, Finding, as_finding
from ptl.preflight.in_cluster import NoSuchObjectError

OLDEST = "2.14"  # release of Kubeflow Pipelines
CONTROLLER = "workflow-controller-configmap"  # Argo's, in the namespace of Kubeflow
ONLY_DELETED_PODS = ("OnError", "OnTransientError")  # retry policies under which no failed pod is started again
TRAINER_API = "/apis/trainer.kubeflow.org/v1alpha1"
INSTALL = "docs/install.md, Kubeflow Trainer"

Health = Callable[[], dict[str, Any]]  # Kubeflow's answer: tag_name, multi_user. Raises PtlError


def images(config: Config) -> str:
    """The steps' images are in the registry, from which the cluster pulls them."""
    names = config.image_names()
    listed = ", ".join(names)
    options = with_options(config.optional_images())
    # Nodes that hold the images already (kind, minikube) need no registry.
    if config.resources.image_pull_policy == "Never":
        return f"the nodes must hold {listed}: resources.image_pull_policy is Never"
    if not config.images.registry:
        raise InputError(
            "images.registry is not set: a cluster cannot pull from the Docker engine of this machine",
            remedy=f"ptl images push --registry HOST/PATH{options}, and set images.registry to it; where the nodes "
            "hold the images already (kind load), set resources.image_pull_policy: Never",
        )
    for name in names:
        _check_pullable(name, options)
    return f"{listed} can be pulled"


def _check_pullable(name: str, options: str) -> None:
    """Ask the registry with the login of the docker command. `options` are for building the run's images."""
    try:
        command = ["docker", "manifest", "inspect", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        reason = done.stderr.strip()[:200] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"docker gave no answer ({type(error).__name__})"
    if re.search("no such manifest|manifest.unknown", reason, re.IGNORECASE):
        raise InputError(
            f"{name} is not in the registry, or hidden from this login",
            remedy=f"ptl images build{options}, then ptl images push{options}, with this registry and tag; or correct "
            "images.registry",
        )
    if reason:
        raise DoubtError(
            f"{name} was not checked: {reason}",
            remedy="log in (docker login), and make sure that resources.image_pull_secrets names a Secret for it",
        )


def kubeflow(config: Config, health: Health | None) -> str:
    """Kubeflow answers, in a version that takes the compiled YAML."""
    if health is None:
        raise DoubtError(
            "not checked: neither --host nor KF_PIPELINES_ENDPOINT is set",
            remedy="give the address of the API; `ptl submit` needs it too",
        )
    version = str(health().get("tag_name"))
    release = re.match(r"v?(\d+)\.(\d+)", version)
    if release is None:  # a build of somebody's own may have any tag
        raise DoubtError(f"answers, with version {version!r}", remedy=f"make sure that it is {OLDEST} or newer")
    number = tuple(map(int, release.groups()))
    # An older backend refuses fields that it does not know.
    if number < config.resources.kfp_release:
        raise InputError(
            f"it is {version}, the YAML is compiled for {config.resources.kfp} and newer",
            remedy=f'upgrade Kubeflow Pipelines, or compile for it, from {OLDEST} on: resources.kfp: "{release[1]}.'
            f'{release[2]}"',
        )
    return f"it is {version}"


def retry_policy(kubeflow_namespace: str) -> str:
    """The workflow controller's default retries start no failed pod again."""
    config_map = in_cluster.read(f"/api/v1/namespaces/{kubeflow_namespace}/configmaps/{CONTROLLER}")
    # Each level may be missing, or null.
    section = yaml.safe_load((config_map.get("data") or {}).get("workflowDefaults", ""))
    for key in ("spec", "templateDefaults", "retryStrategy"):
        section = (section or {}).get(key)
    if section is None:
        return "no default: failed attempts are repeated in the step's pod"
    policy = section.get("retryPolicy") or "OnFailure"  # Argo's own default
    if policy in ONLY_DELETED_PODS:
        return f"{policy}: failed attempts are repeated in the step's pod"
    raise DoubtError(
        f"{policy} (limit {section.get('limit', 'none')}) is the default for every template, so the cluster repeats a "
        "failed step at every level of the DAG: with a limit of 2, one was started 36 times. Attempts are counted in "
        "the store: each pod after resources.retries + 1 ends at once, but it is started and waited for",
        remedy=f"ask the administrator for retryPolicy: OnError in {CONTROLLER} (Kubeflow 2.17's own), or no default",
    )


def objects(config: Config, namespace: str | None) -> list[Finding]:
    """In the runs' namespace what the config names: ConfigMaps, Secrets, a claim, and for several nodes Trainer."""
    if namespace is None:
        remedy = "give --namespace, or set KFP_NAMESPACE: your profile in multi-user Kubeflow, else Kubeflow's own"
        return [Finding("objects", "warning", "not checked: the namespace of the run is not known", remedy)]
    storage = config.storage
    # Without the former no run works; without the latter one may: a cloud identity needs no keys, a public model no
    # token, and without a bundle the steps trust the public CAs.
    needed = [("configmap", storage.config_map), ("persistentvolumeclaim", storage.cache_claim)]
    needed += [("secret", name) for name in config.resources.image_pull_secrets]
    optional = [("configmap", storage.ca_config_map), ("secret", storage.s3_secret)]
    optional += [("secret", storage.mlflow_secret), ("secret", storage.hf_secret)]
    findings = []
    for missing, names in ((InputError, needed), (DoubtError, optional)):
        for kind, name in names:
            if name is None:
                continue
            path = f"/api/v1/namespaces/{namespace}/{kind}s/{name}"
            remedy = f"make it (manifests/overlays/*/runs), or set the field that names {name} to null"
            findings.append(
                as_finding(
                    f"{kind} {name}",
                    _exists,
                    path,
                    missing(f"is not in {namespace}", remedy=remedy),
                )
            )
    return findings + trainer(config, namespace)


def trainer(config: Config, namespace: str) -> list[Finding]:
    """What a recovery on several nodes needs: Kubeflow Trainer and the TrainingRuntime; nothing on single nodes."""
    if config.resources.nodes_of(TRAINED) == 1:
        return []
    name = config.resources.of_step(TRAINED).runtime
    no_trainer = InputError(
        "is not installed, and recover on several nodes needs it",
        remedy=f"install Kubeflow Trainer 2.3 ({INSTALL}), or remove resources.steps.recover.nodes",
    )
    no_runtime = InputError(
        f"is not in {namespace}", remedy=f"make it ({INSTALL}), or set resources.steps.recover.runtime"
    )
    return [
        as_finding("Kubeflow Trainer", _exists, TRAINER_API, no_trainer),
        as_finding(
            f"trainingruntime {name}",
            _exists,
            f"{TRAINER_API}/namespaces/{namespace}/trainingruntimes/{name}",
            no_runtime,
        ),
    ]


def _exists(path: str, missing: InputError) -> str:
    try:
        in_cluster.read(path)
    except NoSuchObjectError as error:
        raise missing from error
    return "is there"
