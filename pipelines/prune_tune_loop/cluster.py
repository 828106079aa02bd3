"""The Kubernetes settings of a task, all from the config's `resources` and `storage`; local runners ignore them.

A recover step of several nodes starts a TrainJob of Kubeflow Trainer: its pod is then a coordinator
(ptl.steps.coordinator), which adds its name, its call and its run. What no TrainJob can set of a pod is in the
TrainingRuntime, manifests/components/trainer.
"""

import json
from typing import Any

import kfp.kubernetes as kubernetes

from ptl.config.cluster import TRAINED, Resources, Storage
from ptl.config.run import Config
from ptl.recovery.job import NODES
from ptl.steps import mounts, trainjob

# The stages that need accelerators and their nodes.
ACCELERATED = ("prune", "recover", "evaluate", "export-compressed-tensors")
# Variables of a pod's own fields. As inputs of the task they would have other values in each run.
FIELD_VARIABLES = {
    "KFP_RUN_ID": "metadata.labels['pipeline/runid']",
    # counts Argo's attempts, at each level
    "PTL_ARGO_NODE": "metadata.annotations['workflows.argoproj.io/node-name']",
}
PART_OF = {"app.kubernetes.io/part-of": "ptl"}  # the network policies select it
QUEUE = "kueue.x-k8s.io/queue-name"
Json = dict[str, Any]
# What a coordinator takes: it imports MLflow and S3's client, takes over what an earlier run has made, or waits.
COORDINATOR_CPU = "1"
COORDINATOR_MEMORY = "4Gi"


def configure(task: Any, stage: str, config: Config) -> Any:
    """Give a task of this stage everything it needs on a cluster."""
    resources = config.resources
    own = resources.of_step(stage)
    # A result taken from another run's cache has no record in this run: repeated steps take the store's records.
    task.set_caching_options(False)
    # The pod then only starts a TrainJob and follows it.
    coordinates = resources.nodes_of(stage) > 1
    if coordinates:
        task.set_env_variable(NODES, str(own.nodes))
        task.set_env_variable(trainjob.TEMPLATE, train_job(config, task.container_spec.image))
        _request(task, COORDINATOR_CPU, COORDINATOR_MEMORY)
    else:
        accelerators = resources.accelerators_of(stage)
        if accelerators:
            task.set_accelerator_type(resources.accelerator)
            task.set_accelerator_limit(accelerators)
        _request(task, own.cpu or resources.cpu, own.memory or resources.memory)
        # Shared memory is common to the accelerated stages only; any stage may ask for its own.
        shm = resources.shm if own.shm is None and stage in ACCELERATED else own.shm
        if shm:
            kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=shm)
    _set_placement(task, stage, resources, waits_for_nodes=coordinates)
    _set_attempts(task, stage, resources)
    for variable, path in FIELD_VARIABLES.items():
        kubernetes.use_field_path_as_env(task, variable, path)
    for variable, value in _variables(config.storage).items():
        task.set_env_variable(variable, value)
    # All optional: a pod that misses one starts and says so, instead of hanging before its container exists.
    for kind, name, folder in _volumes(config.storage):
        if kind == "secret":
            kubernetes.use_secret_as_volume(task, name, folder, optional=True)
        elif kind == "configMap":
            kubernetes.use_config_map_as_volume(task, name, folder, optional=True)
        else:
            kubernetes.mount_pvc(task, name, folder)
    return task


def _request(task: Any, cpu: str | None, memory: str | None) -> None:
    """Requests equal limits, as in a pod of the class Guaranteed, which is evicted last."""
    if cpu:
        task.set_cpu_request(cpu).set_cpu_limit(cpu)
    if memory:
        task.set_memory_request(memory).set_memory_limit(memory)


def _set_attempts(task: Any, stage: str, resources: Resources) -> None:
    """A step tries again by itself (ptl.steps.supervisor), and Argo starts a pod anew that was deleted or evicted.

    Both within one window: Argo's `maxDuration` begins with the first attempt, and so does the pod's deadline.
    """
    window = resources.window(stage)
    timeout = resources.work_timeout(stage)
    # What equals the default is not written: it would be bytes in each task.
    if timeout is not None:
        kubernetes.set_timeout(task, window)
        task.set_env_variable("PTL_TIMEOUT", str(timeout))
    if resources.retries is not None:
        task.set_env_variable("PTL_RETRIES", str(resources.retries))
    task.set_retry(resources.attempts - 1, f"{resources.retry_wait}s", 2.0, f"{window}s")


def _set_placement(task: Any, stage: str, resources: Resources, *, waits_for_nodes: bool) -> None:
    # A pod that waits for nodes needs none of their kind itself, and no place in their queue.
    if stage in ACCELERATED and not waits_for_nodes:
        for taint in resources.tolerations:
            kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)
        for label, value in sorted(resources.node_selector.items()):
            kubernetes.add_node_selector(task, label, value)
    for label, value in _labels("" if waits_for_nodes else resources.queue).items():
        kubernetes.add_pod_label(task, label, value)
    if resources.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(resources.image_pull_secrets))
    if resources.image_pull_policy:
        kubernetes.set_image_pull_policy(task, resources.image_pull_policy)
    # Older backends refuse a field that they do not know.
    if resources.kfp_release >= (2, 16):
        kubernetes.set_security_context(
            task, resources.run_as_user, resources.run_as_group, run_as_non_root=True
        )


