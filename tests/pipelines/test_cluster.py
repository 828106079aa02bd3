"""The platform spec: every setting of `resources` and `storage` reaches every task that it is meant for."""

import copy
import json

import compiled
import pytest
from checkout import TINY
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.steps import mounts, trainjob

WORK = ("prune", "recover", "evaluate")
EVERYTHING = {
    **{"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 2},
    **{"resources.cpu": "8", "resources.memory": "64Gi", "resources.shm": "16Gi"},
    **{"resources.timeout": 7200, "resources.retries": 3},
    "resources.tolerations": [
        {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
        {"key": "team", "value": "nlp"},
    ],
    "resources.node_selector": {"nvidia.com/gpu.product": "H100"},
    "resources.queue": "gpus",
    "resources.image_pull_secrets": ["ptl-registry"],
    "resources.image_pull_policy": "IfNotPresent",
    "storage.cache_claim": "ptl-hf-cache",
    "storage.ca_config_map": "ptl-ca",
}


def tasks(sets):
    """Per task: its spec, its container, and its Kubernetes settings."""
    spec, platform = compiled.documents(sets)
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = {}
    for name, task in spec["root"]["dag"]["tasks"].items():
        label = spec["components"][task["componentRef"]["name"]]["executorLabel"]
        found[name] = (
            task,
            spec["deploymentSpec"]["executors"][label]["container"],
            settings[label],
        )
    return found


def volumes(kubernetes):
    """What is mounted where, all of it optional."""
    entries = [(entry, "secretName") for entry in kubernetes.get("secretAsVolume", [])]
    entries += [(entry, "configMapName") for entry in kubernetes.get("configMapAsVolume", [])]
    assert all(entry["optional"] is True for entry, _ in entries)
    return {entry["mountPath"]: entry[name] for entry, name in entries}


def variables(container):
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


# All tasks have the addresses and credentials as optional volumes. No variables: Kubernetes refuses a pod that has one
# twice, as with KFP's MLflow plugin (injectUserEnvVars).
VOLUMES = {
    mounts.CONFIG: "ptl",
    mounts.S3: "ptl-s3",
    mounts.MLFLOW: "ptl-mlflow",
    mounts.HF: "ptl-hf",
}
VOLUMES |= {mounts.CA: "ptl-ca"}
OF_EVERY_TASK = {
    "activeDeadlineSeconds": "29220",
    "fieldPathAsEnv": [
        {"name": "KFP_RUN_ID", "fieldPath": "metadata.labels['pipeline/runid']"},
        {
            "name": "PTL_ARGO_NODE",
            "fieldPath": "metadata.annotations['workflows.argoproj.io/node-name']",
        },
    ],
    "imagePullPolicy": "IfNotPresent",
    "imagePullSecret": [{"secretName": "ptl-registry"}],
    "podMetadata": {
        "labels": {"app.kubernetes.io/part-of": "ptl", "kueue.x-k8s.io/queue-name": "gpus"}
    },
    "pvcMount": [{"constant": "ptl-hf-cache", "mountPath": mounts.CACHE}],
    "securityContext": {"runAsUser": "1000", "runAsGroup": "0", "runAsNonRoot": True},
}
OF_WORK = {
    "emptyDirMounts": [
        {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "16Gi"}
    ],
    "nodeSelector": {"labels": {"nvidia.com/gpu.product": "H100"}},
    "tolerations": [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "nlp"},
    ],
}
# In place of the fields that KFP writes for old backends too
AMOUNTS = {"resourceCpuLimit": "8", "resourceCpuRequest": "8"}
AMOUNTS |= {"resourceMemoryLimit": "64Gi", "resourceMemoryRequest": "64Gi"}


def test_every_task_has_all_settings_and_only_work_is_on_the_gpu_nodes():
    """Four attempts of 7,200 s with pauses of 30, 60 and 120 s; Argo's maxDuration begins with the first."""
    full = tasks(EVERYTHING)
    at_work = [name for name in full if any(stage in name for stage in WORK)]
    assert len(at_work) == 4 * 3 + 1 + 3 and len(full) == len(at_work) + 2
    for name, (task, container, kubernetes) in full.items():
        work = name in at_work
        assert volumes(kubernetes) == VOLUMES, name
        others = {key: value for key, value in kubernetes.items() if not key.endswith("AsVolume")}
        assert others == OF_EVERY_TASK | (OF_WORK if work else {}), name
        # A prune step uses one, whatever the others have.
        gpus = {"resourceType": "nvidia.com/gpu", "resourceCount": "1" if "prune" in name else "2"}
        assert container["resources"] == AMOUNTS | ({"accelerator": gpus} if work else {}), name
        retries = {
            "maxRetryCount": 3,
            "backoffDuration": "60s",
            "backoffFactor": 2.0,
            "backoffMaxDuration": "29220s",
        }
        assert task["retryPolicy"] == retries, name
        # The cache is apart from the folders of other caches: a claim's mount leaves its missing parents to root.
        assert variables(container) == {
            "HF_HOME": mounts.HF_HOME,
            "PTL_TIMEOUT": "6900",
            "PTL_RETRIES": "3",
        }, name
    assert mounts.HF_HOME.startswith(f"{mounts.CACHE}/") and not mounts.CACHE.startswith("/tmp")


def test_attempts_and_times_of_a_step():
    """Its own timeout comes before the pod's deadline, which would end it before it can say why."""
    for sets, retries, deadline, expected in (
        ({}, 2, None, {}),
        (
            {"resources.retries": 0, "resources.timeout": 60},
            0,
            "60",
            {"PTL_TIMEOUT": "45", "PTL_RETRIES": "0"},
        ),
    ):
        task, container, kubernetes = tasks(sets)["recover-1"]
        assert task["retryPolicy"].get("maxRetryCount", 0) == retries, sets
        assert (
            kubernetes.get("activeDeadlineSeconds") == deadline and variables(container) == expected
        ), sets
    assert tasks({})["recover-1"][0]["retryPolicy"]["backoffMaxDuration"] == "2592000s"  # 30 days


def test_one_kind_of_step_can_ask_for_something_else():
    own = {
        "recover": {"accelerators": 8, "timeout": 90},
        "report": {"cpu": "1"},
        "evaluate": {"shm": "2Gi"},
    }
    found = tasks({**EVERYTHING, "resources.steps": own})
    _, container, kubernetes = found["recover-2"]
    assert (
        container["resources"]["accelerator"]["resourceCount"] == "8"
        and variables(container)["PTL_TIMEOUT"] == "68"
    )
    assert kubernetes["activeDeadlineSeconds"] == str(4 * 90 + 60 + 120 + 240)
    assert found["control-recover"][1] == container
    assert found["evaluate-2"][1]["resources"]["accelerator"]["resourceCount"] == "2"
    assert found["report"][1]["resources"]["resourceCpuLimit"] == "1"
    shared = [
        found[step][2]["emptyDirMounts"][0]["sizeLimit"] for step in ("prune-1", "evaluate-0")
    ]
    assert shared == ["16Gi", "2Gi"]


def test_secrets_can_be_kfps_own_or_left_out():
    kfps = {
        "storage.s3_secret": "mlpipeline-minio-artifact",
        "storage.hf_secret": None,
        "storage.mlflow_secret": None,
    }
    kfps |= {"storage.s3_access_key": "a", "storage.s3_secret_key": "b"}
    _, container, kubernetes = tasks(kfps)["prune-1"]
    assert volumes(kubernetes) == {mounts.CONFIG: "ptl", mounts.S3: "mlpipeline-minio-artifact"}
    assert variables(container) == {"PTL_S3_ACCESS_KEY": "a", "PTL_S3_SECRET_KEY": "b"}


@pytest.mark.parametrize(("version", "more"), [("2.15", set()), ("2.16", {"securityContext"})])
def test_backends_are_given_only_fields_that_they_know(version, more):
    """They refuse others. The fields of KubernetesExecutorConfig in the protos of kfp-kubernetes 2.14.6 and 2.15.2."""
    found = tasks({**EVERYTHING, "resources.kfp": version})
    fields = {*OF_EVERY_TASK, *OF_WORK, "configMapAsVolume", "secretAsVolume"} - {"securityContext"}
    assert {field for _, _, kubernetes in found.values() for field in kubernetes} == fields | more


def test_batches_that_the_gpus_of_all_nodes_cannot_divide_are_refused():
    gpus = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 8}
    load_config(TINY, gpus).check_batches_on_cluster()  # 16 on one node
    config = load_config(TINY, gpus | {"resources.steps.recover.nodes": 4})
    with pytest.raises(
        InputError, match=r"batch_size=16 must be a multiple of .* the 32 processes of 4 nodes;"
    ):
        config.check_batches_on_cluster()


