"""The platform spec: every setting of `resources` and `storage` reaches every task that it is meant for."""

from pathlib import Path

import pytest
import yaml

from pipelines.prune_tune_loop.cluster import ADDRESSES, CA_FOLDER, CACHE
from pipelines.prune_tune_loop.pipeline import compile_pipeline
from ptl.cluster_config import Resources, Storage
from ptl.config import load_config
from ptl.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "pipelines/prune_tune_loop/configs"
WORK = ("prune", "recover", "evaluate")
EVERYTHING = {
    "resources.accelerator": "nvidia.com/gpu",
    "resources.accelerators": 2,
    "resources.cpu": "8",
    "resources.memory": "64Gi",
    "resources.shm": "16Gi",
    "resources.timeout": 7200,
    "resources.retries": 3,
    "resources.retry_wait": 30,
    "resources.retry_wait_max": 300,
    "resources.tolerations": [
        {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "nlp"},
    ],
    "resources.node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "resources.queue": "gpus",
    "resources.image_pull_secrets": ["ptl-registry"],
    "resources.image_pull_policy": "IfNotPresent",
    "storage.cache_claim": "ptl-hf-cache",
    "storage.ca_config_map": "ptl-ca",
}


# What has a test of its own below, or a value by default that is looked for.
BY_DEFAULT = {"config_map", "s3_secret", "s3_access_key", "s3_secret_key", "mlflow_secret", "hf_secret"}
BY_DEFAULT |= {"kfp", "run_as_user", "run_as_group", "steps"}
ELSEWHERE = {"doctor", "experiment", "registered_model"}  # the shape of the DAG and the form: test_compile.py


def test_no_setting_is_forgotten_here():
    tested = {name.partition(".")[2] for name in EVERYTHING} | BY_DEFAULT | ELSEWHERE
    assert tested == set(Resources.model_fields) | set(Storage.model_fields)


def tasks(tmp_path, sets):
    """Per task: its spec, its container, and its Kubernetes settings."""
    path = tmp_path / "pipeline.yaml"
    compile_pipeline(load_config(CONFIGS / "tiny.yaml", sets), path)
    spec, platform = yaml.safe_load_all(path.read_text())
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = {}
    for task in spec["root"]["dag"]["tasks"].values():
        label = spec["components"][task["componentRef"]["name"]]["executorLabel"]
        container = spec["deploymentSpec"]["executors"][label]["container"]
        found[task["taskInfo"]["name"]] = (task, container, settings[label])
    return found


def is_work(name):
    return any(stage in name for stage in WORK)


def secrets_of(kubernetes):
    return {
        entry["secretName"]: {pair["secretKey"]: pair["envVar"] for pair in entry["keyToEnv"]}
        for entry in kubernetes["secretAsEnv"]
        if entry["optional"]
    }


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return tasks(tmp_path_factory.mktemp("full"), EVERYTHING)


@pytest.fixture(scope="module")
def gpu_tasks(full):
    found = {name: task for name, task in full.items() if is_work(name)}
    assert len(found) == 4 * 3 + 1 + 3
    return found


def test_gpu_count_cpu_and_memory_are_on_every_gpu_task(gpu_tasks):
    for name, (_, container, _) in gpu_tasks.items():
        wanted = container["resources"]
        assert wanted["accelerator"]["resourceType"] == "nvidia.com/gpu", name
        assert wanted["accelerator"]["resourceCount"] == "2", name
        assert wanted["resourceCpuLimit"] == wanted["resourceCpuRequest"] == "8", name
        assert wanted["resourceMemoryLimit"] == wanted["resourceMemoryRequest"] == "64Gi", name