def _labels(queue: str | None) -> dict[str, str]:
    return PART_OF | ({QUEUE: queue} if queue else {})


def _variables(storage: Storage) -> dict[str, str]:
    """Names of the S3 Secret's keys, where they are not the usual ones, as in KFP's own Secret; the hub's folder."""
    keys = (storage.s3_access_key, storage.s3_secret_key)
    names = dict(zip(mounts.S3_KEYS, keys, strict=True))
    variables = {
        variable: name for variable, name in names.items() if name != mounts.S3_KEYS[variable]
    }
    if not storage.s3_secret:
        variables = {}
    if storage.cache_claim:
        variables["HF_HOME"] = mounts.HF_HOME
    return variables


def _volumes(storage: Storage) -> list[tuple[str, str, str]]:
    """Kind, name and folder of each volume of a step's pod."""
    # By name: a Secret that serves for several is mounted once.
    secrets = {
        storage.hf_secret: mounts.HF,
        storage.mlflow_secret: mounts.MLFLOW,
        storage.s3_secret: mounts.S3,
    }
    config_maps = {storage.config_map: mounts.CONFIG, storage.ca_config_map: mounts.CA}
    volumes = [("secret", name, folder) for name, folder in secrets.items()]
    volumes += [("configMap", name, folder) for name, folder in config_maps.items()]
    volumes.append(("persistentVolumeClaim", storage.cache_claim, mounts.CACHE))
    return [(kind, name, folder) for kind, name, folder in volumes if name]


def train_job(config: Config, image: str) -> str:
    """The TrainJob of a recover step, as JSON, as far as the config says it."""
    resources = config.resources
    own = resources.of_step(TRAINED)
    amounts = {
        "cpu": own.cpu or resources.cpu,
        "memory": own.memory or resources.memory,
        resources.accelerator: str(resources.accelerators_of(TRAINED) or ""),
    }
    requested = {name: amount for name, amount in amounts.items() if name and amount}
    trainer = {
        "image": image,
        "command": ["python", "-m", "ptl.steps.node"],
        "env": [
            {"name": name, "value": value} for name, value in _variables(config.storage).items()
        ],
        "numNodes": own.nodes,
        # one, which starts a process for each accelerator
        "numProcPerNode": 1,
        "resourcesPerNode": {"requests": requested, "limits": requested},
    }
    # A runtime of one's own may lack them: the network policies select the one, and a sidecar would intercept NCCL.
    pod_labels = {**PART_OF, "sidecar.istio.io/inject": "false"}
    pod = {"metadata": {"labels": pod_labels}, "spec": _pod(config)}
    job_patch = {"name": trainjob.JOB, "template": {"spec": {"template": pod}}}
    job_set = {"spec": {"replicatedJobs": [job_patch]}}
    spec: Json = {
        "runtimeRef": {"apiGroup": trainjob.GROUP, "kind": "TrainingRuntime", "name": own.runtime},
        "trainer": trainer,
        "runtimePatches": [
            {"manager": trainjob.MANAGER, "trainingRuntimeSpec": {"template": job_set}}
        ],
    }
    if resources.timeout_of(TRAINED) is not None:
        # A coordinator that is killed cannot delete it.
        spec["activeDeadlineSeconds"] = resources.window(TRAINED)
    job = {
        "apiVersion": trainjob.API_VERSION,
        "kind": "TrainJob",
        "metadata": {"labels": _labels(resources.queue)},
        "spec": spec,
    }
    return json.dumps(job, separators=(",", ":"))


def _pod(config: Config) -> Json:
    """Placement, user and volumes of a node, as in the pods of the other steps."""
    resources = config.resources
    volumes: list[Json] = []
    volume_mounts = []
    for kind, name, folder in _volumes(config.storage):
        sources = {
            "secret": {"secretName": name, "optional": True},
            "configMap": {"name": name, "optional": True},
            "persistentVolumeClaim": {"claimName": name},
        }
        volumes.append({"name": name, kind: sources[kind]})
        volume_mounts.append({"name": name, "mountPath": folder})
    user = {
        "runAsNonRoot": True,
        "runAsUser": resources.run_as_user,
        "runAsGroup": resources.run_as_group,
    }
    taints = [
        {"operator": taint.operator, **taint.model_dump(exclude_none=True)}
        for taint in resources.tolerations
    ]
    pod = {
        "securityContext": user,
        "volumes": volumes,
        "containers": [{"name": trainjob.CONTAINER, "volumeMounts": volume_mounts}],
        "tolerations": taints,
        "nodeSelector": dict(sorted(resources.node_selector.items())),
        "imagePullSecrets": [{"name": name} for name in resources.image_pull_secrets],
    }
    return {field: value for field, value in pod.items() if value}