def test_a_recover_step_of_several_nodes_is_a_coordinator_with_their_train_job():
    """Its pod has no accelerator and waits in no queue; what the config says of the step is said of each node."""
    own = {"nodes": 4, "runtime": "with-infiniband", "memory": "512Gi", "accelerators": 8}
    _, container, kubernetes = tasks({**EVERYTHING, "resources.steps": {"recover": own}})[
        "recover-1"
    ]
    assert (
        "accelerator" not in container["resources"]
        and container["resources"]["resourceMemoryLimit"] == "4Gi"
    )
    assert not {"nodeSelector", "tolerations", "emptyDirMounts"} & set(kubernetes)
    assert "kueue.x-k8s.io/queue-name" not in kubernetes["podMetadata"]["labels"]

    assert variables(container)["PTL_NODES"] == "4"
    job = json.loads(variables(container)[trainjob.TEMPLATE])
    assert job["metadata"]["labels"] == OF_EVERY_TASK["podMetadata"]["labels"]
    assert (
        job["spec"]["runtimeRef"]["name"] == "with-infiniband"
        and job["spec"]["activeDeadlineSeconds"] == 29220
    )
    trainer = job["spec"]["trainer"]
    assert trainer["image"] == container["image"] and (
        trainer["numNodes"],
        trainer["numProcPerNode"],
    ) == (4, 1)
    assert {"name": "HF_HOME", "value": mounts.HF_HOME} in trainer["env"]
    assert trainer["resourcesPerNode"]["limits"] == {
        "cpu": "8",
        "memory": "512Gi",
        "nvidia.com/gpu": "8",
    }
    pod = trainjob.pod_of(job)
    assert pod["nodeSelector"] == EVERYTHING["resources.node_selector"]
    assert len(pod["tolerations"]) == 2 and pod["imagePullSecrets"] == [{"name": "ptl-registry"}]
    assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 0}
    # the same volumes, at the same places, as in every step's pod
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {**volumes(kubernetes), mounts.CACHE: "ptl-hf-cache"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted.values())
    assert TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(job)).to_dict()["spec"] == job["spec"]
