"""A recover step of several nodes on a cluster: the TrainJob that is sent, its life cycle, its errors.

The Kubernetes API is a mock (tests/mock_kubernetes.py) that answers with recorded objects.
"""

import json
import os
import signal
import threading

import mock_kubernetes
import pytest
from checkout import TINY
from mock_kubernetes import pod

from pipelines.prune_tune_loop.cluster import train_job
from ptl.config.run import load_config
from ptl.errors import InputError, WorkError
from ptl.recovery.job import Machines, machines
from ptl.steps import coordinator, node, trainjob
from ptl.steps.call import Call
from ptl.steps.step import is_coordinator
from ptl.storage.store import Pointer

RUN = "5f2b1c3d-7a88-4e21-9c55-0123456789ab"
NAME = "ptl-5f2b1c3d7a88-recover-2"
NODES = {"resources.steps.recover.nodes": 2}
OF_A_NODE = {
    "PET_NODE_RANK": "1",
    "PET_NNODES": "2",
    "PET_MASTER_ADDR": "localhost",
    "PET_MASTER_PORT": "1",
}
POINTER = Pointer("s3://b/pruned", "sha256:" + "c" * 64, params=9, original_params=9)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    config = load_config(TINY, NODES)
    monkeypatch.setenv("KFP_RUN_ID", RUN)
    monkeypatch.setenv("KFP_POD_NAME", mock_kubernetes.OWN_POD)
    monkeypatch.setenv("PTL_NODES", "2")
    monkeypatch.setenv(trainjob.TEMPLATE, train_job(config, "registry/ptl-recover:1"))
    monkeypatch.setattr(coordinator, "POLL", 0.01)
    monkeypatch.setattr(coordinator, "PATIENCE", 0)
    with mock_kubernetes.serving(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield cluster


def train(note=lambda text: None):
    """The number of attempts that were counted."""
    assert is_coordinator()
    counted = []
    call = Call(
        "recover-2", "experiment", {"seed": 3, "prompt": "$$x$(HOME)"}, {"model": POINTER}, {}
    )
    coordinator.train(call.step, call.dump(), lambda: counted.append(1), note)
    return len(counted)


def failed(node, exit_code, words, ended="2"):
    """The pod of a node that has said why it failed; of another one Kubernetes has the last line of its log."""
    return pod(
        NAME, node, exit_code=exit_code, message=trainjob.last_words(words, exit_code), ended=ended
    )


def evicted(pod, message):
    """The API's words; made by hand, as none was recorded."""
    pod["status"] = {"phase": "Failed", "reason": "Evicted", "message": message}
    return pod


def running(attempt=0):
    return [pod(NAME, node, attempt) for node in (0, 1)]


def done():
    return [pod(NAME, node, exit_code=0) for node in (0, 1)]


def earlier(record):
    """A TrainJob of an earlier attempt."""
    return mock_kubernetes.recorded(record) | {"metadata": {"name": NAME}}


def test_a_train_job_is_created_followed_and_kept(cluster, capfd, monkeypatch):
    # as from a mounted Secret: never in an object
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-a-secret")
    # as Kubeflow's MLflow plugin sets them
    token = {"secretKeyRef": {"name": "mlflow", "key": "token"}}
    cluster.own_env = [
        {"name": "MLFLOW_RUN_ID", "value": "r"},
        {"name": "MLFLOW_TRACKING_TOKEN", "valueFrom": token},
    ]
    cluster.own_env += [{"name": "https_proxy", "value": "http://proxy:3128"}]
    pending = [pod(NAME, node, phase="Pending") for node in (0, 1)]
    reason = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    pending[1]["status"]["containerStatuses"] = [{"name": "node", "state": {"waiting": reason}}]
    cluster.play(
        ("trainjob-running", pending),
        ("trainjob-running", running()),
        ("trainjob-complete", done()),
    )
    assert train() == 1
    (job,) = cluster.created
    assert (job["metadata"]["labels"]["ptl/run"], job["metadata"]["name"]) == (RUN, NAME)
    owner = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "name": "loop-abcde",
        "uid": "u-1",
    }
    assert job["metadata"]["ownerReferences"] == [
        owner | {"controller": False, "blockOwnerDeletion": False}
    ]
    assert trainjob.pod_of(job)["serviceAccountName"] == "pipeline-runner"
    trainer = job["spec"]["trainer"]
    variables = {entry["name"]: entry.get("value") for entry in trainer["env"]}
    assert (trainer["image"], trainer["numNodes"]) == ("registry/ptl-recover:1", 2)
    assert variables["KFP_RUN_ID"] == RUN and not any(name.startswith("PET_") for name in variables)
    call = json.loads(variables[trainjob.CALL].replace("$$", "$"))  # as Kubernetes does
    expected = {"step": "recover-2", "experiment": "experiment", "seed": 3, "prompt": "$$x$(HOME)"}
    assert call["settings"] == expected and "$$(HOME)" in variables[trainjob.CALL]
    assert Pointer.load(call["inputs"]["model"]) == POINTER
    # a login stays in its Secret
    assert [entry for entry in trainer["env"] if entry in cluster.own_env] == cluster.own_env
    assert "of-a-secret" not in json.dumps(job) and cluster.deleted == []
    printed = capfd.readouterr().out
    for state in (
        "0 of 2 nodes run; node 1: ImagePullBackOff: Back-off pulling image",
        "2 of 2 nodes run",
        "complete",
    ):
        assert f"ptl: recover-2: TrainJob {NAME}: {state}\n" in printed
    # the first node's log
    assert f"hello from {NAME}-node-0-0-0abcd" in printed and "node-0-1" not in printed


