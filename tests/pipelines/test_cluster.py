"""The platform spec: every setting of `resources` and `storage` reaches every task that it is meant for."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from pipelines.prune_tune_loop.pipeline import compile_pipeline
from ptl.config.cluster import Resources, Storage
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.steps import mounts, trainjob

ROOT = Path(__file__).parents[2]
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
    "resources.tolerations": [
        {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
        {"key": "team", "value": "nlp"},
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
BY_DEFAULT |= {"kfp", "steps"}
ELSEWHERE = {
    "control",
    "doctor",
    "experiment",
    "registered_model",
}  # the shape of the DAG and the form: test_compile.py


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


def volumes(kubernetes):
    """What is mounted where, all of it optional."""
    found = {}
    for kind, name in (("secretAsVolume", "secretName"), ("configMapAsVolume", "configMapName")):
        for entry in kubernetes.get(kind, []):
            assert entry["optional"] is True and set(entry) == {name, "mountPath", "optional"}
            found[entry["mountPath"]] = entry[name]
    return found


def variables(container):
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


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
        # A prune step uses one, whatever the others have.
        assert wanted["accelerator"]["resourceCount"] == ("1" if "prune" in name else "2"), name
        assert wanted["resourceCpuLimit"] == wanted["resourceCpuRequest"] == "8", name
        assert wanted["resourceMemoryLimit"] == wanted["resourceMemoryRequest"] == "64Gi", name
        assert len(wanted) == 5, "the fields that these have replaced are bytes for nothing"


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
        assert (claim["constant"], claim["mountPath"]) == ("ptl-hf-cache", mounts.CACHE), name


def test_the_cache_is_mounted_apart_from_the_folders_of_other_caches(full):
    """A claim's mount leaves its missing parents to root: inside /tmp/cache no other cache could be written."""
    for name, (_, container, _) in full.items():
        assert variables(container)["HF_HOME"] == mounts.HF_HOME, name
    assert mounts.HF_HOME.startswith(f"{mounts.CACHE}/") and not mounts.CACHE.startswith("/tmp")


def test_all_attempts_of_a_step_have_one_window(gpu_tasks):
    """Four attempts of 7,200 s with pauses of 30, 60 and 120 s; Argo's maxDuration begins with the first."""
    for name, (task, container, kubernetes) in gpu_tasks.items():
        assert kubernetes["activeDeadlineSeconds"] == "29220", name
        assert task["retryPolicy"] == {
            "maxRetryCount": 3,
            "backoffDuration": "60s",
            "backoffFactor": 2.0,
            "backoffMaxDuration": "29220s",
        }, name
        attempts = {name: value for name, value in variables(container).items() if name.startswith("PTL_")}
        assert attempts == {"PTL_TIMEOUT": "6900", "PTL_RETRIES": "3"}, name


def test_without_a_word_a_step_has_three_attempts_within_30_days(tmp_path):
    task, container, kubernetes = tasks(tmp_path, {})["recover-1"]
    assert task["retryPolicy"]["maxRetryCount"] == 2 and task["retryPolicy"]["backoffMaxDuration"] == "2592000s"
    assert "activeDeadlineSeconds" not in kubernetes and variables(container) == {}


def test_no_retries_are_no_retries(tmp_path):
    task, container, kubernetes = tasks(tmp_path, {"resources.retries": 0, "resources.timeout": 60})["recover-1"]
    assert task["retryPolicy"].get("maxRetryCount", 0) == 0 and variables(container)["PTL_RETRIES"] == "0"
    assert kubernetes["activeDeadlineSeconds"] == "60"
    assert variables(container)["PTL_TIMEOUT"] == "45", "else the pod's deadline ends the step before it can say why"


def test_images_and_user_are_on_every_gpu_task(gpu_tasks):
    for name, (_, _, kubernetes) in gpu_tasks.items():
        assert [entry["secretName"] for entry in kubernetes["imagePullSecret"]] == ["ptl-registry"], name
        assert kubernetes["imagePullPolicy"] == "IfNotPresent", name
        assert kubernetes["securityContext"] == {"runAsUser": "1000", "runAsGroup": "0", "runAsNonRoot": True}, name


