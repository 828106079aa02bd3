"""The real servers, started once; each test leaves them running."""

import json
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
from conftest import free_port, unused

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_objects, tracking
from ptl.local import servers
from ptl.storage import store
from ptl.storage.manifest import digest_of


@pytest.fixture(scope="module")
def running(weed, tmp_path_factory):
    """Root, ports and environment of a stack that is up."""
    root, s3_port, mlflow_port = tmp_path_factory.mktemp("stack"), free_port(), free_port()
    env = servers.up(root, s3_port=s3_port, mlflow_port=mlflow_port)
    yield root, s3_port, mlflow_port, env
    servers.down(root)
    assert unused(s3_port) and unused(mlflow_port)


@pytest.fixture
def environment(running, monkeypatch):
    for name, value in running[3].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PTL_RUN_ID", f"run-{uuid.uuid4().hex[:8]}")
    return running[3]


def notes(root):
    return {path.name: json.loads(path.read_text()) for path in (root / "stack").glob("*.service.json")}


def work(tmp_path, experiment):
    """What a step does: start, publish, commit, finish, fetch."""
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    step = tracking.start(experiment, "import-model", arm="loop", iteration=0)
    model, location = tracking.new_model(step, "tiny", {"params": 10}, {})
    files = store.publish(folder, location)
    pointer = store.Pointer(location, digest_of(files), 10, run_id=step.run_id, model_id=model)
    store.commit(step.root, step.run, "import-model", store.Record("k", pointer))
    assert mlflow_objects.register(step, "tiny", pointer, {}) == mlflow_objects.register(step, "tiny", pointer, {})
    tracking.finish(step, params={"seed": 0}, metrics={"accuracy": 1.0}, inputs=[], output=model, step=0)
    fetched = store.fetch(pointer, tmp_path / "cache")
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    return step, pointer


def test_a_step_through_both_servers(environment, tmp_path):
    step, pointer = work(tmp_path, "through-both")
    assert pointer.uri.startswith(f"s3://{servers.BUCKET}/mlflow/") and step.root.startswith("s3://")
    (tmp_path / "report.html").write_text("<html>")
    tracking.log_report(step, [tmp_path / "report.html"])
    tracking.log_progress(step, 10, 1.0)
    from mlflow import MlflowClient

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    run = client.get_run(step.run_id)
    assert run.info.status == "FINISHED"
    assert [each.model_id for each in run.outputs.model_outputs] == [pointer.model_id]
    assert [each.path for each in client.list_artifacts(step.parent_run_id, "report")] == ["report/report.html"]


def test_up_again_changes_nothing(running):
    root, s3_port, mlflow_port, env = running
    before = notes(root)
    assert set(before) == {"s3.service.json", "mlflow.service.json"}
    assert servers.up(root, s3_port=s3_port, mlflow_port=mlflow_port) == env
    assert notes(root) == before


def test_other_ports_while_it_runs_are_refused(running):
    root, s3_port, mlflow_port, _ = running
    with pytest.raises(InputError, match=rf"--mlflow-port: the mlflow server .* already runs on port {mlflow_port}"):
        servers.up(root, s3_port=s3_port, mlflow_port=mlflow_port + 1)
    with pytest.raises(InputError, match=rf"--s3-port: the s3 server .* already runs on port {s3_port}"):
        servers.up(root, s3_port=s3_port + 1, mlflow_port=mlflow_port)


def test_port_in_use(running, tmp_path):
    _, s3_port, mlflow_port, _ = running
    with pytest.raises(InputError, match=rf"--mlflow-port: port {mlflow_port} is in use"):
        servers.up(tmp_path, s3_port=free_port(), mlflow_port=mlflow_port)
    with pytest.raises(InputError, match=rf"--s3-port: port {s3_port} is in use"):
        servers.up(tmp_path, s3_port=s3_port, mlflow_port=free_port())
    with socket.socket() as taken:  # a port that SeaweedFS takes besides the one that was asked for
        port = free_port()
        taken.bind((servers.HOST, port + 2 + servers.GRPC))
        with pytest.raises(InputError, match=rf"--s3-port: port {port + 2 + servers.GRPC} is in use"):
            servers.up(tmp_path, s3_port=port, mlflow_port=free_port())
    with pytest.raises(InputError, match="--s3-port: port 70000 must be in"):
        servers.up(tmp_path, s3_port=60000, mlflow_port=free_port())
    assert notes(tmp_path) == {}


