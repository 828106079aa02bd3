"""What can go wrong between a step and an S3 server; the store's own tests are in test_store.py."""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import free_port

from ptl.errors import InputError, WorkError
from ptl.local import servers
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.s3 import CREDENTIALS, client

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(40 * MIB))
    (folder / "config.json").write_text("{}")
    return folder


def publish(folder, root, attempt="a"):
    files = store.publish(folder, f"{root}/models/{attempt}")
    return store.Pointer(f"{root}/models/{attempt}", digest_of(files))


def same(one, other):
    return all((other / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


def test_missing_credentials(s3, monkeypatch, tmp_path):
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="no S3 credentials; set AWS_ACCESS_KEY_ID"):
        store.check(s3.root)


def test_credentials_come_from_the_environment_only(s3, monkeypatch, tmp_path):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(InputError, match="no S3 credentials"):
        store.committed(s3.root, "run1", "prune-1")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(s3, monkeypatch, folder, name):
    monkeypatch.setenv(name, "wrong")
    for work in (lambda: store.check(s3.root), lambda: publish(folder, s3.root)):
        with pytest.raises(InputError, match=r"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the server's"):
            work()


def test_missing_bucket(s3, folder):
    for work in (lambda: store.check("s3://nowhere/ptl"), lambda: publish(folder, "s3://nowhere/ptl")):
        with pytest.raises(InputError, match=r"s3://nowhere/.*the bucket does not exist; create it"):
            work()


def test_wrong_endpoint(s3, monkeypatch):
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"at http://127.0.0.1:9: .*is MLFLOW_S3_ENDPOINT_URL right"):
        store.check(s3.root)
    assert time.monotonic() - start < 10
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "127.0.0.1:9")
    with pytest.raises(InputError, match=r"MLFLOW_S3_ENDPOINT_URL: '127.0.0.1:9' is not an address"):
        store.check(s3.root)


def test_check_of_a_good_store(s3):
    store.check(s3.root)
    assert store.committed(s3.root, "run1", "prune-1") is None


def test_complete_download_is_taken_again(s3, folder, tmp_path):
    pointer = publish(folder, s3.root)
    first = store.fetch(pointer, tmp_path / "cache")
    s3.delete(f"{pointer.uri}/model.safetensors")
    assert store.fetch(pointer, tmp_path / "cache") == first
    assert same(folder, first)


def test_damaged_download_is_fetched_again(s3, folder, tmp_path):
    pointer = publish(folder, s3.root)
    first = store.fetch(pointer, tmp_path / "cache")
    (first / "config.json").write_text("[]")
    assert same(folder, store.fetch(pointer, tmp_path / "cache"))


def test_refused_download_leaves_nothing(s3, folder, tmp_path):
    pointer = publish(folder, s3.root)
    s3.change(f"{pointer.uri}/model.safetensors", lambda data: data[:-1] + b"\0")
    with pytest.raises(WorkError, match=r"digest differs in file model.safetensors"):
        store.fetch(pointer, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@contextmanager
def fake_faults(monkeypatch, endpoint, fault):
    """A fake: a proxy before the real server; a status from `fault(method, headers, count)` is the answer.

    0 closes the connection. A function edits the server's answer: (status, headers, body) -> the same.
    """
    target, seen, lock = urlsplit(endpoint).netloc, [], threading.Lock()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                seen.append(self.command)
                status, answer, headers = fault(self.command, self.headers, len(seen)), b"", []
            if status == 0:
                self.close_connection = True
                return
            if status is None or callable(status):
                edit = status
                upstream = http.client.HTTPConnection(target)
                # The client signed the proxy's address as Host, and it is forwarded as it came.
                upstream.request(self.command, self.path, body, dict(self.headers))
                reply = upstream.getresponse()
                status, answer, headers = reply.status, reply.read(), reply.getheaders()
                upstream.close()
                if edit is not None:
                    status, edited, answer = edit(status, dict(headers), answer)
                    headers = list(edited.items())
            else:
                code = {501: "NotImplemented"}.get(status, "InternalError")
                answer = f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            length = dict(headers)["Content-Length"] if self.command == "HEAD" else len(answer)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *_):
            return

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    try:
        yield seen
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_store_without_conditional_writes(s3, server, folder, monkeypatch):
    def fault(method, headers, count):
        return 501 if "If-None-Match" in headers else None

    with fake_faults(monkeypatch, server["MLFLOW_S3_ENDPOINT_URL"], fault) as seen:
        pointer = publish(folder, s3.root)
        first = store.commit(s3.root, "run1", "prune-1", store.Record("k", pointer))
        assert store.commit(s3.root, "run1", "prune-1", store.Record("k", pointer, {"other": 1})) == first
    assert store.committed(s3.root, "run1", "prune-1") == first
    assert "PUT" in seen


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.slow
def test_server_errors_are_retried(s3, server, folder, monkeypatch, tmp_path, status):
    with fake_faults(
        monkeypatch, server["MLFLOW_S3_ENDPOINT_URL"], lambda method, headers, count: status if count % 4 == 1 else None
    ) as seen:
        pointer = publish(folder, s3.root)
        assert same(folder, store.fetch(pointer, tmp_path / "cache"))
    assert len(seen) > 8