def test_a_log_whose_connection_was_dropped_in_silence_is_read_on(cluster, capfd, monkeypatch):
    monkeypatch.setattr(coordinator, "SILENCE", 1)
    cluster.play(("trainjob-running", running()))
    opened, waited, is_read_on = [], [], threading.Event()

    def log():
        opened.append(f"connection {len(opened) + 1}\n")
        yield opened[-1]
        if len(opened) == 2:
            is_read_on.set()
        waited.append(is_read_on.wait(10))
        cluster.play(("trainjob-complete", done()))

    cluster.logs[f"{NAME}-node-0-0-0abcd"] = log
    train()
    printed = capfd.readouterr().out
    assert all(waited) and all(line in printed for line in opened)


def test_nodes_that_are_restarted_are_followed_on_and_why_they_failed_is_remembered(cluster, capfd):
    cluster.play(
        ("trainjob-running", [pod(NAME, 0), failed(1, 1, "recover: the loss is nan")]),
        ("trainjob-restarted", running(attempt=1)),
        ("trainjob-failed", [pod(NAME, 0, attempt=1, exit_code=0)]),
    )
    with pytest.raises(WorkError, match=r"^node 1: recover: the loss is nan$"):
        train()
    printed = capfd.readouterr().out
    assert "2 of 2 nodes run, restart 1 (node 1: recover: the loss is nan)" in printed
    assert f"hello from {NAME}-node-0-0-1abcd" in printed  # the new pod's log