def test_addresses_and_credentials_are_optional_volumes_of_every_task(full):
    """No variables: Kubernetes refuses a pod that has one twice, as with KFP's MLflow plugin (injectUserEnvVars)."""
    for name, (_, _, kubernetes) in full.items():
        assert not {"configMapAsEnv", "secretAsEnv"} & set(kubernetes), name
        assert [entry["name"] for entry in kubernetes["fieldPathAsEnv"]] == ["KFP_RUN_ID", "PTL_ARGO_NODE", "PTL_NODE"]
        assert volumes(kubernetes) == {
            mounts.CONFIG: "ptl",
            mounts.S3: "ptl-s3",
            mounts.MLFLOW: "ptl-mlflow",
            mounts.HF: "ptl-hf",
            mounts.CA: "ptl-ca",
        }, name


def test_light_steps_stay_off_the_gpu_nodes(full):
    for name in ("import-model", "report"):
        _, container, kubernetes = full[name]
        assert "accelerator" not in container["resources"]
        assert not {"tolerations", "nodeSelector", "emptyDirMounts"} & set(kubernetes)
        assert kubernetes["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


@pytest.mark.slow
def test_one_kind_of_step_can_ask_for_something_else(tmp_path):
    own = {"recover": {"accelerators": 8, "memory": "900Gi", "timeout": 90}, "report": {"cpu": "1"}}
    found = tasks(tmp_path, {**EVERYTHING, "resources.steps": own})
    _, container, kubernetes = found["recover-2"]
    assert container["resources"]["accelerator"]["resourceCount"] == "8"
    assert container["resources"]["resourceMemoryLimit"] == "900Gi" and variables(container)["PTL_TIMEOUT"] == "68"
    assert kubernetes["activeDeadlineSeconds"] == str(4 * 90 + 60 + 120 + 240)
    assert found["control-recover"][1] == container
    assert found["prune-2"][1]["resources"]["accelerator"]["resourceCount"] == "1"
    assert found["evaluate-2"][1]["resources"]["accelerator"]["resourceCount"] == "2"
    assert found["report"][1]["resources"]["resourceCpuLimit"] == "1"


@pytest.mark.slow
def test_kfps_own_s3_secret_can_be_used_and_everything_be_left_out(tmp_path):
    kfps = {
        "storage.s3_secret": "mlpipeline-minio-artifact",
        "storage.s3_access_key": "accesskey",
        "storage.s3_secret_key": "secretkey",
        "storage.hf_secret": None,
        "storage.mlflow_secret": None,
    }
    _, container, kubernetes = tasks(tmp_path, kfps)["prune-1"]
    assert volumes(kubernetes) == {mounts.CONFIG: "ptl", mounts.S3: "mlpipeline-minio-artifact"}
    assert variables(container) == {"PTL_S3_ACCESS_KEY": "accesskey", "PTL_S3_SECRET_KEY": "secretkey"}
    bare = {**kfps, "storage.s3_secret": None, "storage.config_map": None, "resources.kfp": "2.15"}
    _, container, kubernetes = tasks(tmp_path, bare)["prune-1"]
    assert set(kubernetes) == {"fieldPathAsEnv", "podMetadata"} and not variables(container)


def test_one_secret_may_serve_for_all(tmp_path):
    same = {f"storage.{name}": "all" for name in ("s3_secret", "mlflow_secret", "hf_secret")}
    assert volumes(tasks(tmp_path, same)["prune-1"][2]) == {mounts.CONFIG: "ptl", mounts.S3: "all"}


# Fields of KubernetesExecutorConfig in the protos of kfp-kubernetes 2.14.6 and 2.15.2 that are used here. A backend
# refuses fields that it does not know.
FIELDS_2_14 = {
    "activeDeadlineSeconds",
    "configMapAsVolume",
    "emptyDirMounts",
    "fieldPathAsEnv",
    "imagePullPolicy",
    "imagePullSecret",
    "nodeSelector",
    "podMetadata",
    "pvcMount",
    "secretAsVolume",
    "tolerations",
}


@pytest.mark.parametrize("version", ["2.14", "2.15"])
@pytest.mark.slow
def test_older_backends_are_given_only_fields_that_they_know(version, tmp_path):
    found = tasks(tmp_path, {**EVERYTHING, "resources.kfp": version})
    assert {field for _, _, kubernetes in found.values() for field in kubernetes} == FIELDS_2_14


@pytest.mark.parametrize("version", ["2.16", "2.17"])
@pytest.mark.slow
def test_newer_backends_have_a_security_context(version, tmp_path):
    found = tasks(tmp_path, {**EVERYTHING, "resources.kfp": version})
    assert {field for _, _, kubernetes in found.values() for field in kubernetes} == FIELDS_2_14 | {"securityContext"}


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"resources.accelerators": 1}, "accelerators without accelerator"),
        ({"resources.memory": "lots"}, "resources.memory: 'lots'"),
        ({"resources.retries": 11}, "resources.retries: 11"),
        ({"resources.tolerations": [{"key": "a", "operator": "Exists"}]}, "operator: unknown field"),
        ({"resources.steps": {"train": {}}}, "resources.steps.train"),
        ({"storage.s3_secret": "Not A Name"}, "storage.s3_secret: 'Not A Name'"),
        ({"storage.s3_secret": "dots.are.no-label"}, "storage.s3_secret: 'dots.are.no-label'"),
        ({"storage.s3_secret": "ptl"}, "'ptl' names two things of different kinds"),
        ({"resources.kfp": "2.13"}, "resources.kfp: '2.13'"),
    ],
)
def test_wrong_settings_are_refused(sets, said):
    with pytest.raises(InputError) as error:
        load_config(CONFIGS / "tiny.yaml", sets)
    assert said in str(error.value)


