"""A recover step of two nodes from end to end: real processes with a disk each, real MLflow, a mock of Kubernetes.

The step ends with what one machine would have made; also where a node is killed while it trains, and the coordinator.
"""

import json
import os
import signal
import subprocess
import sys
import time

import mock_kubernetes
import pytest
from checkout import ROOT, TINY
from conftest import free_port
from mlflow import MlflowClient
from recovering import DATA, DENSE, SHORT, recover, weights

from pipelines.prune_tune_loop.cluster import train_job
from ptl.config.run import load_config
from ptl.steps import trainjob
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer

RUN = "77777777-0000-4000-8000-000000000000"
ONE_STAGE = [SHORT | {"method": "cpt"}]
# An earlier stage reaches the second node by the store.
TWO_STAGES = [SHORT | {"method": "cpt", "share": 0.5}, *ONE_STAGE]


@pytest.fixture
def environment(tmp_path, new_database):
    """Of every pod; on a cluster ConfigMap and Secrets are its source."""
    new_database(tmp_path)
    given = {name: os.environ[name] for name in ("PATH", "HOME")} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    given |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PTL_ARTIFACT_ROOT": f"file://{tmp_path}/art",
    }
    given |= {"KFP_RUN_ID": RUN, "KFP_POD_NAME": mock_kubernetes.OWN_POD}
    return given | {"PTL_NODES": "2", "PTL_STORE_MINUTES": "0"}


def call_of(stages, tokens, folder):
    """The call of recover-1 as its component writes it; to save time its model was not pruned."""
    location = f"file://{folder}/art/pruned"
    pointer = Pointer(
        location, digest_of(store.publish(DENSE, location)), 170_000, 170_000, step="prune-1"
    )
    data = DATA.model_dump(mode="json") | {"decontaminate": {"tasks": False}}
    settings = {
        "step": "recover-1",
        "experiment": "nodes",
        "iterations": 1,
        "recovery_tokens": tokens,
    }
    settings |= {"tokens": "uniform", "recover": stages, "training": data, "chat": {}, "seed": 0}
    path = folder / "call.json"
    call = {
        "settings": settings,
        "inputs": {"model": pointer.dump()},
        "outputs": {"out": str(folder / "out")},
    }
    path.write_text(json.dumps(call))
    return path


def wait_for(condition, process, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, "it did not happen"
        time.sleep(0.1)


@pytest.mark.parametrize("deaths", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_nodes_make_what_one_machine_makes(deaths, environment, tmp_path):
    config = load_config(TINY, {"resources.steps.recover.nodes": 2})
    template = json.loads(train_job(config, "ptl-recover"))
    template["spec"]["trainer"]["command"][0] = sys.executable
    stages, tokens = (TWO_STAGES, 3000) if deaths else (ONE_STAGE, 1000)
    command = [
        sys.executable,
        "-m",
        "ptl.steps.process",
        call_of(stages, tokens, tmp_path),
        str(os.getpid()),
    ]

    with mock_kubernetes.serving(tmp_path) as cluster:
        # what a node needs of the run comes with its TrainJob
        of_nodes = {
            name: value
            for name, value in environment.items()
            if not name.startswith(("KFP_", "PTL_NODES"))
        }
        nodes = mock_kubernetes.Processes(cluster, tmp_path, of_nodes, free_port())
        environment |= {
            "KUBECONFIG": str(cluster.kubeconfig),
            "PTL_SCRATCH": str(tmp_path / "disk-of-coordinator"),
        }
        environment[trainjob.TEMPLATE] = json.dumps(template)

        def coordinate():
            log = (tmp_path / "coordinator.log").open("a")
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

        def printed():
            return (tmp_path / "coordinator.log").read_text()

        coordinator = coordinate()
        if deaths:
            # the second stage has begun on both nodes
            wait_for(lambda: list((tmp_path / "disk-0-1").glob("**/0-cpt-out.json")), coordinator)
            wait_for(
                lambda: list((tmp_path / "art").glob("ptl/*/recover-1.1.training-*")), coordinator
            )
            os.killpg(nodes.nodes[1].pid, signal.SIGKILL)
            wait_for(lambda: "restart 1" in printed(), coordinator)
            coordinator.kill()
            coordinator.wait()
            coordinator = coordinate()
        try:
            assert coordinator.wait(240) == 0, printed()
        finally:
            nodes.stop()

    output = printed()
    assert len(cluster.created) == 1 and cluster.deleted == []
    assert ("was started by an earlier attempt: it is followed" in output) == deaths
    assert f"100% {tokens:,} of {tokens:,} tokens" in output  # of the first node
    # what the coordinator hands on is what the first node has published
    trained = weights(
        store.fetch(Pointer.load((tmp_path / "out").read_text()), tmp_path / "fetched")
    )
    recover(DENSE, tmp_path / "alone", *stages, tokens=tokens)
    alone = weights(tmp_path / "alone")
    assert trained.keys() == alone.keys()
    assert max(float((trained[name] - alone[name]).abs().max()) for name in alone) < 1e-4
    # and a restart has repeated neither the first stage nor what was stored of the second
    metadata = store.committed(f"file://{tmp_path}/art/ptl", RUN, "recover-1").metadata
    details = [stage["details"] for stage in metadata["details"].get("stages", [metadata])]
    assert [each["processes"] for each in details] == [2] * len(stages) and (
        metadata["resumed_at"] > 0
    ) == deaths
    assert not list((tmp_path / "art").glob("ptl/*/*training-*"))
    # MLflow has one run of the step, with the metrics that the first node logged while it trained
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("nodes").experiment_id
    (step,) = client.search_runs([experiment], "tags.`ptl.step` = 'recover-1'")
    assert step.info.status == "FINISHED" and step.data.tags["ptl.attempt"] == "1"
    assert client.get_metric_history(step.info.run_id, "train/loss")