def test_only_loopback_and_no_open_door(running):
    root, s3_port, _, _ = running
    assert stat_mode(root / "stack" / "keys.json") == 0o600
    for shift, method, path, code in (
        (0, "GET", f"/{servers.BUCKET}/?list-type=2", 403),
        (1, "GET", f"/buckets/{servers.BUCKET}/", 404),
        (2, "POST", f"/col/delete?collection={servers.BUCKET}", 404),  # the bucket's data, all of it
        (2, "GET", "/dir/assign", 404),
        (2, "POST", "/submit", 404),
        (3, "GET", "/1,00", 401),
    ):
        request = urllib.request.Request(f"http://{servers.HOST}:{s3_port + shift}{path}", method=method)
        with pytest.raises(urllib.request.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=5)
        assert (shift, path, refused.value.code) == (shift, path, code)
    if Path("/proc/net/tcp").exists():
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ours = {int(row[1].split(":")[1], 16): row[1].split(":")[0] for row in listening if row[3] == "0A"}
        wanted = {port + extra for port in range(s3_port, s3_port + 4) for extra in (0, servers.GRPC)}
        assert {ours[port] for port in wanted if port in ours} == {"0100007F"}


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # how a gRPC client begins


@pytest.mark.parametrize("part", range(4), ids=["s3", "filer", "master", "volume"])
def test_grpc_ports_answer_nobody_without_the_key(running, part):
    root, s3_port, _, _ = running
    address = (servers.HOST, s3_port + part + servers.GRPC)
    with socket.create_connection(address, timeout=5) as plain:
        plain.sendall(PREFACE)
        assert plain.recv(100) == b""
    context = ssl.create_default_context(cafile=root / "stack" / "grpc.crt")
    context.set_alpn_protocols(["h2"])

    def answer():
        with context.wrap_socket(socket.create_connection(address, timeout=5), server_hostname="localhost") as client:
            client.sendall(PREFACE)
            return client.recv(100)

    with pytest.raises(ssl.SSLError, match="certificate required"):
        answer()
    context.load_cert_chain(root / "stack" / "grpc.crt", root / "stack" / "grpc.key")
    assert answer().startswith(b"\0\0")  # a SETTINGS frame: with the key it is a gRPC server
    assert stat_mode(root / "stack" / "grpc.key") == 0o600


def stat_mode(path):
    return path.stat().st_mode & 0o777


