"""Against a real MLflow database on sqlite; the first connection is slow, so one database serves all tests here."""

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import run_records
from mlflow import MlflowClient

from ptl.config import image_names
from ptl.config.recover import TrainingData
from ptl.config.run import Calibration
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client, mlflow_objects, tracking
from ptl.report import run_page
from ptl.report.build import build
from ptl.storage import store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def database(new_database, tmp_path_factory):
    return new_database(tmp_path_factory.mktemp("mlflow"))


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


def test_changed_parameter_keeps_the_first_value(client, begin):
    step = begin("prune-1")
    finish(step, params={"seed": 1})
    finish(step, params={"seed": 2, "sigma": 0.1})
    assert client.get_run(step.run_id).data.params == {"ptl.seed": "1", "ptl.sigma": "0.1"}


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
    versions = [mlflow_objects.register(step, name, pointer, {"iteration": 1}) for pointer in pointers]
    assert versions == ["1", "2"]
    assert mlflow_objects.register(step, name, pointers[0], {}) == "1"
    version = client.get_model_version(name, "2")
    assert version.tags["ptl.model_id"] == pointers[1].model_id
    assert version.tags["ptl.params"] == "80" and version.source == pointers[1].uri
    mlflow_objects.set_alias(name, "best", "1")
    mlflow_objects.set_alias(name, "smallest", "1")
    mlflow_objects.set_alias(name, "smallest", "2")
    found = {alias: client.get_model_version_by_alias(name, alias).version for alias in ("best", "smallest")}
    assert {alias: str(version) for alias, version in found.items()} == {"best": "1", "smallest": "2"}


def test_a_model_is_named_by_its_run(client, begin):
    step = begin("recover-1", 1)
    model, _ = tracking.new_model(step, "recover-1", {}, {})
    assert client.get_logged_model(model).name == f"{step.run}-recover-1"


def test_the_run_says_what_it_was_made_from(client, begin, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    local = {"source": str(tmp_path / "train.jsonl")}
    hub = {"source": "org/chats", "split": "test", "revision": "abc"}
    data = run_page.data_sets(
        Calibration(data=local),
        TrainingData(sources=[local, {"source": "org/math"}], decontaminate={"against": [hub]}),
    )
    step = begin("import-model")
    settings = {"seed": 1, "prune.criterion": "max", **{f"field_{i}": i for i in range(150)}}
    for _ in range(2):
        run_page.describe(step, settings, "0" * 40, data)
    run_page.describe(step, {"seed": 2, "name": "tiny"})
    parent = client.get_run(step.parent_run_id)
    assert parent.data.tags["mlflow.source.git.commit"] == "0" * 40
    assert parent.data.params["ptl.seed"] == "1" and parent.data.params["ptl.name"] == "tiny"
    assert len(parent.data.params) == 153
    shown = {each.dataset.name: (each.dataset.digest, each.tags[0].value) for each in parent.inputs.dataset_inputs}
    digest = hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()[:32]
    assert shown == {
        "train.jsonl": (digest, "calibration, training"),
        "org/math": ("unpinned", "training"),
        "org/chats": ("abc", "decontamination"),
    }


def test_the_commit_is_that_of_the_image_or_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("PTL_REVISION", "unknown")
    assert image_names.own_revision() == image_names.revision_of(ROOT)
    monkeypatch.setenv("PTL_REVISION", "abc")
    assert image_names.own_revision() == "abc"
    assert image_names.revision_of(ROOT / "ptl") == ""  # in a repository, but not its top: as an installed package is


def test_the_result_is_on_the_run(client, begin):
    step = begin("report")
    result = build(run_records.records(), run_records.settings())
    for _ in range(2):
        run_page.log_result(step, run_page.result_metrics(result))
    metrics = client.get_run(step.parent_run_id).data.metrics
    assert metrics == {"final/accuracy": 0.98, "final/removed": 0.4, "final/p": 1.0}
    assert len(client.get_metric_history(step.parent_run_id, "final/accuracy")) == 1
    assert run_page.result_metrics(result.model_copy(update={"rows": result.rows[:1], "paired": {}})) == {
        "final/removed": 0.4
    }


def test_the_first_metric_of_a_run_is_no_score_of_the_dense_model(client, begin):
    """MLflow's tables show a metric at its largest step, and begin with the first of the alphabet."""
    step = begin("evaluate-1", 1)
    tracking.log_progress(step, 4_000_000_000, 0.96)
    for _ in range(2):
        tracking.log_progress(step, 0, 0.97, low=0.95, high=0.98)
    tracking.log_progress(begin("control-evaluate", 1, "control"), 4_000_000_000, 0.9)
    run_page.log_result(step, {"dense/accuracy": 0.97})
    points = client.get_metric_history(step.parent_run_id, "by_removed/accuracy")
    assert {(point.step, point.value) for point in points} == {(0, 0.97), (4_000_000_000, 0.96)}
    metrics = client.get_run(step.parent_run_id).data.metrics
    assert min(metrics.items()) == ("by_removed/accuracy", 0.96) and metrics["by_removed/control_accuracy"] == 0.9


def test_the_description_is_how_the_report_begins_and_where_kubeflow_has_the_run(client, begin, monkeypatch):
    monkeypatch.setenv("PTL_KFP_UI", "https://kubeflow.example.com/pipeline/")
    report = begin("report")

    def description():
        return client.get_run(report.parent_run_id).data.tags.get("mlflow.note.content")

    link = f"[Run in Kubeflow](https://kubeflow.example.com/pipeline/#/runs/details/{report.run})"
    assert description() == link
    tracking.fail(report, "no such folder")
    assert description().startswith("**Failed** in report: no such folder") and description().endswith(link)
    run_page.log_result(begin("report"), {}, "Not worse than the dense model. 0.9 with 40 % removed.")
    finish(report)
    assert description() == f"**Result**: Not worse than the dense model. 0.9 with 40 % removed.\n\n{link}"
    client.set_tag(report.parent_run_id, "mlflow.note.content", "somebody's own")
    finish(begin("report"))
    assert description() == "somebody's own"


def test_links_lead_to_where_people_open_mlflow(client, begin, monkeypatch):
    step = begin("report")
    assert tracking.links(step)["mlflow_url"] == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow.ptl.svc.cluster.local:5000/")
    assert tracking.links(step)["mlflow_url"] == "http://mlflow.ptl.svc.cluster.local:5000"
    monkeypatch.setenv("PTL_MLFLOW_UI", "https://mlflow.example.com/")
    assert tracking.links(step)["mlflow_url"] == "https://mlflow.example.com"


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


def test_a_database_is_made_by_the_one_way_that_a_kill_cannot_break(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_client, "DATABASE_CODE", "raise SystemExit('not in place')")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(WorkError, match="not in place"):
        mlflow_client.connect()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    "error", [InputError("not set"), OSError("no route"), KeyError("x")], ids=lambda e: type(e).__name__
)
def test_what_keeps_a_failure_from_being_recorded_does_not_hide_it(begin, monkeypatch, capsys, error):
    step_run = begin("prune-1")

    def fail():
        raise error

    monkeypatch.setattr(mlflow_client, "connect", fail)
    tracking.note_error(step_run, "ValueError: broken")
    assert "the failure could not be recorded" in capsys.readouterr().out