def test_a_recover_step_of_several_nodes_is_a_coordinator_with_their_train_job(tmp_path):
    """Its pod has no accelerator and waits in no queue; what the config says of the step is said of each node."""
    own = {"nodes": 4, "runtime": "with-infiniband", "memory": "512Gi", "accelerators": 8}
    sets = {**EVERYTHING, "resources.steps": {"recover": own}}
    found = tasks(tmp_path, sets)
    _, plain, _ = found["evaluate-1"]
    _, container, kubernetes = found["recover-1"]
    assert "accelerator" not in container["resources"] and "accelerator" in plain["resources"]
    assert container["resources"]["resourceMemoryLimit"] == "4Gi"
    assert not {"nodeSelector", "tolerations", "emptyDirMounts"} & set(kubernetes)
    assert "kueue.x-k8s.io/queue-name" not in kubernetes["podMetadata"]["labels"]

    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["PTL_NODES"] == "4"
    job = json.loads(variables[trainjob.TEMPLATE])
    assert job["metadata"]["labels"] == {"app.kubernetes.io/part-of": "ptl", "kueue.x-k8s.io/queue-name": "gpus"}
    assert job["spec"]["runtimeRef"]["name"] == "with-infiniband"
    trainer = job["spec"]["trainer"]
    assert trainer["image"] == container["image"] and trainer["numNodes"] == 4
    amounts = {"cpu": "8", "memory": "512Gi", "nvidia.com/gpu": "8"}
    assert trainer["resourcesPerNode"] == {"requests": amounts, "limits": amounts}
    pod = trainjob.pod_of(job)
    assert pod["nodeSelector"] == EVERYTHING["resources.node_selector"]
    assert [taint["key"] for taint in pod["tolerations"]] == ["nvidia.com/gpu", "team"]
    assert pod["imagePullSecrets"] == [{"name": "ptl-registry"}]
    assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 0}
    # the same volumes, at the same places, as in every step's pod
    (node,) = pod["containers"]
    assert {mount["mountPath"]: mount["name"] for mount in node["volumeMounts"]} == {
        **volumes(kubernetes),
        mounts.CACHE: "ptl-hf-cache",
    }
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in node["volumeMounts"]}
    checked = TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(job)).to_dict()
    assert checked["spec"] == job["spec"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"resources.steps": {"prune": {"nodes": 2}}}, r"nodes=2 of prune: only recover runs on several nodes"),
        ({"recover": [{"processes": 3}]}, r"must be a multiple of accumulation=1 times the 6 processes of 2 nodes"),
    ],
    ids=["another-step", "a-batch-that-is-not-divided"],
)
def test_what_does_not_go_on_several_nodes_is_refused(sets, message):
    with pytest.raises(InputError, match=message):
        load_config(CONFIGS / "tiny.yaml", {"resources.steps.recover.nodes": 2} | sets)


def test_a_batch_that_the_gpus_of_all_nodes_cannot_divide_is_refused_before_it_is_submitted():
    gpus = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 8}
    config = load_config(CONFIGS / "tiny.yaml", gpus | {"resources.steps.recover.nodes": 4})
    assert config.recover[0].batch_size == 16  # goes on one GPU of each node
    with pytest.raises(InputError, match=r"batch_size=16 must be a multiple of .* the 32 processes of 4 nodes;"):
        config.check_batches_on_cluster()
    one_node = Resources(accelerator="nvidia.com/gpu", accelerators=8)
    config.model_copy(update={"resources": one_node}).check_batches_on_cluster()
