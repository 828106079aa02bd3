"""Lost answers and lost databases: a proxy before a real MLflow server, and databases that are deleted or restored."""

import http.client
import json
import shutil
import sqlite3
import threading
import uuid
from collections import Counter
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import free_port
from mlflow import MlflowClient
from working import execute

from ptl.lineage import locate, mlflow_client, mlflow_objects, tracking
from ptl.local import runs, servers
from ptl.steps import step as steps
from ptl.steps.call import Call

pytestmark = pytest.mark.xdist_group("mlflow_objects")


@pytest.fixture(scope="module")
def mlflow(server, new_database, tmp_path_factory):
    """A real MLflow server, and an empty database like its own was."""
    root, port = new_database(tmp_path_factory.mktemp("mlflow")), free_port()
    shutil.copyfile(root / "mlflow.db", root / "empty.db")
    servers.mlflow_up(root, port, f"sqlite:///{root}/mlflow.db", f"s3://{servers.BUCKET}/objects", server)
    yield SimpleNamespace(root=root, port=port, empty=root / "empty.db")
    servers.down(root)


def copy(source, target):
    """A consistent copy of a sqlite database that is in use."""
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


@contextmanager
def lost_answers(monkeypatch, port, loses):
    """A fake: a proxy that closes the connection instead of handing on an answer where `loses(method, path)`."""

    class Proxy(BaseHTTPRequestHandler):
        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            upstream = http.client.HTTPConnection("127.0.0.1", port)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            self.close_connection = True
            if loses(self.command, self.path.partition("?")[0].rpartition("mlflow/")[2]):
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type", ""))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = forward

        def log_message(self, *_):
            return

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_port}")
    try:
        yield
    finally:
        proxy.shutdown()
        proxy.server_close()


