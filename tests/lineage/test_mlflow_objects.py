"""Lost answers and lost databases: a proxy before a real MLflow server, and databases that are deleted or restored."""

import json
import shutil
import sqlite3
import uuid
from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import pytest
from conftest import free_port
from mlflow.store.entities import PagedList
from mock_server import Proxy
from working import execute, run_locally

from ptl.errors import InputError
from ptl.lineage import locate, mlflow_client, mlflow_objects, tracking
from ptl.local import runs, servers
from ptl.steps.call import Call


@pytest.fixture
def environment(mlflow_folder, monkeypatch, tmp_path):
    run_locally(monkeypatch, tmp_path, mlflow_folder)
    return monkeypatch


def publish(step, parent=None):
    """A step through `execute`, whose work is a small file."""

    def work(_src, folder, run):
        (folder / "config.json").write_text(step.step)
        return {"params": 100 if step.step == "import-model" else 90, "tokens": 1, "steps": 1}

    return execute(step, parent and parent.pointer, {"seed": 1}, work)


CREATES = (
    "experiments/create",
    "runs/create",
    "logged-models",
    "registered-models/create",
    "model-versions/create",
)


def test_each_is_created_once_though_the_first_answers_are_lost(
    new_database, environment, tmp_path
):
    """Of every kind of writing request to every address the first two answers are lost."""
    seen, experiment, name = (
        Counter(),
        f"lost-{uuid.uuid4().hex[:6]}",
        f"tiny-{uuid.uuid4().hex[:6]}",
    )

    def lost(request, _):
        method, path = request.command, request.path.partition("?")[0].rpartition("mlflow/")[2]
        seen[method, path] += 1
        return (
            (lambda _: None)
            if method != "GET" and "search" not in path and seen[method, path] <= 2
            else None
        )

    new_database(tmp_path)
    port = free_port()
    proxy = Proxy(f"127.0.0.1:{port}", lost)
    environment.delenv("PTL_ARTIFACT_ROOT")
    servers.mlflow_up(
        tmp_path, port, f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/artifacts", {}
    )
    environment.setenv("MLFLOW_TRACKING_URI", proxy.url)
    # a command's first question is asked twice by default
    for setting, value in {
        "BACKOFF_FACTOR": "0",
        "BACKOFF_JITTER": "0",
        "MAX_RETRIES": "5",
    }.items():
        environment.setenv(f"MLFLOW_HTTP_REQUEST_{setting}", value)
    try:
        assert runs.artifact_location(experiment)
        dense = publish(Call("import-model", experiment))
        pruned = publish(Call("prune-1", experiment), dense)
        report = Call("report", experiment).start()
        version = mlflow_objects.register(report, name, pruned.pointer, {"step": "evaluate-1"})
        mlflow_objects.set_alias(name, "best", version)
        pointer = {key: getattr(pruned.pointer, key) for key in ("uri", "digest", "params")}
        (tmp_path / "result.json").write_text(json.dumps({"final": pointer, "rows": []}))
        tracking.log_report(report, [tmp_path / "result.json"])
        tracking.finish(
            report, params={}, metrics={}, inputs=[pruned.pointer.model_id], output=None, step=0
        )
        assert locate.checkpoint(tracking.pipeline_run()).pointer.digest == pruned.pointer.digest
    finally:
        proxy.close()
        servers.down(tmp_path)
    assert all(("POST", create) in seen for create in CREATES)
    environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow_client.connect()
    place = client.get_experiment_by_name(experiment).experiment_id
    statuses = [(run.info.run_name, run.info.status) for run in client.search_runs([place])]
    names = ["import-model", "prune-1", "report", tracking.pipeline_run()]
    assert sorted(statuses) == sorted((name, "FINISHED") for name in names)
    # with those whose answers were lost, as of killed attempts
    models = client.search_logged_models([place])
    ready = sorted(model.name for model in models if str(model.status) == "READY")
    assert ready == [f"{tracking.pipeline_run()}-{step}" for step in ("import-model", "prune-1")]
    assert {str(model.status) for model in models} == {"READY", "FAILED"}
    assert [str(each.version) for each in client.search_model_versions(f"name = '{name}'")] == [
        version
    ]


