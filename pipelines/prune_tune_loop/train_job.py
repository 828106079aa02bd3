"""The TrainJob of Kubeflow Trainer that a recover step of several nodes starts, as far as the config says it.

The step's pod is then a coordinator (ptl.steps.coordinator), which adds its name, its call and its run. What no
TrainJob can set of a pod is in the TrainingRuntime, manifests/components/trainer.
"""

import json
from typing import Any

from pipelines.prune_tune_loop import volumes
from ptl.config.cluster import TRAINED, Resources, Storage
from ptl.config.run import Config
from ptl.steps import mounts
from ptl.steps.trainjob import API_VERSION, CONTAINER, GROUP, JOB, MANAGER

# What a coordinator takes: it imports MLflow and S3's client, takes over what an earlier run has made, or waits.
COORDINATOR_CPU = "1"
COORDINATOR_MEMORY = "4Gi"


def template(config: Config, image: str) -> str:
    """The TrainJob as JSON."""
    resources = config.resources
    own = resources.of_step(TRAINED)
    labels = {"app.kubernetes.io/part-of": "ptl"}
    if resources.queue:
        labels["kueue.x-k8s.io/queue-name"] = resources.queue
    trainer = {
        "image": image,
        "command": ["python", "-m", "ptl.steps.node"],
        "env": _environment(config.storage),
        "numNodes": own.nodes,
        # one, which starts a process for each accelerator
        "numProcPerNode": 1,
        "resourcesPerNode": _resources(resources),
    }
    # A runtime of one's own may lack them: the network policies select the one, and a sidecar would intercept NCCL.
    pod_labels = {"app.kubernetes.io/part-of": "ptl", "sidecar.istio.io/inject": "false"}
    pod = {"metadata": {"labels": pod_labels}, "spec": _pod(config)}
    job_patch = {"name": JOB, "template": {"spec": {"template": pod}}}
    job_set = {"spec": {"replicatedJobs": [job_patch]}}
    job: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": {"labels": labels},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": own.runtime},
            "trainer": trainer,
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": job_set}}],
        },
    }
    if resources.timeout_of(TRAINED) is not None:
        # A coordinator that is killed cannot delete it.
        job["spec"]["activeDeadlineSeconds"] = resources.window(TRAINED)
    return json.dumps(job, separators=(",", ":"))


def _resources(resources: Resources) -> dict[str, Any]:
    """What each node requests, which is also its limit."""
    own = resources.of_step(TRAINED)
    amounts = {"cpu": own.cpu or resources.cpu, "memory": own.memory or resources.memory}
    accelerators = resources.accelerators_of(TRAINED)
    if accelerators and resources.accelerator:
        amounts[resources.accelerator] = str(accelerators)
    requested = {name: amount for name, amount in amounts.items() if amount}
    return {"requests": requested, "limits": requested}


def _environment(storage: Storage) -> list[dict[str, Any]]:
    """Variables of a node that are the same in every run."""
    variables: list[dict[str, Any]] = [
        {"name": "PTL_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ]
    variables += [{"name": name, "value": key} for name, key in volumes.renamed_keys(storage).items()]
    if storage.cache_claim:
        variables.append({"name": "HF_HOME", "value": mounts.HF_HOME})
    return variables


def _pod(config: Config) -> dict[str, Any]:
    """Placement, user and volumes of a node, as in the pods of the other steps."""
    resources = config.resources
    pod_volumes, volume_mounts = _volumes(config.storage)
    pod: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": resources.run_as_user,
            "runAsGroup": resources.run_as_group,
        },
        "volumes": pod_volumes,
        "containers": [{"name": CONTAINER, "volumeMounts": volume_mounts}],
    }
    if resources.tolerations:
        pod["tolerations"] = [
            {"operator": taint.operator, **taint.model_dump(exclude_none=True)} for taint in resources.tolerations
        ]
    if resources.node_selector:
        pod["nodeSelector"] = dict(sorted(resources.node_selector.items()))
    if resources.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in resources.image_pull_secrets]
    return pod


def _volumes(storage: Storage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The volumes with addresses, credentials and the cache, and where they are mounted."""
    pod_volumes, volume_mounts = [], []
    for name, folder in volumes.secrets(storage).items():
        pod_volumes.append({"name": name, "secret": {"secretName": name, "optional": True}})
        volume_mounts.append({"name": name, "mountPath": folder})
    for name, folder in volumes.config_maps(storage).items():
        pod_volumes.append({"name": name, "configMap": {"name": name, "optional": True}})
        volume_mounts.append({"name": name, "mountPath": folder})
    if storage.cache_claim:
        name = storage.cache_claim
        pod_volumes.append({"name": name, "persistentVolumeClaim": {"claimName": name}})
        volume_mounts.append({"name": name, "mountPath": mounts.CACHE})
    return pod_volumes, volume_mounts
