"""The Kubernetes settings of a task, all from the config's `resources` and `storage`; local runners ignore them."""

from typing import Any

from kfp import kubernetes

from ptl import mounts
from ptl.cluster_config import Resources, Storage
from ptl.config import Config
from ptl.retries import RETRY_WAIT

WORK = ("prune", "recover", "evaluate")  # the steps that need accelerators and their nodes
RUN_ID = "metadata.labels['pipeline/runid']"
ATTEMPT = "metadata.annotations['workflows.argoproj.io/node-name']"  # counts Argo's attempts, at each of its levels


def configure(task: Any, stage: str, config: Config) -> Any:
    """Give a task of this stage everything it needs on a cluster."""
    wanted = config.resources
    # A result taken from another run's cache has no record in this run: repeated steps take the store's records.
    task.set_caching_options(False)
    _compute(task, stage, wanted)
    _placement(task, stage, wanted)
    _attempts(task, stage, wanted)
    _environment(task, config.storage)
    _volumes(task, config.storage)
    return task


def _compute(task: Any, stage: str, wanted: Resources) -> None:
    own = wanted.of_step(stage)
    accelerators = _first(own.accelerators, wanted.accelerators if stage in WORK else 0)
    if accelerators:
        task.set_accelerator_type(wanted.accelerator).set_accelerator_limit(accelerators)
    cpu, memory = _first(own.cpu, wanted.cpu), _first(own.memory, wanted.memory)
    if cpu:
        task.set_cpu_request(cpu).set_cpu_limit(cpu)
    if memory:
        task.set_memory_request(memory).set_memory_limit(memory)
    shm = _first(own.shm, wanted.shm if stage in WORK else None)
    if shm:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=shm)


def _attempts(task: Any, stage: str, wanted: Resources) -> None:
    """A step tries again by itself (ptl.supervisor), and Argo starts a pod anew that was deleted or evicted.

    Both in one window: Argo's `maxDuration` begins with the first attempt, and so does the pod's deadline.
    """
    window, timeout = wanted.window(stage), wanted.work_timeout(stage)
    if timeout is not None:
        kubernetes.set_timeout(task, window)
        task.set_env_variable("PTL_TIMEOUT", str(timeout))
    if wanted.retries is not None:
        task.set_env_variable("PTL_RETRIES", str(wanted.retries))
    if wanted.retry_wait != RETRY_WAIT:
        task.set_env_variable("PTL_RETRY_WAIT", str(wanted.retry_wait))
    task.set_retry(
        wanted.attempts - 1,
        backoff_duration=f"{wanted.retry_wait}s",
        backoff_factor=2.0,
        backoff_max_duration=f"{window}s",
    )


def _placement(task: Any, stage: str, wanted: Resources) -> None:
    if stage in WORK:
        for taint in wanted.tolerations:
            kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)
        for label, value in sorted(wanted.node_selector.items()):
            kubernetes.add_node_selector(task, label, value)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "ptl")  # the network policies select it
    if wanted.queue:
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", wanted.queue)
    if wanted.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(wanted.image_pull_secrets))
    if wanted.image_pull_policy:
        kubernetes.set_image_pull_policy(task, wanted.image_pull_policy)
    if wanted.kfp_release >= (2, 16):
        kubernetes.set_security_context(task, wanted.run_as_user, wanted.run_as_group, run_as_non_root=True)


def _environment(task: Any, storage: Storage) -> None:
    # By field path: as inputs they would be other values in each run.
    for variable, path in (("KFP_RUN_ID", RUN_ID), ("PTL_ARGO_NODE", ATTEMPT), ("PTL_NODE", "spec.nodeName")):
        kubernetes.use_field_path_as_env(task, variable, path)
    keys = (storage.s3_access_key, storage.s3_secret_key)
    for (variable, usual), key in zip(mounts.S3_KEYS.items(), keys, strict=True):
        if storage.s3_secret and key != usual:
            task.set_env_variable(variable, key)
    if storage.cache_claim:
        task.set_env_variable("HF_HOME", mounts.HF_HOME)


def _volumes(task: Any, storage: Storage) -> None:
    """All optional: a pod that misses one starts and says so, instead of hanging before its container exists."""
    secrets = {storage.hf_secret: mounts.HF, storage.mlflow_secret: mounts.MLFLOW, storage.s3_secret: mounts.S3}
    for name, folder in secrets.items():  # one Secret that serves for several is mounted once
        if name:
            kubernetes.use_secret_as_volume(task, name, folder, optional=True)
    for name, folder in ((storage.config_map, mounts.CONFIG), (storage.ca_config_map, mounts.CA)):
        if name:
            kubernetes.use_config_map_as_volume(task, name, folder, optional=True)
    if storage.cache_claim:
        kubernetes.mount_pvc(task, storage.cache_claim, mounts.CACHE)


def _first(own: Any, common: Any) -> Any:
    return common if own is None else own