def test_searches_have_all_pages_and_versions_are_in_the_order_of_their_numbers():
    pages = {None: PagedList([10, 9], "2"), "2": PagedList([11], "")}
    assert list(mlflow_client.pages(lambda max_results, page_token: pages[page_token])) == [
        10,
        9,
        11,
    ]
    versions = SimpleNamespace(
        search_model_versions=lambda query: [SimpleNamespace(version=n) for n in (10, 9)]
    )
    assert mlflow_objects._versions_of(versions, "name", "m-1") == ["9", "10"]


@pytest.mark.parametrize("state", ["lost", "older"])
def test_a_run_continues_after_its_database_was_lost(environment, new_database, state, tmp_path):
    """Its finished steps are taken as they are, what follows has them as input, and MLflow shows the run anew."""
    experiment, name = f"db-{uuid.uuid4().hex[:6]}", f"tiny-{uuid.uuid4().hex[:6]}"
    backup = tmp_path / "backup.db"
    shutil.copyfile(new_database(tmp_path) / "mlflow.db", backup)
    environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    dense = publish(Call("import-model", experiment))
    if state == "older":
        with (
            closing(sqlite3.connect(tmp_path / "mlflow.db")) as used,
            closing(sqlite3.connect(backup)) as copy,
        ):
            used.backup(copy)
    pruned = publish(Call("prune-1", experiment), dense)
    # of another name: this process has open connections to the first
    environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{backup}")
    assert publish(Call("import-model", experiment)) == dense
    assert publish(Call("prune-1", experiment), dense) == pruned
    recovered = publish(Call("recover-1", experiment), pruned)
    report = Call("report", experiment).start()
    assert mlflow_objects.register(report, name, pruned.pointer, {}) == "1"
    tracking.finish(
        report, params={}, metrics={}, inputs=[pruned.pointer.model_id], output=None, step=0
    )
    client = mlflow_client.connect()
    statuses = [
        (run.info.run_name, run.info.status) for run in client.search_runs([report.experiment_id])
    ]
    names = ["import-model", "prune-1", "recover-1", "report", tracking.pipeline_run()]
    assert sorted(statuses) == sorted((name, "FINISHED") for name in names)
    ids = [record.pointer.model_id for record in (dense, pruned, recovered)]
    assert mlflow_objects.existing_models(client, ids) == (
        {ids[0], ids[2]} if state == "older" else {ids[2]}
    )
    # Whoever comes later finds the same runs.
    assert Call("prune-1", experiment).start().parent_run_id == report.parent_run_id


def test_local_runs_that_were_moved_are_not_continued_in_the_old_place(tmp_path, monkeypatch):
    def at(home):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        with mlflow_client.connected() as client:
            return mlflow_objects.experiment(
                client, "mine", (home / "artifacts").as_uri()
            ).artifact_location

    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    assert at(old) == at(old) == f"file://{old}/artifacts"
    shutil.copytree(old, new)
    with pytest.raises(
        InputError, match=rf"--home: {new} was moved or copied: .*{old}/artifacts; move it back"
    ):
        at(new)
    shutil.rmtree(old)
    old.symlink_to(new)
    assert at(new) == f"file://{old}/artifacts"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "localhost:5000",
            "MLFLOW_TRACKING_URI: localhost:5000; write http://localhost:5000, or https://",
        ),
        (
            "htp://user:secret@host",
            r"MLFLOW_TRACKING_URI: htp://\*\*\*@host begins with none of http, https, sqlite",
        ),
        (
            "file:///mlruns",
            "MLFLOW_TRACKING_URI: file:///mlruns begins with none of http, https, sqlite",
        ),
    ],
)
def test_an_address_that_mlflow_has_no_store_for_is_refused_before_any_work(
    uri, message, monkeypatch, tmp_path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for use in (mlflow_client.connect, lambda: runs.reach(tmp_path, s3=False)):
        with pytest.raises(InputError, match=message):
            use()