def on_blocks(edit, times=1):
    """A fault: so many answers to requests for a range are edited."""
    left = [times]

    def fault(method, headers, count):
        if method != "GET" or "Range" not in headers or not left[0]:
            return None
        left[0] -= 1
        return edit

    return fault


def flipped(status, headers, body):
    return status, headers, body[:100] + bytes([body[100] ^ 1]) + body[101:]


def longer(status, headers, body):
    return status, headers, body + b"x" * 5000


def shorter(status, headers, body):
    span, _, size = headers["Content-Range"].partition("/")
    first = int(span.split()[1].split("-")[0])
    body = body[: len(body) // 2]
    return status, {**headers, "Content-Range": f"bytes {first}-{first + len(body) - 1}/{size}"}, body


def login_page(status, headers, body):
    return 200, {"Content-Type": "text/html"}, b"<html>please log in</html>"


@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize("edit", [flipped, longer, shorter, login_page])
def test_wrong_answers_to_ranges_do_no_harm(s3, server, folder, monkeypatch, tmp_path, edit, times):
    """What arrives wrong once is fetched again; what stays wrong is refused, and nothing of it is left."""
    pointer = publish(folder, s3.root)
    with fake_faults(monkeypatch, server["MLFLOW_S3_ENDPOINT_URL"], on_blocks(edit, times)):
        try:
            assert same(folder, store.fetch(pointer, tmp_path / "cache"))
        except WorkError:
            assert times > 1
            assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_server_that_is_gone_is_not_waited_for_twice(s3, server, folder, monkeypatch, tmp_path):
    """An empty file too is missed, though there is nothing of it to receive."""
    for path in folder.iterdir():
        path.unlink()
    (folder / "empty.txt").touch()
    pointer = publish(folder, s3.root)
    monkeypatch.setattr(client, "__defaults__", (2,))
    whole = []

    def fault(method, headers, count):
        whole.append(count)
        return 0 if count > 1 else None  # after the list of files

    with (
        fake_faults(monkeypatch, server["MLFLOW_S3_ENDPOINT_URL"], fault),
        pytest.raises(WorkError, match="s3://"),
    ):
        store.fetch(pointer, tmp_path / "cache")
    assert len(whole) == 3


def test_a_byte_that_flips_in_a_list_or_a_record_is_read_again(s3, server, folder, monkeypatch, tmp_path):
    (folder / "model.safetensors").unlink()
    pointer = publish(folder, s3.root)
    record = store.commit(s3.root, "run1", "prune-1", store.Record("k", pointer))
    with fake_faults(
        monkeypatch, server["MLFLOW_S3_ENDPOINT_URL"], lambda method, headers, count: flipped if count % 2 else None
    ):
        assert store.committed(s3.root, "run1", "prune-1") == record
        assert same(folder, store.fetch(pointer, tmp_path / "cache"))


MOVE = """
import sys
from pathlib import Path
from ptl.storage import store
from ptl.storage.manifest import digest_of
files = store.publish(Path(sys.argv[1]), sys.argv[2])
store.fetch(store.Pointer(sys.argv[2], digest_of(files)), Path(sys.argv[3]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


FULL = """
import resource, signal, sys
from pathlib import Path
from ptl.storage import store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    store.fetch(store.Pointer.load(sys.argv[1]), Path(sys.argv[2]))
except store.WorkError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_no_space_for_a_download(s3, folder, tmp_path):
    """A file size limit stands for the full disk: the kernel refuses the write in the same way."""
    pointer = publish(folder, s3.root)
    command = [sys.executable, "-c", FULL, pointer.dump(), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "no space left while writing" in done.stdout
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert same(folder, store.fetch(pointer, tmp_path / "cache"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_memory_is_bounded(s3, folder, tmp_path):
    with (folder / "model.safetensors").open("wb") as file:
        for _ in range(320):
            file.write(random.randbytes(MIB))
    command = [sys.executable, "-c", MOVE, str(folder), f"{s3.root}/models/big", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) / 1024
    assert peak < 300, f"{peak:.0f} MiB"


@pytest.mark.slow
def test_server_restarted_in_mid_transfer(s3, folder, tmp_path, monkeypatch):
    root, port = tmp_path / "own", free_port()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name, value in servers.s3_up(root, port).items():
        monkeypatch.setenv(name, value)
    (folder / "model.safetensors").write_bytes(random.Random(3).randbytes(150 * MIB))
    moved, restarts = [], []

    def again():
        os.kill(json.loads((root / "stack" / "s3.service.json").read_text())["pid"], signal.SIGKILL)
        time.sleep(2)
        servers.s3_up(root, port)

    def restart(count):
        """Called while bytes move: kill the server when a third has moved, and start it again."""
        moved.append(count)
        if sum(moved) > 50 * MIB and not restarts:
            restarts.append(threading.Thread(target=again))
            restarts[0].start()

    try:
        location = f"s3://{servers.BUCKET}/ptl/models/a"
        pointer = store.Pointer(location, digest_of(store.publish(folder, location, on_progress=restart)))
        restarts.pop().join()
        moved.clear()
        found = store.fetch(pointer, tmp_path / "cache", on_progress=restart)
        restarts.pop().join()
        assert same(folder, found)
    finally:
        for thread in restarts:  # whatever failed: no server is left behind
            thread.join()
        assert servers.down(root) == ["s3"]
