"""With Kubeflow's MLflow plugin, a step goes on in the run that the plugin made, and its own names are prefixed."""

import pytest
from mlflow import MlflowClient

from ptl.lineage import tracking


@pytest.fixture
def client(new_database, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new_database(tmp_path)}/mlflow.db")
    monkeypatch.delenv("PTL_RUN_ID", raising=False)
    monkeypatch.setenv("KFP_RUN_ID", "kfp-run")
    return MlflowClient()


@pytest.fixture
def made(client, tmp_path, monkeypatch):
    """What the plugin is documented to make before a task starts: a parent and a nested run with its own parameter."""
    experiment = client.create_experiment("of-the-plugin", f"file://{tmp_path}/artifacts")
    parent = client.create_run(experiment, run_name="pipeline run")
    child = client.create_run(experiment, tags={"mlflow.parentRunId": parent.info.run_id}, run_name="prune-1")
    client.log_param(child.info.run_id, "seed", "0")
    monkeypatch.setenv("MLFLOW_RUN_ID", child.info.run_id)
    return experiment, parent.info.run_id, child.info.run_id


def start():
    return tracking.start("ptl", "prune-1", arm="loop", iteration=1)


def test_the_plugins_runs_are_used(client, made, tmp_path):
    experiment, parent, child = made
    step = start()
    assert (step.experiment_id, step.parent_run_id, step.run_id) == made
    assert step.root == f"file://{tmp_path}/artifacts/ptl" and step.run == "kfp-run"
    tags = client.get_run(child).data.tags
    assert tags["ptl.step"] == "prune-1" and tags["mlflow.parentRunId"] == parent
    assert client.get_run(parent).data.tags["ptl.role"] == "parent"
    assert len(client.search_runs([experiment])) == 2
    assert client.get_experiment_by_name("ptl") is None


def test_own_parameters_do_not_clash_with_the_plugins(client, made):
    _, _, child = made
    step = start()
    tracking.finish(step, params={"seed": 7}, metrics={"params": 1.0}, inputs=[], output=None, step=1)
    run = client.get_run(child)
    assert run.data.params == {"seed": "0", "ptl.seed": "7"} and run.info.status == "FINISHED"


def test_without_a_parent_one_is_made_beside_it(client, made, monkeypatch):
    experiment, parent, _ = made
    alone = client.create_run(experiment, run_name="alone")
    monkeypatch.setenv("MLFLOW_RUN_ID", alone.info.run_id)
    step = start()
    assert step.run_id == alone.info.run_id and step.parent_run_id != parent
    assert client.get_run(step.run_id).data.tags["mlflow.parentRunId"] == step.parent_run_id


def test_a_run_id_of_the_shell_is_not_taken_for_the_plugins(client, made, monkeypatch):
    monkeypatch.setenv("PTL_RUN_ID", "local")
    step = start()
    assert step.run_id != made[2] and step.run == "local"
