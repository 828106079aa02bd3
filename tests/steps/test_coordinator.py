"""A recover step of several nodes on a cluster: the TrainJob that is sent, its life cycle, its errors.

The Kubernetes API is a mock (tests/mock_kubernetes.py) that answers with recorded objects.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mock_kubernetes
import pytest
from mock_kubernetes import pod

from pipelines.prune_tune_loop.cluster import train_job
from ptl.config.run import load_config
from ptl.errors import InputError, WorkError
from ptl.recovery.job import Machines, machines
from ptl.steps import coordinator, trainjob
from ptl.steps.call import Call, key_of
from ptl.steps.step import Step, is_coordinator
from ptl.storage import store
from ptl.storage.store import Pointer, Record

RUN = "5f2b1c3d-7a88-4e21-9c55-0123456789ab"
NAME = "ptl-5f2b1c3d7a88-recover-2"
NODES = {"resources.steps.recover.nodes": 2}
POINTER = Pointer("s3://b/pruned", "sha256:" + "c" * 64, params=9, original_params=9)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    config = load_config("pipelines/prune_tune_loop/configs/tiny.yaml", NODES)
    monkeypatch.delenv("PTL_RUN_ID", raising=False)
    monkeypatch.setenv("KFP_RUN_ID", RUN)
    monkeypatch.setenv("KFP_POD_NAME", mock_kubernetes.OWN_POD)
    monkeypatch.setenv("PTL_NODES", "2")
    monkeypatch.setenv(trainjob.TEMPLATE, train_job(config, "registry/ptl-recover:1"))
    monkeypatch.setattr(coordinator, "POLL", 0.01)
    monkeypatch.setattr(coordinator, "PATIENCE", 0)
    with mock_kubernetes.serving(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield cluster


def train():
    assert is_coordinator()
    counted = []
    call = Call("recover-2", "experiment", {"seed": 3, "prompt": "$$x$(HOME)"}, {"model": POINTER}, {})
    coordinator.train(call.step, call.dump(), lambda: counted.append(1))
    return len(counted)


def evicted(pod, message):
    """The API's words; made by hand, as none was recorded."""
    pod["status"] = {"phase": "Failed", "reason": "Evicted", "message": message}
    return pod


def waiting(pod, **state):
    pod["status"] |= {"phase": "Pending"} | state
    return pod


def running(attempt=0):
    return [pod(NAME, node, attempt) for node in (0, 1)]


def done():
    return [pod(NAME, node, exit_code=0) for node in (0, 1)]


