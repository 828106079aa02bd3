"""A recover step of two nodes from end to end: real processes with a disk each, real MLflow, a mock of Kubernetes.

A node is killed while it trains, and so is the coordinator: the step still ends, with what one machine would have made.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mock_kubernetes
import pytest
from conftest import free_port
from mlflow import MlflowClient
from recovering import DATA, DENSE, SHORT, cut, recover, weights

from pipelines.prune_tune_loop.cluster import train_job
from ptl.config.run import load_config
from ptl.steps import trainjob
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer

ROOT = Path(__file__).parents[2]
RUN = "77777777-0000-4000-8000-000000000000"
TOKENS = 3000
# An earlier stage reaches the second node by the store.
STAGES = [SHORT | {"method": "cpt", "share": 0.5}, SHORT | {"method": "cpt"}]


@pytest.fixture
def pruned(tmp_path):
    folder = cut(DENSE, tmp_path / "cut", 130_000)
    location = f"file://{tmp_path}/art/pruned"
    return folder, Pointer(location, digest_of(store.publish(folder, location)), 130_000, 170_000, step="prune-1")


@pytest.fixture
def environment(tmp_path, new_database):
    """Of every pod; on a cluster ConfigMap and Secrets are its source."""
    new_database(tmp_path)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": f"{ROOT}",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PTL_ARTIFACT_ROOT": f"file://{tmp_path}/art",
        "KFP_RUN_ID": RUN,
        "KFP_POD_NAME": mock_kubernetes.OWN_POD,
        "PTL_NODES": "2",
        "PTL_STORE_MINUTES": "0",
    }


def call_of(pointer, folder):
    """The call of recover-1 as its component writes it."""
    data = DATA.model_dump(mode="json") | {"decontaminate": {"tasks": False}}
    settings = {"step": "recover-1", "experiment": "nodes", "iterations": 1, "recovery_tokens": TOKENS}
    settings |= {"tokens": "uniform", "recover": STAGES, "training": data, "seed": 0}
    call = {"settings": settings, "inputs": {"model": pointer.dump()}}
    path = folder / "call.json"
    path.write_text(json.dumps(call | {"outputs": {"out": str(folder / "out")}}))
    return path


def wait_for(condition, process, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, "it did not happen"
        time.sleep(0.1)


@pytest.mark.slow
def test_nodes_and_the_coordinator_may_die_and_the_result_is_that_of_one_machine(pruned, environment, tmp_path):
    folder, pointer = pruned
    config = load_config(ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml", {"resources.steps.recover.nodes": 2})
    template = json.loads(train_job(config, "ptl-recover"))
    template["spec"]["trainer"]["command"][0] = sys.executable
    call = call_of(pointer, tmp_path)

    with mock_kubernetes.serving(tmp_path) as cluster:
        # what a node needs of the run comes with its TrainJob
        of_nodes = {name: value for name, value in environment.items() if not name.startswith(("KFP_", "PTL_NODES"))}
        nodes = mock_kubernetes.Processes(cluster, tmp_path, of_nodes, free_port())
        coordinator_environment = environment | {
            "KUBECONFIG": str(cluster.kubeconfig),
            "PTL_SCRATCH": str(tmp_path / "disk-of-coordinator"),
            trainjob.TEMPLATE: json.dumps(template),
        }

        def coordinate():
            log = (tmp_path / "coordinator.log").open("a")
            command = [sys.executable, "-m", "ptl.steps.process", str(call), str(os.getpid())]
            return subprocess.Popen(command, env=coordinator_environment, stdout=log, stderr=subprocess.STDOUT)

        def printed():
            return (tmp_path / "coordinator.log").read_text()

        first = coordinate()
        # the second stage has begun on both nodes
        wait_for(lambda: list((tmp_path / "disk-0-1").glob("**/0-cpt-out.json")), first)
        wait_for(lambda: list((tmp_path / "art").glob("ptl/*/recover-1.1.training-*")), first)
        os.killpg(nodes.nodes[1].pid, signal.SIGKILL)
        wait_for(lambda: "restart 1" in printed(), first)
        first.send_signal(signal.SIGKILL)
        first.wait()
        second = coordinate()
        try:
            assert second.wait(240) == 0, printed()
        finally:
            nodes.stop()

    output = printed()
    assert len(cluster.created) == 1 and cluster.deleted == []
    assert "was started by an earlier attempt: it is followed" in output
    assert "100% 3,000 of 3,000 tokens" in output  # of the first node, which says before what it does
    begun = [
        "node 0 of 2",
        "fetching prune-1",
        "1 of 2 training processes, which wait",
        "all training processes",
        "loss",
    ]
    assert [output.find(said) for said in begun] == sorted(map(output.find, begun)) and begun[0] in output
    # what the coordinator hands on is what the first node has published
    result = Pointer.load((tmp_path / "out").read_text())
    trained = weights(store.fetch(result, tmp_path / "fetched"))
    recover(folder, tmp_path / "alone", *STAGES, tokens=TOKENS)
    alone = weights(tmp_path / "alone")
    assert trained.keys() == alone.keys()
    assert max(float((trained[name] - alone[name]).abs().max()) for name in alone) < 1e-4
    # and the restart has repeated neither the first stage nor what was stored of the second
    metadata = store.committed(f"file://{tmp_path}/art/ptl", RUN, "recover-1").metadata
    stages = metadata["details"]["stages"]
    assert [stage["details"]["processes"] for stage in stages] == [2, 2] and metadata["resumed_at"] > 0
    assert not list((tmp_path / "art").glob("ptl/*/*training-*"))

    # MLflow has one run of the step, with the metrics that the first node logged while it trained
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("nodes").experiment_id
    (step,) = client.search_runs([experiment], "tags.`ptl.step` = 'recover-1'")
    assert step.info.status == "FINISHED" and step.data.tags["ptl.attempt"] == "1"
    assert client.get_metric_history(step.info.run_id, "train/loss")
