"""Against a real MLflow database on sqlite."""

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

from ptl.config.data import TrainingData
from ptl.config.run import Calibration
from ptl.data.sources import local_file
from ptl.errors import InputError
from ptl.lineage import mlflow_objects, run_page, tracking
from ptl.storage import store


@pytest.fixture
def client(mlflow_folder, monkeypatch):
    uri = f"sqlite:///{mlflow_folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("PTL_RUN_ID", f"run-{uuid.uuid4().hex[:8]}")
    return MlflowClient(uri, registry_uri=uri)


@pytest.fixture
def begin(mlflow_folder, client):
    def begin(step, iteration=0, arm="loop"):
        location = f"file://{mlflow_folder}/artifacts"
        return tracking.start(
            "ptl-test", step, arm=arm, iteration=iteration, artifact_location=location
        )

    return begin


def finish(step_run, output=None, inputs=(), step=0, metrics=None, params=None):
    tracking.finish(
        step_run,
        params=params or {},
        metrics=metrics or {},
        inputs=list(inputs),
        output=output,
        step=step,
    )


def test_each_step_has_one_run_below_that_of_the_pipeline_which_is_reopened(
    mlflow_folder, client, begin
):
    with ThreadPoolExecutor(4) as pool:  # also by concurrent starts
        (step,) = set(pool.map(lambda _: begin("prune-1", 1), range(4)))
    found = client.search_runs([step.experiment_id], f"tags.`ptl.run` = '{step.run}'")
    assert {run.info.run_id for run in found} == {step.run_id, step.parent_run_id}
    assert step.root == f"file://{mlflow_folder}/artifacts/ptl"

    def read():
        child, parent = (client.get_run(run_id) for run_id in (step.run_id, step.parent_run_id))
        return child, parent, [child.info.status, parent.info.status]

    child, parent, _ = read()
    tags = {"run": step.run, "step": "prune-1", "arm": "loop", "iteration": "1"}
    expected = {f"ptl.{key}": value for key, value in tags.items()} | {
        "mlflow.parentRunId": parent.info.run_id
    }
    assert expected.items() <= child.data.tags.items()
    assert child.info.run_name == "prune-1" and parent.info.run_name == step.run
    assert begin("recover-1", 1).parent_run_id == step.parent_run_id
    tracking.fail(step, "out of memory")
    child, _, statuses = read()
    assert statuses == ["FAILED", "FAILED"] and child.data.tags["ptl.error"] == "out of memory"
    assert begin("prune-1", 1) == step and read()[2] == ["RUNNING", "RUNNING"]
    for number in (10, 20):
        tracking.log_metrics(step, {"loss": 1 / number}, number)
    finish(step)
    child, _, statuses = read()
    assert statuses == ["FINISHED", "RUNNING"] and "ptl.error" not in child.data.tags
    assert [point.step for point in client.get_metric_history(step.run_id, "loss")] == [10, 20]


def test_errors_of_steps_that_failed(begin):
    begin("prune-1")
    finish(begin("recover-1"))
    tracking.fail(begin("export-gguf-q8-0", arm="export"), "no room")
    tracking.fail(begin("control-recover", arm="control"), "the loss is nan")
    step = begin("evaluate-1")
    assert tracking.errors_of(step, ["export-gguf-q8-0", "evaluate-1"]) == {
        "export-gguf-q8-0": "no room"
    }


def test_lineage_and_a_step_that_ends_again(client, begin):
    first = begin("import-model")
    dense, place = tracking.new_model(first, "tiny-0.1", {"params": 100}, {"revision": "abc"})
    assert dense in place and str(client.get_logged_model(dense).status) == "PENDING"
    finish(first, output=dense)
    step = begin("prune-1", 1)
    # an attempt was killed
    lost, pruned = (tracking.new_model(step, "tiny", {"params": 90}, {})[0] for _ in range(2))
    for params in ({"seed": 1}, {"seed": 2, "sigma": 0.1}):
        finish(step, output=pruned, inputs=[dense], step=1, metrics={"loss": 0.5}, params=params)
    run = client.get_run(step.run_id)
    assert [model.model_id for model in run.inputs.model_inputs] == [dense]
    assert [(model.model_id, model.step) for model in run.outputs.model_outputs] == [(pruned, 1)]
    assert run.data.params == {"ptl.seed": "1", "ptl.sigma": "0.1"}
    assert [point.value for point in client.get_metric_history(step.run_id, "loss")] == [0.5]
    assert [str(client.get_logged_model(model).status) for model in (lost, pruned)] == [
        "FAILED",
        "READY",
    ]
    model = client.get_logged_model(pruned)
    assert (model.name, model.source_run_id) == (f"{step.run}-tiny", step.run_id)
    assert model.params == {"ptl.params": "90"} and model.tags["ptl.run"] == step.run
    assert [(metric.key, metric.value) for metric in model.metrics] == [("loss", 0.5)]