def test_a_train_job_is_created_followed_and_kept(cluster, capfd, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-a-secret")  # as from a mounted Secret: never in an object
    # as Kubeflow's MLflow plugin sets them
    token = {"secretKeyRef": {"name": "mlflow", "key": "token"}}
    cluster.own_env = [{"name": "MLFLOW_RUN_ID", "value": "r"}, {"name": "MLFLOW_TRACKING_TOKEN", "valueFrom": token}]
    cluster.own_env += [{"name": "PTL_NODES", "value": "2"}]
    pending = [pod(NAME, node, phase="Pending") for node in (0, 1)]
    cluster.play(("trainjob-running", pending), ("trainjob-running", running()), ("trainjob-complete", done()))
    assert train() == 1
    (job,) = cluster.created
    assert job["metadata"]["labels"]["ptl/run"] == RUN
    assert job["metadata"]["name"] == NAME
    assert job["metadata"]["ownerReferences"][0] == {
        **{"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "loop-abcde", "uid": "u-1"},
        **{"controller": False, "blockOwnerDeletion": False},
    }
    assert trainjob.pod_of(job)["serviceAccountName"] == "pipeline-runner"
    trainer = job["spec"]["trainer"]
    variables = {entry["name"]: entry.get("value") for entry in trainer["env"]}
    assert (trainer["image"], trainer["numNodes"]) == ("registry/ptl-recover:1", 2)
    assert variables["KFP_RUN_ID"] == RUN and not any(name.startswith("PET_") for name in variables)
    call = json.loads(variables[trainjob.CALL].replace("$$", "$"))  # as Kubernetes does
    expected = {"step": "recover-2", "experiment": "experiment", "seed": 3, "prompt": "$$x$(HOME)"}
    assert call["settings"] == expected and "$$(HOME)" in variables[trainjob.CALL]
    plugin = [entry for entry in trainer["env"] if entry["name"].startswith("MLFLOW_")]
    assert plugin == cluster.own_env[:2]  # a login stays in its Secret
    assert Pointer.load(call["inputs"]["model"]) == POINTER
    assert "of-a-secret" not in json.dumps(job)
    assert cluster.deleted == []
    printed = capfd.readouterr().out
    for line in ("was created: 2 nodes", "0 of 2 nodes run", "2 of 2 nodes run", "complete"):
        assert f"ptl: recover-2: TrainJob {NAME}{':' if 'was' not in line else ''} {line}" in printed
    assert f"hello from {NAME}-node-0-0-0abcd" in printed and "node-0-1" not in printed  # the first node's log


def test_nodes_that_are_restarted_are_followed_on_with_the_reason(cluster, capfd):
    words = trainjob.last_words("recover: the loss is nan", 1)
    failed = [pod(NAME, 0), pod(NAME, 1, exit_code=1, message=words)]
    cluster.play(
        ("trainjob-running", failed),
        ("trainjob-restarted", running(attempt=1)),
        ("trainjob-complete", [pod(NAME, node, 1, exit_code=0) for node in (0, 1)]),
    )
    train()
    printed = capfd.readouterr().out
    assert "2 of 2 nodes run, restart 1 (node 1: recover: the loss is nan)" in printed
    assert "hello from ptl-5f2b1c3d7a88-recover-2-node-0-0-1abcd" in printed  # the new pod's log


@pytest.mark.parametrize(
    ("pods", "kind", "message"),
    [
        (
            [
                pod(NAME, 0, exit_code=1, message=trainjob.last_words("connection reset by peer", 1), ended="2"),
                pod(NAME, 1, exit_code=1, message=trainjob.last_words("CUDA error: out of memory", 1), ended="1"),
            ],
            WorkError,
            r"^node 1: CUDA error: out of memory$",
        ),
        (
            [
                pod(NAME, 0, exit_code=1, message=trainjob.last_words("connection reset by peer", 1), ended="1"),
                pod(NAME, 1, exit_code=2, message=trainjob.last_words("recover.batch_size: 7 must be", 2), ended="2"),
            ],
            InputError,
            r"^node 1: recover\.batch_size: 7 must be$",
        ),
        (
            [
                pod(NAME, 0, exit_code=1, message="last line of its log", ended="1"),
                pod(NAME, 1, exit_code=137, reason="OOMKilled", ended="2"),
            ],
            WorkError,
            r"^node 1: it was killed, as its memory was used up: raise resources\.steps\.recover\.memory$",
        ),
        (
            [pod(NAME, 0, exit_code=139)],
            WorkError,
            r"^node 0: its process ended with exit code 139 and without a word$",
        ),
        (
            [evicted(pod(NAME, 1), "The node was low on resource: ephemeral-storage.")],
            WorkError,
            r"^node 1: Evicted: The node was low on resource: ephemeral-storage\.$",
        ),
        ([], WorkError, rf"^TrainJob {NAME} failed \(ReachedMaxRestarts\): jobset failed due to reaching max number"),
    ],
    ids=["the-first-that-failed", "a-wrong-input", "out-of-memory", "a-crash", "evicted", "no-pod-is-left"],
)
def test_a_failure_is_the_failing_node_s_own_and_the_train_job_is_deleted(cluster, pods, kind, message):
    cluster.play(("trainjob-failed", pods))
    with pytest.raises(kind, match=message):
        train()
    assert cluster.deleted == [NAME]


def test_a_failure_that_its_pod_took_away_is_remembered(cluster):
    words = trainjob.last_words("recover: the loss is nan", 1)
    cluster.play(("trainjob-running", [pod(NAME, 1, exit_code=1, message=words)]), ("trainjob-failed", []))
    with pytest.raises(WorkError, match=r"^node 1: recover: the loss is nan$"):
        train()


def test_a_train_job_that_a_killed_coordinator_has_started_is_followed(cluster, capfd):
    cluster.jobs[NAME] = mock_kubernetes.recorded("trainjob-running") | {"metadata": {"name": NAME}}
    cluster.play(("trainjob-running", running()), ("trainjob-complete", done()))
    assert train() == 0  # no attempt of its own
    assert cluster.created == [] and cluster.deleted == []
    assert "was started by an earlier attempt: it is followed" in capfd.readouterr().out


@pytest.mark.parametrize("record", ["trainjob-failed", "trainjob-complete"])
def test_one_that_had_ended_without_a_result_gives_way_to_a_new_one(cluster, record):
    cluster.jobs[NAME] = mock_kubernetes.recorded(record) | {"metadata": {"name": NAME}}
    cluster.on_create = lambda job: cluster.play(("trainjob-complete", done()))
    train()
    assert len(cluster.created) == 1 and cluster.deleted == [NAME]


def test_a_cancelled_step_deletes_its_train_job(cluster):
    cluster.play(("trainjob-running", running()))
    cluster.on_create = lambda job: threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit, match="143"):
        train()
    assert cluster.deleted == [NAME] and cluster.jobs == {}


def test_one_that_somebody_else_deletes_is_an_error(cluster):
    cluster.play(("trainjob-running", running()))
    cluster.logs = {pod["metadata"]["name"]: lambda: cluster.jobs.clear() or [] for pod in running()}
    with pytest.raises(WorkError, match=f"recover-2: TrainJob {NAME} was deleted by somebody else"):
        train()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            mock_kubernetes.UNKNOWN_RUNTIME,
            r"resources\.steps\.recover\.runtime: the TrainingRuntime 'ptl-recover' does",
        ),
        (
            mock_kubernetes.NO_RIGHT,
            r"resources\.steps\.recover\.nodes: this step's account may not .*cannot create.*Role",
        ),
        (mock_kubernetes.NO_TRAINER, r"resources\.steps\.recover\.nodes: this cluster has no Kubeflow Trainer"),
        ((403, "exceeded quota: gpus, requested: 16"), r"resources\.steps\.recover: the cluster refuses it: exceeded"),
    ],
    ids=["unknown-runtime", "no-right", "no-Kubeflow-Trainer", "quota"],
)
def test_what_the_cluster_refuses_is_an_input_error_that_names_the_remedy(cluster, refusal, message):
    cluster.refusal = refusal
    with pytest.raises(InputError, match=message):
        train()


