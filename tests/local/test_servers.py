"""The real servers, started once; each test leaves them running."""

import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import PREFACE, free_port, unused

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.local import servers

pytestmark = pytest.mark.xdist_group("servers")  # one stack for all


@pytest.fixture(scope="module")
def running(weed, tmp_path_factory):
    """Root, ports and environment of a stack that is up."""
    root, s3_port, mlflow_port = tmp_path_factory.mktemp("stack"), free_port(), free_port()
    env = servers.up(root, s3_port=s3_port, mlflow_port=mlflow_port)
    yield root, s3_port, mlflow_port, env
    servers.down(root)
    assert unused(s3_port) and unused(mlflow_port)


def notes(root):
    return {
        path.name: json.loads(path.read_text()) for path in (root / "stack").glob("*.service.json")
    }


def test_up_again_changes_nothing_and_ports_are_checked_before_anything_starts(running, tmp_path):
    root, s3_port, mlflow_port, env = running
    before = notes(root)
    assert set(before) == {"s3.service.json", "mlflow.service.json"}
    assert servers.up(root) == servers.up(root, s3_port=s3_port, mlflow_port=mlflow_port) == env
    free = free_port()
    with socket.socket() as taken:  # a port that SeaweedFS takes besides the one that was asked for
        taken.bind((servers.HOST, free + 2 + servers.GRPC))
        for folder, s3, mlflow, refusal in (
            (
                root,
                None,
                mlflow_port + 1,
                f"--mlflow-port: the mlflow server .* already runs on port {mlflow_port}",
            ),
            (
                root,
                s3_port + 1,
                None,
                f"--s3-port: the s3 server .* already runs on port {s3_port}",
            ),
            (tmp_path, free, mlflow_port, f"--mlflow-port: port {mlflow_port} is in use"),
            (tmp_path, free, free_port(), f"--s3-port: port {free + 2 + servers.GRPC} is in use"),
            (tmp_path, 65536, free_port(), "--s3-port: port 65536 must be in"),
        ):
            with pytest.raises(InputError, match=refusal):
                servers.up(folder, s3_port=s3, mlflow_port=mlflow)
    assert notes(root) == before and notes(tmp_path) == {}


def test_only_loopback_and_no_open_door(running):
    root, s3_port, _, _ = running
    keys, key, certificate = (
        root / "stack" / name for name in ("keys.json", "grpc.key", "grpc.crt")
    )
    assert [path.stat().st_mode & 0o777 for path in (keys, key)] == [0o600, 0o600]
    assert servers.access_keys(root) == json.loads(keys.read_text())
    for shift, method, path, code in (
        (0, "GET", f"/{servers.BUCKET}/?list-type=2", 403),
        (1, "GET", f"/buckets/{servers.BUCKET}/", 404),
        # the bucket's data, all of it
        (2, "POST", f"/col/delete?collection={servers.BUCKET}", 404),
        (2, "POST", "/submit", 404),
        (3, "GET", "/1,00", 401),
    ):
        request = urllib.request.Request(
            f"http://{servers.HOST}:{s3_port + shift}{path}", method=method
        )
        with pytest.raises(urllib.request.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=5)
        assert (shift, path, refused.value.code) == (shift, path, code)
    if Path("/proc/net/tcp").exists():
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        addresses = [row[1].split(":") for row in sockets if row[3] == "0A"]  # of those that listen
        ours = {port + extra for port in range(s3_port, s3_port + 4) for extra in (0, servers.GRPC)}
        assert {host for host, port in addresses if int(port, 16) in ours} == {"0100007F"}
    for port in range(s3_port + servers.GRPC, s3_port + servers.GRPC + 4):
        with socket.create_connection((servers.HOST, port), timeout=5) as plain:
            plain.sendall(PREFACE)
            assert plain.recv(100) == b""
        context = ssl.create_default_context(cafile=certificate)
        context.set_alpn_protocols(["h2"])
        with pytest.raises(ssl.SSLError, match="certificate required"):
            grpc_answer(context, port)
        context.load_cert_chain(certificate, key)
        # a frame of settings: with the key it is a gRPC server
        assert grpc_answer(context, port).startswith(b"\0\0")


def grpc_answer(context, port):
    address = (servers.HOST, port)
    with context.wrap_socket(
        socket.create_connection(address, timeout=5), server_hostname="localhost"
    ) as client:
        client.sendall(PREFACE)
        return client.recv(100)


def test_a_reused_process_id_is_left_alone(tmp_path):
    """Someone else's process under the id in the note: another start time."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        note = {"pid": other.pid, "started": "long ago", "port": 1}
        (servers.folder(tmp_path) / "s3.service.json").write_text(json.dumps(note))
        assert servers.down(tmp_path) == [] and notes(tmp_path) == {}
        assert other.poll() is None
        other.kill()


def test_a_server_that_does_not_start_is_ended_and_shows_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "START_SECONDS", 2)
    code = "import os, time; print(*range(20), 'postgresql://user:secret@host/db', os.getpid(), sep='\\n', flush=True)"
    with pytest.raises(
        WorkError, match=r"did not answer within 2 s; the end of .*/mlflow.log"
    ) as error:
        command = [sys.executable, "-c", f"{code}; time.sleep(60)"]
        servers.start(tmp_path, "mlflow", command, {}, free_port(), "/health")
    *_, address, process = str(error.value).splitlines()
    assert address == "postgresql://***@host/db" and not processes.start_time(int(process))
    assert notes(tmp_path) == {} and (tmp_path / "stack/mlflow.log").stat().st_mode & 0o777 == 0o600


def test_the_ui_is_mlflow_over_the_local_database(tmp_path, monkeypatch, capsys):
    """With a mock in place of exec, which does not return."""
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.extend(command))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    port = free_port()
    with pytest.raises(InputError, match="no runs yet"):
        servers.ui(tmp_path, port)
    (tmp_path / "mlflow.db").touch()
    servers.ui(tmp_path, port)
    assert (
        f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning "
        in capsys.readouterr().out
    )
    assert {f"--port={port}", f"--default-artifact-root=file://{tmp_path}/artifacts"} <= set(
        started
    )
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