def test_a_reused_process_id_is_left_alone(tmp_path):
    """Someone else's process under the id in the note: another start time."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        (tmp_path / "stack").mkdir()
        note = servers.Service(other.pid, "long ago", 1)
        (tmp_path / "stack" / "s3.service.json").write_text(json.dumps(note.__dict__))
        assert servers.down(tmp_path) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_a_server_ends_with_the_tests_that_use_it(tmp_path):
    """As one that another pytest has started, which is killed at work."""
    started = tmp_path / "test_started.py"
    code = "import pathlib, time\n\n\ndef test(server):\n    pathlib.Path({!r}).touch()\n    time.sleep(600)\n"
    started.write_text(code.format(f"{tmp_path}/at-work"))
    tests = Path(__file__).parents[1]
    options = ["-q", "-p", "conftest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"--basetemp={tmp_path}/base"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "-c", os.devnull, str(started)],
        env=os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "at-work").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    pid = notes(tmp_path / "base/s30")["s3.service.json"]["pid"]
    while processes.start_time(pid):
        assert time.monotonic() < deadline, "the server outlives its tests"
        time.sleep(0.1)


def test_half_written_notes_and_keys_do_not_occur(tmp_path):
    """Each is written under another name and renamed."""
    keys = servers.access_keys(tmp_path)
    assert servers.access_keys(tmp_path) == keys and len(keys["AWS_SECRET_ACCESS_KEY"]) == 40
    assert (tmp_path / "stack/keys.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "stack").iterdir()] == ["keys.json"]


@pytest.mark.slow
def test_server_that_does_not_start_shows_its_log(tmp_path):
    with pytest.raises(
        WorkError, match=r"mlflow server ended with code[\s\S]*mlflow.log[\s\S]*nosuchdatabase"
    ) as caught:
        servers.mlflow_up(tmp_path, free_port(), "nosuchdatabase://user:secret@host/db", f"file://{tmp_path}", {})
    assert "secret" not in str(caught.value)
    assert servers.down(tmp_path) == []


@pytest.mark.slow
def test_mlflow_down_for_some_seconds(running, environment, tmp_path):
    root, s3_port, mlflow_port, _ = running
    step = tracking.start("survives", "prune-1", arm="loop", iteration=1)
    servers.stop(root, "mlflow")
    back = threading.Timer(4, lambda: servers.up(root, s3_port=s3_port, mlflow_port=mlflow_port))
    back.start()
    start = time.monotonic()
    tracking.finish(step, params={"seed": 1}, metrics={"loss": 0.5}, inputs=[], output=None, step=1)
    assert time.monotonic() - start > 4
    back.join()
    assert tracking.start("survives", "prune-1", arm="loop", iteration=1) == step


@pytest.mark.slow
def test_ui_shows_local_runs(new_database, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no runs yet"):
        servers.ui(tmp_path, free_port())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new_database(tmp_path)}/mlflow.db")
    monkeypatch.setenv("PTL_RUN_ID", "local")
    step = tracking.start("local", "prune-1", arm="loop", iteration=1, artifact_location=f"file://{tmp_path}/artifacts")
    port = free_port()
    command = [sys.executable, "-m", "ptl", "up", "--ui", "--home", str(tmp_path), "--mlflow-port", str(port)]
    server = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        # Not MLflow's start page, but that of the newest run's experiment.
        assert f"http://127.0.0.1:{port}/#/experiments/{step.experiment_id}/runs?" in server.stdout.readline()
        deadline = time.monotonic() + servers.START_SECONDS
        while not servers.answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert tracking.start("local", "prune-1", arm="loop", iteration=1) == step
        with pytest.raises(InputError, match=f"--mlflow-port: port {port} is in use"):
            servers.ui(tmp_path, port)
    finally:
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        server.wait(20)
    assert unused(port)


def postgres():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@pytest.fixture
def database(tmp_path):
    """A PostgreSQL server of its own; initdb refuses root, so root becomes `nobody`."""
    bins = postgres()
    if bins is None:
        pytest.skip("NO POSTGRESQL BINARIES HERE: MLflow on PostgreSQL is not tested; apt-get install postgresql")
    place = Path("/tmp") / f"ptl-pg-{uuid.uuid4().hex[:8]}"  # pytest's own folders are closed to other users
    place.mkdir()
    user = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(place, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    port, log = free_port(), place / "log"
    init = [bins / "initdb", "-D", place / "data", "-U", "ptl", "--auth=trust", "--no-sync"]
    subprocess.run(init, check=True, capture_output=True, cwd=place, **user)
    server = [
        bins / "postgres",
        "-D",
        place / "data",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-k",
        place,
        "-c",
        "fsync=off",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(server, stdout=output, stderr=output, cwd=place, **user)
    try:
        ready = [bins / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, capture_output=True).returncode and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None, log.read_text()
        yield f"postgresql+psycopg://ptl@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(place)


@pytest.mark.slow
def test_mlflow_on_postgresql(database, running, environment, tmp_path, monkeypatch):
    pytest.importorskip(
        "psycopg", reason="NO psycopg HERE: MLflow on PostgreSQL is not tested; pip install psycopg[binary]"
    )
    port, own = free_port(), tmp_path / "own"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    servers.mlflow_up(own, port, database, f"s3://{servers.BUCKET}/postgres", environment)
    try:
        step, _ = work(tmp_path, "on-postgres")
        assert tracking.start("on-postgres", "import-model", arm="loop", iteration=0) == step
        command = Path(f"/proc/{notes(own)['mlflow.service.json']['pid']}/cmdline")
        assert not command.exists() or b"postgresql" not in command.read_bytes()
    finally:
        servers.down(own)