def test_versions_and_aliases(client, begin):
    name, step, pointers = f"tiny-{uuid.uuid4().hex[:6]}", begin("recover-1", 1), []
    for params in (90, 80):
        model, place = tracking.new_model(step, name, {}, {})
        pointers.append(
            store.Pointer(place, "sha256:" + "0" * 64, params, run_id=step.run_id, model_id=model)
        )
    versions = [
        mlflow_objects.register(step, name, pointer, {}) for pointer in [*pointers, pointers[0]]
    ]
    assert versions == ["1", "2", "1"]
    version = client.get_model_version(name, "2")
    assert (version.tags["ptl.model_id"], version.tags["ptl.params"]) == (
        pointers[1].model_id,
        "80",
    )
    assert version.source == pointers[1].uri
    for alias, number in (("best", "1"), ("smallest", "1"), ("smallest", "2")):
        mlflow_objects.set_alias(name, alias, number)
    found = [
        str(client.get_model_version_by_alias(name, alias).version)
        for alias in ("best", "smallest")
    ]
    assert found == ["1", "2"]


def test_the_run_says_what_it_was_made_from(client, begin, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    local = {"source": str(tmp_path / "train.jsonl")}
    against = {"against": [{"source": "org/chats", "split": "test", "revision": "abc"}]}
    training = TrainingData(sources=[local, {"source": "org/math"}], decontaminate=against)
    data = run_page.data_sets(Calibration(data=local), training, local_file)
    step = begin("import-model")
    settings = {"seed": 1, "prune.criterion": "max", **{f"field_{i}": i for i in range(150)}}
    for _ in range(2):
        run_page.describe(step, settings, "0" * 40, data)
        run_page.log_result(step, {"final/accuracy": 0.98})
    run_page.describe(step, {"seed": 2, "name": "tiny"})
    parent = client.get_run(step.parent_run_id)
    assert (
        parent.data.tags["mlflow.source.git.commit"] == "0" * 40 and len(parent.data.params) == 153
    )
    assert parent.data.params["ptl.seed"] == "1" and parent.data.params["ptl.name"] == "tiny"
    assert len(client.get_metric_history(step.parent_run_id, "final/accuracy")) == 1
    shown = {
        each.dataset.name: (each.dataset.digest, each.tags[0].value)
        for each in parent.inputs.dataset_inputs
    }
    digest = hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()[:32]
    expected = {
        "train.jsonl": (digest, "calibration, training"),
        "org/math": ("unpinned", "training"),
    }
    assert shown == expected | {"org/chats": ("abc", "decontamination")}


def test_a_deleted_experiment_and_a_run_without_an_id_are_input_errors(begin, client, monkeypatch):
    identity = client.create_experiment("gone", "file:///nowhere")
    client.delete_experiment(identity)
    with pytest.raises(InputError, match=r"storage.experiment: 'gone' was deleted"):
        tracking.start("gone", "prune-1", arm="loop", iteration=1)
    monkeypatch.delenv("PTL_RUN_ID")
    with pytest.raises(InputError, match="neither PTL_RUN_ID nor KFP_RUN_ID"):
        begin("prune-1")
    monkeypatch.setenv("KFP_RUN_ID", "from-kfp")
    assert begin("prune-1").run == "from-kfp"


def test_the_plugins_runs_are_used_on_a_cluster(client, begin, tmp_path, monkeypatch):
    """With Kubeflow's MLflow plugin a step continues in the run that the plugin made; its own names are prefixed."""
    monkeypatch.delenv("PTL_RUN_ID")
    monkeypatch.setenv("KFP_RUN_ID", f"kfp-{uuid.uuid4().hex[:8]}")
    # It is documented to make, before a task starts, a parent and a nested run with its own parameter.
    experiment = client.create_experiment(
        f"plugin-{uuid.uuid4().hex[:8]}", f"file://{tmp_path}/artifacts"
    )
    parent = client.create_run(experiment, run_name="pipeline run").info.run_id
    child = client.create_run(
        experiment, tags={"mlflow.parentRunId": parent}, run_name="prune-1"
    ).info.run_id
    client.log_param(child, "seed", "0")
    monkeypatch.setenv("MLFLOW_RUN_ID", child)
    step = begin("prune-1", 1)
    assert (step.experiment_id, step.parent_run_id, step.run_id) == (experiment, parent, child)
    assert step.root == f"file://{tmp_path}/artifacts/ptl" and step.run.startswith("kfp-")
    assert (
        client.get_run(parent).data.tags["ptl.role"] == "parent"
        and len(client.search_runs([experiment])) == 2
    )
    # Our own parameters do not clash with the plugin's.
    tracking.finish(
        step, params={"seed": 7}, metrics={"params": 1.0}, inputs=[], output=None, step=1
    )
    run = client.get_run(child)
    assert run.data.params == {"seed": "0", "ptl.seed": "7"} and run.info.status == "FINISHED"
    assert run.data.tags["ptl.step"] == "prune-1" and run.data.tags["mlflow.parentRunId"] == parent
    monkeypatch.setenv("PTL_RUN_ID", "local")  # where a shell may have set the id of a run
    assert begin("prune-1", 1).run_id != child
    # Without a parent one is made beside it.
    monkeypatch.delenv("PTL_RUN_ID")
    monkeypatch.setenv("KFP_RUN_ID", f"{step.run}-other")
    alone = client.create_run(experiment, run_name="alone")
    monkeypatch.setenv("MLFLOW_RUN_ID", alone.info.run_id)
    step = begin("prune-1", 1)
    assert step.run_id == alone.info.run_id and step.parent_run_id != parent
    assert client.get_run(step.run_id).data.tags["mlflow.parentRunId"] == step.parent_run_id