def test_an_api_that_does_not_answer_for_a_while_is_waited_for(cluster, monkeypatch):
    monkeypatch.setattr(coordinator.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(coordinator, "PATIENCE", 60)
    cluster.play(("trainjob-running", running()), ("trainjob-complete", done()))
    cluster.outage = 3
    train()
    cluster.outage, cluster.jobs = 1000, {}
    monkeypatch.setattr(coordinator, "PATIENCE", 0)
    with pytest.raises(
        WorkError,
        match=r"the Kubernetes API has not answered for 0 s: .*currently unable.*; the TrainJob trains meanwhile",
    ):
        train()


def test_names_are_short_enough_for_the_pods_of_a_thousand_nodes():
    name = trainjob.name_of(RUN, "control-recover")
    assert name == "ptl-5f2b1c3d7a88-control-recover" and len(f"{name}-node-0-999-abcde") < 63


def test_last_words_fit_what_kubernetes_keeps():
    words = trainjob.last_words("training failed: " + "tränen\n" * 4000 + "the end", 1)
    assert len(words.encode()) <= 4096
    reason = json.loads(words)["reason"]
    assert reason.startswith("training failed") and reason.endswith("the end")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Machines()),
        ({"PTL_NODES": "4"}, Machines(4)),
        (
            {"PTL_NODES": "4", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "9"},
            Machines(2, 1, "a", 9),
        ),
    ],
    ids=["one-machine", "it-stands-for-four", "a-node"],
)
def test_the_machines_are_those_of_the_environment(environment, expected):
    assert machines(environment) == expected
    assert expected.first == (expected.rank in (None, 0))


