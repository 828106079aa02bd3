"""What can go wrong between a step and an S3 server; the store's own tests are in test_store.py."""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import TokenRetrievalError
from conftest import full_disk
from mock_server import Proxy
from test_store import contents, flip, publish

from ptl.errors import InputError, WorkError
from ptl.storage import s3 as s3_files
from ptl.storage import store
from ptl.storage.manifest import FILES

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    """Three parts of a multipart upload, and a small file."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(33 * MIB))
    (folder / "config.json").write_text(
        '{"hidden_size": 8, "architectures": ["LlamaForCausalLM"]}' * 2
    )
    return folder


@pytest.fixture
def small(folder):
    (folder / "model.safetensors").unlink()
    return folder


def test_wrong_credentials(s3, monkeypatch, small):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for work in (lambda: store.check(s3.root), lambda: publish(small, s3.root)):
        with pytest.raises(
            InputError, match=r"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the server's"
        ):
            work()


def test_credentials_are_from_where_boto3_looks(s3, tmp_path, monkeypatch):
    keys = [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match="missing: AWS_SECRET_ACCESS_KEY"):
        store.check(s3.root)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="no S3 credentials; set AWS_ACCESS_KEY_ID"):
        store.check(s3.root)
    (tmp_path / ".aws").mkdir()
    file = "[own]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    (tmp_path / ".aws" / "credentials").write_text(file.format(*keys))
    monkeypatch.setenv("AWS_PROFILE", "other")
    for work in (s3_files.keys, lambda: store.check(s3.root)):
        with pytest.raises(
            InputError,
            match=r"\(other\) could not be found; log in again .*, correct the profile, or set AWS_ACCESS",
        ):
            work()
    with (
        pytest.raises(InputError, match=r"Token has expired.*aws sso login"),
        s3_files.explained(s3.root),
    ):
        raise TokenRetrievalError(provider="sso", error_msg="Token has expired")
    monkeypatch.setenv("AWS_PROFILE", "own")
    store.check(s3.root)
    assert [*s3_files.keys().values()] == keys


def test_a_wrong_bucket_or_endpoint(s3, small, monkeypatch):
    store.check(s3.root)
    for work in (
        lambda: store.check("s3://nowhere/ptl"),
        lambda: publish(small, "s3://nowhere/ptl"),
    ):
        with pytest.raises(
            InputError, match=r"s3://nowhere/.*the bucket does not exist; create it"
        ):
            work()
    start = time.monotonic()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        InputError,
        match=r"S3 at http://127.0.0.1:9 does not answer: connection refused .*is MLFLOW_S3_ENDPOINT_URL right",
    ):
        store.check(s3.root)
    assert time.monotonic() - start < 30  # where a transfer waits for two minutes


def test_a_complete_download_is_taken_again_and_a_damaged_one_is_not(s3, folder, tmp_path):
    pointer = publish(folder, s3.root)
    partial = tmp_path / "cache" / f"{pointer.digest.removeprefix('sha256:')}.partial"
    partial.mkdir(parents=True)
    (partial / "stray").touch()  # by a download that was killed
    first = store.fetch(pointer, tmp_path / "cache")
    assert contents(first) == contents(folder) and not partial.exists()
    (first / "config.json").write_text("[]")
    assert contents(store.fetch(pointer, tmp_path / "cache")) == contents(folder)
    s3.delete(f"{pointer.uri}/model.safetensors")
    assert store.fetch(pointer, tmp_path / "cache") == first
    assert contents(first) == contents(folder)


def test_processes_that_want_one_checkpoint_download_it_once(s3, small, tmp_path, monkeypatch):
    pointer, real, downloads = publish(small, s3.root), s3_files._download, []

    def slowly(*given):
        downloads.append(given)
        time.sleep(0.3)
        real(*given)

    monkeypatch.setattr(s3_files, "_download", slowly)
    with ThreadPoolExecutor(3) as pool:
        folders = {*pool.map(lambda _: store.fetch(pointer, tmp_path / "cache"), range(3))}
    assert len(folders) == len(downloads) == 1


def test_a_refused_download_leaves_nothing(s3, folder, tmp_path):
    pointer = publish(folder, s3.root)
    with full_disk(MIB), pytest.raises(WorkError, match="no space left while writing"):
        store.fetch(pointer, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    s3.change(f"{pointer.uri}/model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WorkError, match=r"digest differs in file model.safetensors"):
        store.fetch(pointer, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@contextmanager
def faulty(monkeypatch, server, fault):
    """A proxy before the real server, which has these faults."""
    with closing(Proxy(urlsplit(server["MLFLOW_S3_ENDPOINT_URL"]).netloc, fault)) as proxy:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", proxy.url)
        yield


def test_server_errors_are_retried(s3, server, small, monkeypatch, tmp_path):
    with faulty(monkeypatch, server, lambda _, count: {1: 500, 2: 503}.get(count % 6)):
        pointer = publish(small, s3.root)
        assert contents(store.fetch(pointer, tmp_path / "cache")) == contents(small)


def test_an_upload_that_the_server_has_forgotten_begins_again(
    s3, server, folder, monkeypatch, tmp_path
):
    completed = []

    def fault(request, _):
        if request.command == "POST" and "uploadId" in request.path and not completed:
            completed.append(request.path)
            return 404
        return None

    with faulty(monkeypatch, server, fault):
        assert contents(store.fetch(publish(folder, s3.root), tmp_path / "cache")) == contents(
            folder
        )
    assert completed


def test_a_byte_that_flips_on_its_way_is_fetched_again(s3, server, folder, monkeypatch, tmp_path):
    """A record, the list of files and once a part of a file; in a small file it is an error of boto3."""
    pointer, asked = publish(folder, s3.root), []
    record = store.commit(s3.root, "run1", "prune-1", store.Record("k", pointer))

    def fault(request, _):
        asked.append(f"{request.command} {request.path.rpartition('/')[2]}")
        flips = (
            request.command == "GET"
            and asked.count(asked[-1]) == 1
            and "config.json" not in request.path
        )
        return flip if flips else None

    with faulty(monkeypatch, server, fault):
        assert store.committed(s3.root, "run1", "prune-1") == record
        assert contents(store.fetch(pointer, tmp_path / "cache")) == contents(folder)
    counts = [asked.count(f"GET {name}") for name in ("manifest.json", FILES, "model.safetensors")]
    assert counts == [2, 2, 2 * 3]


MOVE = """
import sys
from pathlib import Path
from ptl.storage import store
from ptl.storage.manifest import digest_of
files = store.publish(Path(sys.argv[1]), sys.argv[2])
store.fetch(store.Pointer(sys.argv[2], digest_of(files)), Path(sys.argv[3]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.nightly
def test_memory_is_bounded(s3, folder, tmp_path):
    with (folder / "model.safetensors").open("wb") as file:
        for _ in range(320):
            file.write(random.randbytes(MIB))
    command = [
        sys.executable,
        "-c",
        MOVE,
        str(folder),
        f"{s3.root}/models/big",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) / 1024
    assert peak < 300, f"{peak:.0f} MiB"
