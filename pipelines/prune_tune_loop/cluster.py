"""The Kubernetes settings of a task, all from the config's `resources` and `storage`; local runners ignore them."""

from typing import Any

import kfp.kubernetes as kubernetes

from pipelines.prune_tune_loop import train_job, volumes
from ptl.config.cluster import Resources, Storage
from ptl.config.run import Config
from ptl.recovery import machines
from ptl.steps import mounts, trainjob

# The stages that need accelerators and their nodes.
ACCELERATED = ("prune", "recover", "evaluate", "export-compressed-tensors")
# Variables of a pod's own fields. As inputs of the task they would have other values in each run.
FIELD_VARIABLES = {
    "KFP_RUN_ID": "metadata.labels['pipeline/runid']",
    "PTL_ARGO_NODE": "metadata.annotations['workflows.argoproj.io/node-name']",  # counts Argo's attempts, at each level
    "PTL_NODE": "spec.nodeName",
}


def configure(task: Any, stage: str, config: Config) -> Any:
    """Give a task of this stage everything it needs on a cluster."""
    # A result taken from another run's cache has no record in this run: repeated steps take the store's records.
    task.set_caching_options(False)
    coordinates = config.resources.nodes_of(stage) > 1
    if coordinates:
        _set_nodes(task, stage, config)
    else:
        _set_compute(task, stage, config.resources)
    _set_placement(task, stage, config.resources, waits_for_nodes=coordinates)
    _set_attempts(task, stage, config.resources)
    _set_environment(task, config.storage)
    _mount_volumes(task, config.storage)
    return task


def _set_compute(task: Any, stage: str, resources: Resources) -> None:
    own = resources.of_step(stage)
    # Shared memory is common to the accelerated stages only; any stage may ask for its own.
    accelerators = resources.accelerators_of(stage)
    shm = _own_or_common(own.shm, resources.shm if stage in ACCELERATED else None)
    cpu = _own_or_common(own.cpu, resources.cpu)
    memory = _own_or_common(own.memory, resources.memory)
    if accelerators:
        task.set_accelerator_type(resources.accelerator)
        task.set_accelerator_limit(accelerators)
    _request(task, cpu, memory)
    if shm:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=shm)


def _set_nodes(task: Any, stage: str, config: Config) -> None:
    """The pod only starts a TrainJob and follows it; on one machine the step does the work of all nodes itself."""
    own = config.resources.of_step(stage)
    task.set_env_variable(machines.NODES, str(own.nodes))
    task.set_env_variable(trainjob.TEMPLATE, train_job.template(config, task.container_spec.image))
    _request(task, train_job.COORDINATOR_CPU, train_job.COORDINATOR_MEMORY)


def _request(task: Any, cpu: str | None, memory: str | None) -> None:
    """Requests equal limits, as in a pod of the class Guaranteed, which is evicted last."""
    if cpu:
        task.set_cpu_request(cpu)
        task.set_cpu_limit(cpu)
    if memory:
        task.set_memory_request(memory)
        task.set_memory_limit(memory)


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
    task.set_retry(
        resources.attempts - 1,
        backoff_duration=f"{resources.retry_wait}s",
        backoff_factor=2.0,
        backoff_max_duration=f"{window}s",
    )


def _set_placement(task: Any, stage: str, resources: Resources, *, waits_for_nodes: bool) -> None:
    # A pod that waits for nodes needs none of their kind itself, and no place in their queue.
    if stage in ACCELERATED and not waits_for_nodes:
        for taint in resources.tolerations:
            kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)
        for label, value in sorted(resources.node_selector.items()):
            kubernetes.add_node_selector(task, label, value)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "ptl")  # the network policies select it
    if resources.queue and not waits_for_nodes:
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", resources.queue)
    if resources.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(resources.image_pull_secrets))
    if resources.image_pull_policy:
        kubernetes.set_image_pull_policy(task, resources.image_pull_policy)
    # Older backends refuse a field that they do not know.
    if resources.kfp_release >= (2, 16):
        kubernetes.set_security_context(task, resources.run_as_user, resources.run_as_group, run_as_non_root=True)


def _set_environment(task: Any, storage: Storage) -> None:
    for variable, path in FIELD_VARIABLES.items():
        kubernetes.use_field_path_as_env(task, variable, path)
    for variable, key in volumes.renamed_keys(storage).items():
        task.set_env_variable(variable, key)
    if storage.cache_claim:
        task.set_env_variable("HF_HOME", mounts.HF_HOME)


def _mount_volumes(task: Any, storage: Storage) -> None:
    """All optional: a pod that misses one starts and says so, instead of hanging before its container exists."""
    for name, folder in volumes.secrets(storage).items():
        kubernetes.use_secret_as_volume(task, name, folder, optional=True)
    for name, folder in volumes.config_maps(storage).items():
        kubernetes.use_config_map_as_volume(task, name, folder, optional=True)
    if storage.cache_claim:
        kubernetes.mount_pvc(task, storage.cache_claim, mounts.CACHE)


def _own_or_common(own: Any, common: Any) -> Any:
    return common if own is None else own