SILENT = pod(NAME, 0, exit_code=1, message="last line of its log", ended="1")
RESET = "connection reset by peer"
FAILURES = {
    "the first that failed": (
        [failed(0, 1, RESET, "2"), failed(1, 1, "CUDA error", "1")],
        "node 1: CUDA error",
    ),
    "wrong input": (
        [failed(0, 1, RESET, "1"), failed(1, 2, "recover.batch_size", "2")],
        "node 1: recover.batch_size",
    ),
    "one that says why": (
        [SILENT, failed(1, 1, "the loss is nan", "2")],
        "node 1: the loss is nan",
    ),
    "out of memory": (
        [SILENT, pod(NAME, 1, exit_code=137, reason="OOMKilled", ended="2")],
        "node 1: it was killed, as its memory was used up: raise resources.steps.recover.memory",
    ),
    "evicted": (
        [evicted(pod(NAME, 1), "The node was low on resource.")],
        "node 1: Evicted: The node was low on",
    ),
    "no pod is left": (
        [],
        f"TrainJob {NAME} failed (ReachedMaxRestarts): jobset failed due to reaching max number",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_the_failing_node_s_own_and_the_train_job_is_deleted(cluster, failure):
    pods, message = FAILURES[failure]
    cluster.play(("trainjob-failed", pods))
    with pytest.raises(InputError if failure == "wrong input" else WorkError) as caught:
        train()
    assert str(caught.value).startswith(message)
    assert cluster.deleted == [NAME]


def test_a_train_job_of_a_killed_coordinator_is_followed_or_gives_way_to_a_new_one(cluster, capfd):
    cluster.jobs[NAME] = earlier("trainjob-running")
    cluster.play(("trainjob-running", running()), ("trainjob-complete", done()))
    assert train() == 0  # no attempt of its own
    assert cluster.created == [] and cluster.deleted == []
    assert "was started by an earlier attempt: it is followed" in capfd.readouterr().out
    cluster.jobs[NAME] = earlier("trainjob-complete")
    cluster.on_create = lambda job: cluster.play(("trainjob-complete", done()))
    assert train() == 1
    assert len(cluster.created) == 1 and cluster.deleted == [NAME]


def test_a_cancelled_step_deletes_its_train_job(cluster):
    cluster.play(("trainjob-running", running()))
    cluster.on_create = lambda job: threading.Timer(
        0.3, os.kill, (os.getpid(), signal.SIGTERM)
    ).start()
    with pytest.raises(SystemExit, match="143"):
        train()
    assert cluster.deleted == [NAME] and cluster.jobs == {}


def test_what_the_cluster_refuses_is_an_input_error_that_names_the_remedy(cluster):
    for refusal, message in (
        (
            mock_kubernetes.UNKNOWN_RUNTIME,
            r"resources\.steps\.recover\.runtime: the TrainingRuntime 'ptl-recover' ",
        ),
        (
            mock_kubernetes.NO_RIGHT,
            r"resources\.steps\.recover\.nodes: this step's account may not .*create.*Role",
        ),
        (
            mock_kubernetes.NO_TRAINER,
            r"resources\.steps\.recover\.nodes: this cluster has no Kubeflow Trainer",
        ),
        (
            (403, "exceeded quota: gpus, requested: 16"),
            r"resources\.steps\.recover: the cluster refuses it: exceeded",
        ),
    ):
        cluster.refusal = refusal
        with pytest.raises(InputError, match=message):
            train()


@pytest.mark.parametrize("status", [401, 403, 503])
def test_an_api_that_does_not_answer_for_a_while_is_waited_for(cluster, monkeypatch, status):
    """One that has just started may know neither the account nor its rights."""
    monkeypatch.setattr(coordinator, "PATIENCE", 60)
    monkeypatch.setattr(coordinator.time, "sleep", lambda seconds: None)
    cluster.play(("trainjob-running", running()), ("trainjob-complete", done()))
    cluster.on_create = lambda job: setattr(cluster, "outage", [status] * 3)
    train()
    assert cluster.deleted == [] and cluster.outage == []


def test_last_words_fit_what_kubernetes_keeps():
    words = trainjob.last_words("training failed: " + "tränen\n" * 4000 + "the end", 1)
    assert 2000 < len(words.encode()) <= 4096
    reason = json.loads(words)["reason"]
    assert reason.startswith("training failed") and reason.endswith("the end")


def test_the_machines_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("KFP_RUN_ID", RUN)
    for environment, expected, coordinates in [
        ({"PTL_NODES": "1"}, Machines(), False),
        ({"PTL_NODES": "4"}, Machines(), True),
        ({"PTL_NODES": "4"} | OF_A_NODE, Machines(2, 1, "localhost", 1), False),
    ]:
        assert machines(environment) == expected and expected.first == (expected.rank == 0)
        assert is_coordinator(environment) == coordinates
    monkeypatch.setenv("PTL_RUN_ID", "local")
    assert not is_coordinator({"PTL_NODES": "4"})


def test_a_node_leaves_its_error_and_the_exit_code_of_a_wrong_input(tmp_path, monkeypatch, capfd):
    """Its call names a field that does not exist."""
    settings = {
        "step": "recover-1",
        "experiment": "e",
        "iterations": 1,
        "recover": [{"metod": "cpt"}],
        "seed": 0,
    }
    data = {"sources": [{"source": "x.jsonl"}]}
    settings |= {"tokens": "uniform", "recovery_tokens": 100, "training": data, "chat": {}}
    words = tmp_path / "termination-log"
    environment = {
        "KFP_RUN_ID": RUN,
        "PTL_SCRATCH": str(tmp_path),
        "PTL_TERMINATION_LOG": str(words),
    }
    environment[trainjob.CALL] = json.dumps(
        {"settings": settings, "inputs": {"model": POINTER.dump()}}
    )
    for name, value in (environment | OF_A_NODE).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        node.main()
    left = json.loads(words.read_text())
    assert (
        left["exit_code"] == 2
        and "metod" in left["reason"]
        and left["reason"] in capfd.readouterr().err
    )


def test_while_nodes_start_again_status_says_so(cluster):
    """The first start is none again; what a coordinator that was killed has left of a restart is taken away."""
    first = [pod(NAME, 0), pod(NAME, 1, phase="Pending")]
    again = [pod(NAME, 0, attempt=1), pod(NAME, 1, attempt=1, phase="Pending")]
    looks = [first, running(), again, again, running(attempt=1)]
    cluster.play(*(("trainjob-running", pods) for pods in looks), ("trainjob-complete", done()))
    notes = []
    assert train(notes.append) == 1
    assert notes == ["", "nodes started again (restart 1): 1 of 2 run", ""]
