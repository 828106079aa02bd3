"""The Kubernetes settings of a task, all from the config's `resources` and `storage`; local runners ignore them."""

from typing import Any

from kfp import kubernetes

from ptl.cluster_config import Resources, StepResources, Storage
from ptl.config import Config

WORK = ("prune", "recover", "evaluate")  # the steps that need accelerators and their nodes

# What the ConfigMap may hold: addresses belong to the cluster, so that one YAML runs on all of them.
ADDRESSES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "PTL_ARTIFACT_ROOT",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "AWS_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
)
MLFLOW_LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
# KFP 2.14 has no optional keys: these must be there.
ADDRESSES_2_14, MLFLOW_LOGIN_2_14 = ADDRESSES[:3], MLFLOW_LOGIN[:2]
CACHE = "/tmp/cache/huggingface"  # HF_HOME of the images
CA_FOLDER = "/etc/ptl/ca"


def configure(task: Any, stage: str, config: Config) -> Any:
    """Give a task of this stage everything it needs on a cluster."""
    wanted, storage = config.resources, config.storage
    # A result taken from another run's cache has no record in this run: repeated steps take the store's records.
    task.set_caching_options(False)
    _compute(task, stage, wanted)
    _placement(task, stage, wanted)
    _environment(task, storage, old=wanted.kfp == "2.14")
    _volumes(task, storage)
    return task


def _compute(task: Any, stage: str, wanted: Resources) -> None:
    own = wanted.steps.get(stage, StepResources())
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
    timeout = _first(own.timeout, wanted.timeout)
    if timeout:
        kubernetes.set_timeout(task, timeout)
    if wanted.retries:
        wait, longest = f"{wanted.retry_wait}s", f"{wanted.retry_wait_max}s"
        task.set_retry(wanted.retries, backoff_duration=wait, backoff_factor=2.0, backoff_max_duration=longest)


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
    if wanted.kfp == "2.16":
        kubernetes.set_security_context(task, wanted.run_as_user, wanted.run_as_group, run_as_non_root=True)


def _environment(task: Any, storage: Storage, old: bool) -> None:
    """All optional: a pod that misses one starts and says so, instead of hanging before its container exists."""
    # The run's id by field path: as an input it would be another value in each run.
    kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
    if storage.config_map:
        kubernetes.use_config_map_as_env(task, storage.config_map, _same(ADDRESSES_2_14 if old else ADDRESSES), True)
    if storage.s3_secret:
        keys = {storage.s3_access_key: "AWS_ACCESS_KEY_ID", storage.s3_secret_key: "AWS_SECRET_ACCESS_KEY"}
        kubernetes.use_secret_as_env(task, storage.s3_secret, keys, True)
    if storage.mlflow_secret:
        login = MLFLOW_LOGIN_2_14 if old else MLFLOW_LOGIN
        kubernetes.use_secret_as_env(task, storage.mlflow_secret, _same(login), True)
    if storage.hf_secret:
        kubernetes.use_secret_as_env(task, storage.hf_secret, {"HF_TOKEN": "HF_TOKEN"}, True)
    if old:
        settings = task.platform_config["kubernetes"]
        for entry in [*settings.get("configMapAsEnv", []), *settings.get("secretAsEnv", [])]:
            del entry["optional"]


def _same(keys: tuple[str, ...]) -> dict[str, str]:
    return {key: key for key in keys}


def _volumes(task: Any, storage: Storage) -> None:
    if storage.cache_claim:
        kubernetes.mount_pvc(task, storage.cache_claim, CACHE)
    if storage.ca_config_map:
        kubernetes.use_config_map_as_volume(task, storage.ca_config_map, CA_FOLDER)


def _first(own: Any, common: Any) -> Any:
    return common if own is None else own