@pytest.fixture
def environment(s3, mlflow, monkeypatch, tmp_path):
    monkeypatch.setenv("PTL_RUN_ID", f"run-{uuid.uuid4().hex[:8]}")
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow.port}")
    for name in ("KFP_RUN_ID", "PTL_ARTIFACT_ROOT", "PTL_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def publish(step, parent=None):
    """A step through `execute`, whose work is a small file."""

    def work(_src, folder, run):
        (folder / "config.json").write_text(step.step)
        return {"params": 100 if step.step == "import-model" else 90, "tokens": 1, "steps": 1}

    return execute(step, parent and parent.pointer, {"seed": 1}, work)


def whole(experiment, name):
    """Two steps, a version in the registry, and a report with its result."""
    dense = publish(Call("import-model", experiment))
    pruned = publish(Call("prune-1", experiment), dense)
    report = Call("report", experiment).start()
    version = mlflow_objects.register(report, name, pruned.pointer, {"step": "evaluate-1"})
    mlflow_objects.set_alias(name, "best", version)
    folder = steps.scratch("report")
    folder.mkdir(parents=True, exist_ok=True)
    pointer = {key: getattr(pruned.pointer, key) for key in ("uri", "digest", "params")}
    (folder / "result.json").write_text(json.dumps({"final": pointer, "rows": []}))
    tracking.log_report(report, [folder / "result.json"])
    tracking.finish(report, params={}, metrics={}, inputs=[pruned.pointer.model_id], output=None, step=0)
    return dense, pruned, version


CREATES = ("experiments/create", "runs/create", "logged-models", "registered-models/create", "model-versions/create")


@pytest.mark.slow
def test_each_is_created_once_though_the_first_answers_are_lost(mlflow, environment):
    """Of every kind of writing request to every address the first two answers are lost."""
    seen, experiment, name = Counter(), f"lost-{uuid.uuid4().hex[:6]}", f"tiny-{uuid.uuid4().hex[:6]}"

    def loses(method, path):
        seen[method, path] += 1
        return (method != "GET" and "search" not in path) and seen[method, path] <= 2

    environment.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    environment.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    environment.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # a command's first question is asked twice by default
    with lost_answers(environment, mlflow.port, loses):
        assert runs.artifact_location(experiment)
        _, pruned, version = whole(experiment, name)
        found = locate.checkpoint(tracking.pipeline_run())
    assert all(any(method == "POST" and path == create for method, path in seen) for create in CREATES)
    client = MlflowClient(f"http://127.0.0.1:{mlflow.port}", registry_uri=f"http://127.0.0.1:{mlflow.port}")
    place = client.get_experiment_by_name(experiment).experiment_id
    active = client.search_runs([place])
    assert sorted(run.info.run_name for run in active) == sorted(
        ["import-model", "prune-1", "report", tracking.pipeline_run()]
    )
    assert {run.info.status for run in active} == {"FINISHED"}
    models = client.search_logged_models([place])  # with those whose answers were lost, as of killed attempts
    assert {str(model.status) for model in models} == {"READY", "FAILED"}
    assert sorted(model.name for model in models if str(model.status) == "READY") == [
        f"{tracking.pipeline_run()}-{step}" for step in ("import-model", "prune-1")
    ]
    versions = client.search_model_versions(f"name = '{name}'")
    assert [str(each.version) for each in versions] == [version]
    assert found.pointer.digest == pruned.pointer.digest


def test_duplicates_of_an_earlier_process_are_settled(mlflow, environment):
    """A process died between the creation of its runs and the claim of one; a parent with children is not deleted."""
    client, experiment = mlflow_client.connect(), f"settle-{uuid.uuid4().hex[:6]}"
    place, run = client.create_experiment(experiment), tracking.pipeline_run()
    tags = {"ptl.run": run, "ptl.role": "parent"}
    lost = [client.create_run(place, tags=tags).info.run_id for _ in range(2)]
    used = client.create_run(place, tags=tags).info.run_id
    client.create_run(place, tags={"mlflow.parentRunId": used})
    step = tracking.start(experiment, "prune-1", arm="loop", iteration=1)
    assert step.parent_run_id == lost[0] == tracking.start(experiment, "prune-2", arm="loop", iteration=2).parent_run_id
    stages = {run_id: client.get_run(run_id).info.lifecycle_stage for run_id in (*lost, used)}
    assert stages == {lost[0]: "active", lost[1]: "deleted", used: "active"}


def test_a_result_is_read_from_the_run_that_finished(mlflow, environment):
    client, experiment = mlflow_client.connect(), f"read-{uuid.uuid4().hex[:6]}"
    place, run = client.create_experiment(experiment), tracking.pipeline_run()
    for status in ("RUNNING", "FINISHED", "RUNNING"):
        tags = {"ptl.run": run, "ptl.role": "parent"}
        parent = client.create_run(place, tags=tags).info.run_id
        client.create_run(place, tags={"ptl.run": run, "ptl.role": "step", "ptl.step": "report"})
        if status == "FINISHED":
            client.set_terminated(parent, status)
            finished = parent
    assert finished in locate.find_run(run)[0].artifacts


@pytest.fixture
def database(request, environment, mlflow, server, tmp_path):
    """An MLflow database, used directly or by a server, that can be saved and replaced."""
    path, backup, port = tmp_path / "mlflow.db", tmp_path / "backup.db", free_port()
    copy(mlflow.empty, path)
    if request.param == "local":
        environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        environment.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/artifacts")

        def replace(source):
            copy(source, tmp_path / "again.db")  # of another name: this process has open connections to the first
            environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/again.db")
    else:

        def up():
            servers.mlflow_up(tmp_path, port, f"sqlite:///{path}", f"s3://{servers.BUCKET}/{tmp_path.name}", server)

        def replace(source):
            servers.down(tmp_path)
            copy(source, path)
            up()

        up()
        environment.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    yield SimpleNamespace(
        save=lambda: copy(path, backup), lose=lambda: replace(mlflow.empty), restore=lambda: replace(backup)
    )
    servers.down(tmp_path)


# A server takes seconds to start, and an older database has lost something too.
@pytest.mark.parametrize(
    "database, state", [("local", "lost"), ("local", "older"), ("served", "older")], indirect=["database"]
)
@pytest.mark.slow
def test_a_run_continues_after_its_database_was_lost(database, state):
    """Its finished steps are taken as they are, what follows has them as input, and MLflow shows the run anew."""
    experiment, name = f"db-{uuid.uuid4().hex[:6]}", f"tiny-{uuid.uuid4().hex[:6]}"
    dense = publish(Call("import-model", experiment))
    database.save()
    pruned = publish(Call("prune-1", experiment), dense)
    database.lose() if state == "lost" else database.restore()

    assert publish(Call("import-model", experiment)) == dense
    assert publish(Call("prune-1", experiment), dense) == pruned
    recovered = publish(Call("recover-1", experiment), pruned)
    report = Call("report", experiment).start()
    assert mlflow_objects.register(report, name, pruned.pointer, {}) == "1"
    tracking.finish(report, params={}, metrics={}, inputs=[pruned.pointer.model_id], output=None, step=0)
    client = mlflow_client.connect()
    found = client.search_runs([report.experiment_id])
    names = ["import-model", "prune-1", "recover-1", "report", tracking.pipeline_run()]
    assert sorted(run.info.run_name for run in found) == sorted(names)
    assert {run.info.status for run in found} == {"FINISHED"}
    ids = [record.pointer.model_id for record in (dense, pruned, recovered)]
    assert mlflow_objects.existing_models(client, ids) == ({ids[0], ids[2]} if state == "older" else {ids[2]})
    # Whoever comes later finds the same runs.
    assert Call("prune-1", experiment).start().parent_run_id == report.parent_run_id


def test_a_run_that_was_deleted_in_mlflow_is_made_anew(environment):
    experiment = f"deleted-{uuid.uuid4().hex[:6]}"
    first = Call("prune-1", experiment).start()
    mlflow_client.connect().delete_run(first.run_id)
    second = Call("prune-1", experiment).start()
    assert second.run_id != first.run_id and second.parent_run_id == first.parent_run_id
    assert Call("prune-1", experiment).start() == second