def test_nodes_and_queue_are_on_every_gpu_task(gpu_tasks):
    for name, (_, _, kubernetes) in gpu_tasks.items():
        assert kubernetes["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "nlp"},
        ], name
        assert kubernetes["nodeSelector"]["labels"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}, name
        assert kubernetes["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus", name
        assert kubernetes["podMetadata"]["labels"]["app.kubernetes.io/part-of"] == "ptl", name


def test_shared_memory_and_volumes_are_on_every_gpu_task(gpu_tasks):
    for name, (_, _, kubernetes) in gpu_tasks.items():
        assert kubernetes["emptyDirMounts"] == [
            {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "16Gi"}
        ], name
        (claim,) = kubernetes["pvcMount"]
        assert (claim["constant"], claim["mountPath"]) == ("ptl-hf-cache", CACHE), name
        (bundle,) = kubernetes["configMapAsVolume"]
        assert (bundle["configMapName"], bundle["mountPath"]) == ("ptl-ca", CA_FOLDER), name


def test_timeouts_and_retries_are_on_every_gpu_task(gpu_tasks):
    for name, (task, _, kubernetes) in gpu_tasks.items():
        assert kubernetes["activeDeadlineSeconds"] == "7200", name
        assert task["retryPolicy"] == {
            "maxRetryCount": 3,
            "backoffDuration": "30s",
            "backoffFactor": 2.0,
            "backoffMaxDuration": "300s",
        }, name


def test_images_and_user_are_on_every_gpu_task(gpu_tasks):
    for name, (_, _, kubernetes) in gpu_tasks.items():
        assert [entry["secretName"] for entry in kubernetes["imagePullSecret"]] == ["ptl-registry"], name
        assert kubernetes["imagePullPolicy"] == "IfNotPresent", name
        assert kubernetes["securityContext"] == {"runAsUser": "1000", "runAsGroup": "0", "runAsNonRoot": True}, name


def test_environment_is_on_every_task_and_optional(full):
    for name, (_, container, kubernetes) in full.items():
        assert kubernetes["fieldPathAsEnv"] == [
            {"name": "KFP_RUN_ID", "fieldPath": "metadata.labels['pipeline/runid']"}
        ], name
        (addresses,) = kubernetes["configMapAsEnv"]
        assert (addresses["configMapName"], addresses["optional"]) == ("ptl", True), name
        assert {pair["envVar"] for pair in addresses["keyToEnv"]} == set(ADDRESSES), name
        assert secrets_of(kubernetes) == {
            "ptl-s3": {key: key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
            "ptl-mlflow": {
                key: key for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
            },
            "ptl-hf": {"HF_TOKEN": "HF_TOKEN"},
        }, name
        # Set on the task itself they would also win over the environment of local runs.
        assert not container.get("env"), name


def test_light_steps_stay_off_the_gpu_nodes(full):
    for name in ("import-model", "report"):
        _, container, kubernetes = full[name]
        assert "accelerator" not in container["resources"]
        assert not {"tolerations", "nodeSelector", "emptyDirMounts"} & set(kubernetes)
        assert kubernetes["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


def test_one_kind_of_step_can_ask_for_something_else(tmp_path):
    own = {"recover": {"accelerators": 8, "memory": "900Gi", "timeout": 90}, "report": {"cpu": "1"}}
    found = tasks(tmp_path, {**EVERYTHING, "resources.steps": own})
    _, container, kubernetes = found["recover-2"]
    assert container["resources"]["accelerator"]["resourceCount"] == "8"
    assert container["resources"]["resourceMemoryLimit"] == "900Gi" and kubernetes["activeDeadlineSeconds"] == "90"
    assert found["control-recover"][1] == container
    assert found["prune-2"][1]["resources"]["accelerator"]["resourceCount"] == "2"
    assert found["report"][1]["resources"]["resourceCpuLimit"] == "1"


def test_kfps_own_s3_secret_can_be_used_and_everything_be_left_out(tmp_path):
    kfps = {
        "storage.s3_secret": "mlpipeline-minio-artifact",
        "storage.s3_access_key": "accesskey",
        "storage.s3_secret_key": "secretkey",
        "storage.hf_secret": None,
        "storage.mlflow_secret": None,
    }
    kubernetes = tasks(tmp_path, kfps)["prune-1"][2]
    assert secrets_of(kubernetes) == {
        "mlpipeline-minio-artifact": {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
    }
    bare = tasks(
        tmp_path,
        {
            **kfps,
            "storage.s3_secret": None,
            "storage.config_map": None,
            "resources.kfp": "2.15",
        },
    )["prune-1"][2]
    assert set(bare) == {"fieldPathAsEnv", "podMetadata"}


# Fields of KubernetesExecutorConfig in the protos of kfp-kubernetes 2.14.6 and 2.15.2 that are used here. A backend
# refuses fields that it does not know.
FIELDS_2_15 = {
    "activeDeadlineSeconds",
    "configMapAsEnv",
    "configMapAsVolume",
    "emptyDirMounts",
    "fieldPathAsEnv",
    "imagePullPolicy",
    "imagePullSecret",
    "nodeSelector",
    "podMetadata",
    "pvcMount",
    "secretAsEnv",
    "tolerations",
}
ENV_FIELDS_2_14 = {
    "configMapAsEnv": {"configMapName", "keyToEnv", "configMapNameParameter"},
    "secretAsEnv": {"secretName", "keyToEnv", "secretNameParameter"},
}


@pytest.mark.parametrize("version", ["2.14", "2.15"])
def test_older_backends_are_given_only_fields_that_they_know(version, tmp_path):
    found = tasks(tmp_path, {**EVERYTHING, "resources.kfp": version})
    assert {field for _, _, kubernetes in found.values() for field in kubernetes} == FIELDS_2_15
    for _, _, kubernetes in found.values():
        for name, known in ENV_FIELDS_2_14.items():
            assert all(("optional" in entry) == (version == "2.15") for entry in kubernetes[name])
            assert all(set(entry) - {"optional"} == known for entry in kubernetes[name])


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"resources.accelerators": 1}, "accelerators without accelerator"),
        ({"resources.memory": "lots"}, "resources.memory: 'lots'"),
        ({"resources.retries": 11}, "resources.retries: 11"),
        ({"resources.tolerations": [{"key": "a", "value": "b"}]}, "operator Equal needs a value"),
        ({"resources.steps": {"train": {}}}, "resources.steps.train"),
        ({"storage.s3_secret": "Not A Name"}, "storage.s3_secret: 'Not A Name'"),
    ],
)
def test_wrong_settings_are_refused(sets, said):
    with pytest.raises(InputError) as error:
        load_config(CONFIGS / "tiny.yaml", sets)
    assert said in str(error.value)