def test_only_a_step_of_several_nodes_on_a_cluster_coordinates(monkeypatch):
    monkeypatch.delenv("PTL_RUN_ID", raising=False)
    monkeypatch.setenv("KFP_RUN_ID", RUN)
    assert is_coordinator({"PTL_NODES": "2"})
    assert not is_coordinator({}) and not is_coordinator({"PTL_NODES": "2", "PET_NODE_RANK": "0"})
    monkeypatch.setenv("PTL_RUN_ID", "local")
    assert not is_coordinator({"PTL_NODES": "2"})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {
                "containerStatuses": [
                    {
                        "name": "node",
                        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}},
                    }
                ]
            },
            "0 of 2 nodes run; node 1: ImagePullBackOff: Back-off pulling image",
        ),
        (
            {
                "containerStatuses": [],
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                    }
                ],
            },
            "0 of 2 nodes run; node 1: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        ),
    ],
    ids=["no-image", "no-place"],
)
def test_a_node_that_does_not_start_is_named_with_the_reason(cluster, capfd, state, message):
    pods = [waiting(pod(NAME, 0), containerStatuses=[]), waiting(pod(NAME, 1), **state)]
    cluster.play(("trainjob-running", pods), ("trainjob-complete", done()))
    train()
    assert f"TrainJob {NAME}: {message}\n" in capfd.readouterr().out


def test_a_log_whose_connection_ends_is_followed_on(cluster, capfd):
    lines = iter([["first\n"], ["second\n"]])
    cluster.logs = {running()[0]["metadata"]["name"]: lambda: next(lines, [])}
    cluster.play(*[("trainjob-running", running())] * 20, ("trainjob-complete", done()))
    train()
    assert capfd.readouterr().out.count("first\n") == 1
    assert "sinceSeconds" not in cluster.log_requests[0] and "sinceSeconds" in cluster.log_requests[1]


def test_one_that_cannot_be_deleted_is_not_waited_for_without_end(cluster, monkeypatch, capfd):
    monkeypatch.setattr(coordinator, "DELETION", 0.1)
    held = mock_kubernetes.recorded("trainjob-failed")
    cluster.jobs[NAME] = held | {"metadata": {"name": NAME, "deletionTimestamp": "2026-11-25T18:20:29Z"}}
    with pytest.raises(WorkError, match=r"is not gone after 0.1 s; a pod of it may be on a machine that is lost"):
        train()
    assert "this one waits for it" in capfd.readouterr().out


def test_a_pod_without_a_token_is_an_input_error(cluster, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    with pytest.raises(InputError, match=r"recover\.nodes: this pod has no token of a service account"):
        train()


@pytest.mark.parametrize(
    ("field", "library", "reason"), [("metod", "", "metod"), ("method", "raise ImportError('libcudart')", "libcudart")]
)
def test_a_node_leaves_its_error_and_the_exit_code_of_a_wrong_input(field, library, reason, tmp_path):
    """A real process; its call names a field that does not exist, or a library of its image is broken."""
    settings = {"step": "recover-1", "experiment": "e", "iterations": 1, "recover": [{field: "cpt"}], "seed": 0}
    settings |= {"tokens": "uniform", "recovery_tokens": 100, "training": {"sources": [{"source": "x.jsonl"}]}}
    words = tmp_path / "termination-log"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "KFP_RUN_ID": RUN}
    (tmp_path / "mlflow.py").write_text(library)
    environment |= {"PTL_SCRATCH": str(tmp_path), "PTL_TERMINATION_LOG": str(words), "PET_NODE_RANK": "1"}
    environment |= {"PET_NNODES": "2", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": "1"}
    inputs = {"model": POINTER.dump()}
    environment[trainjob.CALL] = json.dumps({"settings": settings, "inputs": inputs})
    node = subprocess.run(
        [sys.executable, "-m", "ptl.steps.node"], env=environment, capture_output=True, text=True, check=False
    )
    assert node.returncode == 2, node.stderr
    left = json.loads(words.read_text())
    assert left["exit_code"] == 2 and reason in left["reason"] and left["reason"] in node.stderr
    assert node.stdout.startswith("ptl: recover-1: node 1 of 2")


def test_a_node_takes_no_part_in_what_the_first_has_committed(monkeypatch):
    for name, value in {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    monkeypatch.setattr(Call, "start", lambda call: SimpleNamespace(root="r", run="r", step=call.step))
    record = Record(key_of(POINTER.digest, {}).digest, POINTER)
    monkeypatch.setattr(store, "committed", lambda *place: record)
    with Step(Call("recover-1", "e", inputs={"model": POINTER}), key={}) as step:  # reports nothing to MLflow
        assert step.record is not None
