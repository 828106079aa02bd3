"""Against a real MLflow database on sqlite; the first connection is slow, so one database serves all tests here."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

from ptl import store, tracking
from ptl.errors import InputError, WorkError


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def client(database, monkeypatch):
    uri = f"sqlite:///{database}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("PTL_RUN_ID", f"run-{uuid.uuid4().hex[:8]}")
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    return MlflowClient(uri, registry_uri=uri)


@pytest.fixture
def begin(database, client):
    def begin(step, iteration=0, arm="loop"):
        location = f"file://{database}/artifacts"
        return tracking.start("ptl-test", step, arm=arm, iteration=iteration, artifact_location=location)

    return begin


def finish(step_run, output=None, inputs=(), step=0, metrics=None, params=None):
    tracking.finish(step_run, params=params or {}, metrics=metrics or {}, inputs=list(inputs), output=output, step=step)


def test_parent_and_child(database, client, begin):
    step = begin("prune-1", 1)
    assert step.root == f"file://{database}/artifacts/ptl"
    child, parent = client.get_run(step.run_id), client.get_run(step.parent_run_id)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {key: child.data.tags[f"ptl.{key}"] for key in ("run", "step", "arm", "iteration")} == {
        "run": step.run,
        "step": "prune-1",
        "arm": "loop",
        "iteration": "1",
    }
    assert child.info.run_name == "prune-1" and parent.info.run_name == step.run
    assert child.info.artifact_uri == step.artifact_uri
    assert begin("recover-1", 1).parent_run_id == step.parent_run_id


def test_ended_runs_are_found_and_reopened(client, begin):
    first = begin("prune-1")
    tracking.fail(first, "out of memory")
    assert client.get_run(first.run_id).info.status == "FAILED"
    assert client.get_run(first.parent_run_id).info.status == "FAILED"
    assert client.get_run(first.run_id).data.tags["ptl.error"] == "out of memory"
    second = begin("prune-1")
    assert second == first
    assert client.get_run(first.run_id).info.status == client.get_run(first.parent_run_id).info.status == "RUNNING"
    finish(second)
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert "ptl.error" not in client.get_run(first.run_id).data.tags
    assert client.get_run(first.parent_run_id).info.status == "RUNNING"


def test_report_ends_the_parent(client, begin):
    step = begin("report")
    finish(step)
    assert client.get_run(step.parent_run_id).info.status == "FINISHED"


def test_concurrent_starts_give_one_run(client, begin):
    with ThreadPoolExecutor(4) as pool:
        runs = set(pool.map(lambda _: begin("prune-1"), range(4)))
    assert len(runs) == 1
    run = runs.pop()
    found = client.search_runs([run.experiment_id], f"tags.`ptl.run` = '{run.run}'")
    assert {each.info.run_id for each in found} == {run.run_id, run.parent_run_id}


def test_lineage_and_idempotent_finish(client, begin):
    first = begin("import-model")
    dense, place = tracking.new_model(first, "tiny-0.1", {"params": 100}, {"revision": "abc"})
    assert dense in place
    assert str(client.get_logged_model(dense).status) == "PENDING"
    finish(first, output=dense)
    step = begin("prune-1", 1)
    pruned, _ = tracking.new_model(step, "tiny", {"params": 90}, {})
    for _ in range(2):
        finish(step, output=pruned, inputs=[dense], step=1, metrics={"loss": 0.5}, params={"criterion": "max"})
    run = client.get_run(step.run_id)
    assert [model.model_id for model in run.inputs.model_inputs] == [dense]
    assert [(model.model_id, model.step) for model in run.outputs.model_outputs] == [(pruned, 1)]
    assert run.data.params == {"ptl.criterion": "max"}
    assert [point.value for point in client.get_metric_history(step.run_id, "loss")] == [0.5]
    model = client.get_logged_model(pruned)
    assert str(model.status) == "READY" and model.source_run_id == step.run_id
    assert model.params == {"ptl.params": "90"} and model.tags["ptl.run"] == step.run
    assert [(metric.key, metric.value) for metric in model.metrics] == [("loss", 0.5)]


def test_changed_parameter_keeps_the_first_value(client, begin, caplog):
    step = begin("prune-1")
    finish(step, params={"seed": 1})
    finish(step, params={"seed": 2, "sigma": 0.1})
    assert client.get_run(step.run_id).data.params == {"ptl.seed": "1", "ptl.sigma": "0.1"}
    assert "ptl.seed was 1 in an earlier attempt, now 2" in caplog.text


def test_models_of_killed_attempts_are_failed(client, begin):
    step = begin("prune-1")
    lost, _ = tracking.new_model(step, "tiny", {}, {})
    kept, _ = tracking.new_model(step, "tiny", {}, {})
    finish(step, output=kept)
    assert str(client.get_logged_model(lost).status) == "FAILED"
    assert str(client.get_logged_model(kept).status) == "READY"


def test_versions_and_aliases(client, begin, tmp_path):
    name = f"tiny-{uuid.uuid4().hex[:6]}"
    step = begin("recover-1", 1)
    pointers = []
    for params in (90, 80):
        model, place = tracking.new_model(step, name, {}, {})
        pointers.append(store.Pointer(place, "sha256:" + "0" * 64, params, run_id=step.run_id, model_id=model))
    versions = [tracking.register(step, name, pointer, {"iteration": 1}) for pointer in pointers]
    assert versions == ["1", "2"]
    assert tracking.register(step, name, pointers[0], {}) == "1"
    version = client.get_model_version(name, "2")
    assert version.tags["ptl.model_id"] == pointers[1].model_id
    assert version.tags["ptl.params"] == "80" and version.source == pointers[1].uri
    tracking.set_alias(name, "best", "1")
    tracking.set_alias(name, "smallest", "1")
    tracking.set_alias(name, "smallest", "2")
    found = {alias: client.get_model_version_by_alias(name, alias).version for alias in ("best", "smallest")}
    assert {alias: str(version) for alias, version in found.items()} == {"best": "1", "smallest": "2"}


def test_progress_is_on_the_parent_by_params(client, begin):
    step = begin("evaluate-1", 1)
    for _ in range(2):
        tracking.log_progress(step, 8_030_261_248, 0.97, low=0.95, high=0.98)
    tracking.log_progress(step, 4_000_000_000, 0.96)
    tracking.log_progress(begin("control-evaluate", 1, "control"), 4_000_000_000, 0.9)
    points = client.get_metric_history(step.parent_run_id, "by_params/accuracy")
    assert sorted((point.step, point.value) for point in points) == [(4_000_000_000, 0.96), (8_030_261_248, 0.97)]
    assert client.get_run(step.parent_run_id).data.metrics["by_params/control_accuracy"] == 0.9


def test_metrics_while_it_runs(client, begin):
    step = begin("recover-1", 1)
    for number in (10, 20):
        tracking.log_metrics(step, {"loss": 1 / number}, number)
    assert [point.step for point in client.get_metric_history(step.run_id, "loss")] == [10, 20]


def test_report_files(client, begin, tmp_path):
    step = begin("report")
    (tmp_path / "report.html").write_text("<html>")
    tracking.log_report(step, [tmp_path / "report.html"])
    assert [file.path for file in client.list_artifacts(step.parent_run_id, "report")] == ["report/report.html"]


def test_missing_settings(begin, monkeypatch):
    monkeypatch.delenv("PTL_RUN_ID")
    with pytest.raises(InputError, match="neither PTL_RUN_ID nor KFP_RUN_ID"):
        begin("prune-1")
    monkeypatch.setenv("KFP_RUN_ID", "from-kfp")
    assert begin("prune-1").run == "from-kfp"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI is not set"):
        begin("prune-1")


def test_server_that_does_not_answer(begin, monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that what is taken from the address is undone
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(WorkError, match=r"MLflow at http://127.0.0.1:9: .*is the server up") as caught:
        begin("prune-1")
    assert "secret" not in str(caught.value)


def test_deleted_experiment(client, database):
    identity = client.create_experiment("gone", f"file://{database}/gone")
    client.delete_experiment(identity)
    with pytest.raises(InputError, match=r"storage.experiment: 'gone' was deleted"):
        tracking.start("gone", "prune-1", arm="loop", iteration=1)


def test_links_hide_passwords(begin, monkeypatch):
    step = begin("report")
    assert tracking.links(step)["mlflow_url"] == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@mlflow.example/")
    assert tracking.links(step) == {
        "run_id": step.run,
        "mlflow_run_id": step.parent_run_id,
        "experiment_id": step.experiment_id,
        "mlflow_url": "https://mlflow.example",
    }
