"""With Kubeflow's MLflow plugin, a step goes on in the run that the plugin made, and its own names are prefixed."""

import uuid

import pytest
from mlflow import MlflowClient

from ptl.lineage import tracking


@pytest.fixture
def client(mlflow_folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_folder}/mlflow.db")
    monkeypatch.setenv("KFP_RUN_ID", f"kfp-{uuid.uuid4().hex[:8]}")
    return MlflowClient()


def start():
    return tracking.start("not-the-plugins", "prune-1", arm="loop", iteration=1)


def test_the_plugins_runs_are_used_on_a_cluster(client, tmp_path, monkeypatch):
    # It is documented to make, before a task starts, a parent and a nested run with its own parameter.
    experiment = client.create_experiment(f"plugin-{uuid.uuid4().hex[:8]}", f"file://{tmp_path}/artifacts")
    parent = client.create_run(experiment, run_name="pipeline run").info.run_id
    child = client.create_run(experiment, tags={"mlflow.parentRunId": parent}, run_name="prune-1").info.run_id
    client.log_param(child, "seed", "0")
    monkeypatch.setenv("MLFLOW_RUN_ID", child)
    step = start()
    assert (step.experiment_id, step.parent_run_id, step.run_id) == (experiment, parent, child)
    assert step.root == f"file://{tmp_path}/artifacts/ptl" and step.run.startswith("kfp-")
    assert client.get_run(parent).data.tags["ptl.role"] == "parent" and len(client.search_runs([experiment])) == 2
    # Our own parameters do not clash with the plugin's.
    tracking.finish(step, params={"seed": 7}, metrics={"params": 1.0}, inputs=[], output=None, step=1)
    run = client.get_run(child)
    assert run.data.params == {"seed": "0", "ptl.seed": "7"} and run.info.status == "FINISHED"
    assert run.data.tags["ptl.step"] == "prune-1" and run.data.tags["mlflow.parentRunId"] == parent
    monkeypatch.setenv("PTL_RUN_ID", "local")  # where a shell may have set the id of a run
    assert start().run_id != child
    # Without a parent one is made beside it.
    monkeypatch.delenv("PTL_RUN_ID")
    monkeypatch.setenv("KFP_RUN_ID", f"{step.run}-other")
    alone = client.create_run(experiment, run_name="alone")
    monkeypatch.setenv("MLFLOW_RUN_ID", alone.info.run_id)
    step = start()
    assert step.run_id == alone.info.run_id and step.parent_run_id != parent
    assert client.get_run(step.run_id).data.tags["mlflow.parentRunId"] == step.parent_run_id
