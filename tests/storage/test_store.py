"""The same tests hold for every kind of store."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import full_disk

from ptl.errors import InputError, WorkError
from ptl.storage import local_files, manifest, s3, store
from ptl.storage.local_files import path_of
from ptl.storage.manifest import (
    FILES,
    MLFLOW_META,
    File,
    digest_of,
    dump_files,
    hash_files,
    load_files,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(300_000))
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "sub" / "empty.txt").write_text("")
    (folder / "model.safetensors").chmod(0o600)
    return folder


def publish(folder, root, attempt="a"):
    uri = f"{root}/models/{attempt}/artifacts"
    files = store.publish(folder, uri)
    return store.Pointer(uri, digest_of(files), run_id="0123abcd")


def record(pointer, key="k1"):
    return store.Record(key, pointer, {"seconds": 1.5})


def commit(place, *given, step="prune-1"):
    return store.commit(place.root, "run1", step, record(*given))


def committed(place, key=None, step="prune-1"):
    return store.committed(place.root, "run1", step, key)


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != FILES]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_each_block_has_a_digest_and_lists_of_other_formats_or_folders_are_refused(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(manifest, "BLOCK", 100)
    data, moved = random.Random(4).randbytes(200), []
    parts = {"a": [b""], "b": [data[:1]], "c": [data[:99]], "d": [data[:100]]}
    parts |= {"e": [data[:100], data[100:101]], "f": [data[:100], data[100:]]}
    for name, own in parts.items():
        (tmp_path / name).write_bytes(b"".join(own))
    digests = {
        name: [hashlib.sha256(part).hexdigest() for part in own] for name, own in parts.items()
    }
    rows = [[name, sum(map(len, own)), digests[name]] for name, own in parts.items()]
    expected = tuple(File(name, size, tuple(blocks)) for name, size, blocks in rows)
    assert hash_files(tmp_path, parts, moved.append) == expected
    assert sorted(moved) == [0, 1, 1, 99, 100, 100, 100, 100]
    digest = hashlib.sha256(json.dumps(rows).replace(" ", "").encode()).hexdigest()
    assert digest_of(expected) == digest_of(reversed(expected)) == f"sha256:{digest}"
    assert load_files(dump_files(reversed(expected)), "it") == expected
    manifest.verify(tmp_path, expected, "it")
    (tmp_path / "f").write_bytes(flip(data[::-1])[::-1])
    with pytest.raises(WorkError, match="digest differs in file f"):
        manifest.verify(tmp_path, expected, "it")
    for path in ["../evil", "/etc/evil", "a/../../evil", "a//b", "a\\b", "a\0b", FILES]:
        with pytest.raises(WorkError, match="outside of the checkpoint"):
            load_files(dump_files([File(path, 0, ())]), "it")
    for name in ("format", "block"):
        with pytest.raises(WorkError, match="damaged"):
            load_files(json.dumps(json.loads(dump_files([])) | {name: 1}), "it")


def test_a_digest_of_a_file_is_read_again_when_the_file_changes(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "file").write_text(text)
        assert manifest.file_digest(tmp_path / "file") == hashlib.sha256(text.encode()).hexdigest()
    assert (
        store.digest({"a": 1, "b": 2})
        == store.digest({"b": 2, "a": 1})
        != store.digest({"a": 2, "b": 1})
    )


def test_round_trip(place, folder, tmp_path):
    sent, got, uri = [], [], f"{place.root}/models/a"

    def is_sent(size):
        assert store.read(f"{uri}/{FILES}") is None  # the list comes last
        sent.append(size)

    (folder / MLFLOW_META).write_text("")  # of MLflow, and no part of a checkpoint
    files = store.publish(folder, uri, on_progress=is_sent)
    (folder / MLFLOW_META).unlink()
    with pytest.raises(WorkError, match="already holds"):
        store.publish(folder, uri)
    sizes = {"config.json": 18, "model.safetensors": 300_000, "sub/empty.txt": 0}
    assert {file.path: file.size for file in files} == sizes
    assert (
        load_files(store.read(f"{uri}/{FILES}"), "it")
        == files
        == hash_files(folder, [file.path for file in files])
    )
    pointer = store.Pointer(uri, digest_of(files))
    assert committed(place) is None
    written = commit(place, pointer)
    assert committed(place) == written == replace(record(pointer), step="prune-1")
    found = store.fetch(written.pointer, tmp_path / "cache", on_progress=got.append)
    assert contents(found) == contents(folder)
    # safetensors writes 0600: other UIDs must read too
    assert (found / "model.safetensors").stat().st_mode & 0o044
    assert store.fetch(pointer, tmp_path / "cache") == found
    assert sum(sent) == sum(got) == 300_018


def flip(data):
    return data[:17] + bytes([data[17] ^ 1]) + data[18:]


DAMAGES = {
    "flipped-bit": ("model.safetensors", flip, "digest differs in file model.safetensors"),
    "shorter": (
        "model.safetensors",
        lambda data: data[:-1],
        "model.safetensors has 299999 bytes, 300000 were",
    ),
    "deleted": ("config.json", None, r"file config\.json was deleted; restore it or run the step"),
    "all-deleted": ("", None, r"models/a/artifacts of run 0123abcd is gone.*start a new run"),
    "damaged-list": (FILES, lambda data: data[:40], "damaged"),
    "other-list": (
        FILES,
        lambda data: data.replace(b"300000", b"300001"),
        "was replaced: digest differs",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(damage, place, folder, tmp_path):
    path, edit, message = DAMAGES[damage]
    pointer = publish(folder, place.root)
    uri = f"{pointer.uri}/{path}".rstrip("/")
    place.change(uri, edit) if edit else place.delete(uri)
    with pytest.raises(WorkError, match=message):
        store.fetch(pointer, tmp_path / "cache")


def test_what_is_no_regular_file_or_not_listed_is_refused(folder, tmp_path):
    for make in (lambda path: path.symlink_to("/etc"), os.mkfifo):
        make(folder / "sub/x")
        with pytest.raises(WorkError, match="sub/x is not a regular file"):
            publish(folder, f"file://{tmp_path}/art")
        (folder / "sub/x").unlink()
    with pytest.raises(WorkError, match="holds no files"):
        publish(tmp_path / "nowhere", f"file://{tmp_path}/art")
    assert not (tmp_path / "art").exists()
    pointer = publish(folder, f"file://{tmp_path}/art")
    there = path_of(pointer.uri)
    (there / MLFLOW_META).touch()  # by MLflow, when it loads a registered version
    store.fetch(pointer, tmp_path)
    (there / "pytorch_model.bin").touch()
    with pytest.raises(WorkError, match=r"pytorch_model.bin is not part of the checkpoint"):
        store.fetch(pointer, tmp_path)


def test_a_damaged_or_foreign_record_is_refused(place, folder, monkeypatch):
    pointer = publish(folder, place.root)
    manifest_of = f"{place.root}/run1/{{}}/manifest.json".format
    for step in ("other", "cut", "edited", "copied"):
        commit(place, pointer, step=step)
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT", 2)
        commit(place, pointer, step="older")
    place.change(manifest_of("edited"), lambda data: data.replace(b"1.5", b"1.6"))
    place.change(manifest_of("cut"), lambda data: data[:40])
    place.change(manifest_of("copied"), lambda _: store.read(manifest_of("other")))
    for step, message in {
        "edited": "digest differs",
        "cut": "",
        "copied": "step copied",
        "older": "format 3",
    }.items():
        with pytest.raises(
            WorkError, match=rf"damaged .*{message}.*delete .*{step}/manifest\.json"
        ):
            committed(place, step=step)


def test_a_record_of_another_key_or_that_is_withdrawn_is_not_taken_and_is_replaced(place, folder):
    store.withdraw(place.root, "run1", "prune-1")  # there is none
    assert list(store.walk(place.root)) == []
    pointer = publish(folder, place.root)
    first = commit(place, pointer, "k1")
    assert committed(place, "k2") is None and committed(place, "k1") == first
    store.withdraw(place.root, "run1", "prune-1")
    assert committed(place) is committed(place, "k1") is None
    for key in ("k2", "k3"):  # in place of a withdrawn one, and of another
        written = commit(place, pointer, key)
        assert committed(place) == written and written.key == key


def test_a_record_of_damaged_files_counts_again_once_they_are_repaired(place, folder):
    pointer = replace(publish(folder, place.root), step="prune-1")
    store.mark_damaged(place.root, "run1", pointer)  # there is none
    first = commit(place, pointer)
    # of other files
    store.mark_damaged(place.root, "run1", replace(pointer, digest="sha256:" + "0" * 64))
    assert committed(place) == first
    store.mark_damaged(place.root, "run1", pointer)
    assert committed(place, "k1") == replace(first, damaged=True)
    assert commit(place, pointer) == first == committed(place)


def test_one_of_several_writers_wins(place, folder):
    def write(attempt):
        return commit(place, publish(folder, place.root, attempt))

    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(write, "abcd"))
        claims = set(
            pool.map(lambda value: store.claim(place.root, "run1", "parent", str(value)), range(8))
        )
    assert records == [committed(place)] * 4
    assert len(claims) == 1 and store.claim(place.root, "run1", "parent", "late") in claims


def test_pointers_names_and_roots_are_read_strictly(tmp_path):
    pointer = store.Pointer(
        "file:///a", "sha256:" + "a" * 64, params=7, gate={"cap": None, "rejections": 1}
    )
    assert store.Pointer.load(pointer.dump()) == pointer
    for field, value in {"digest": "md5:1", "colour": 1, "params": True, "uri": ""}.items():
        with pytest.raises(InputError, match=rf"^pointer\.{field}: "):
            store.Pointer.load(json.dumps(json.loads(pointer.dump()) | {field: value}))
    for name in ["../up", "a/b", "", ".hidden", "a" * 129]:
        for run, step in ((name, "prune-1"), ("run1", name)):
            with pytest.raises(InputError, match="must be 1-128 letters"):
                store.committed("file:///x", run, step)
    with pytest.raises(InputError, match=r"mlflow-artifacts:/1.*--no-serve-artifacts"):
        store.committed("mlflow-artifacts:/1/ptl", "run1", "prune-1")
    with pytest.raises(InputError, match="not an absolute path"):
        path_of("file://host/a")
    assert path_of("file:///a%20b") == Path("/a b") and path_of("/a%20b") == Path("/a%20b")
    assert s3.split("s3://b/a#1/c/") == ("b", "a#1/c")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        store.check(f"file://{tmp_path}/file/art")
    store.check(f"file://{tmp_path}/art")


@pytest.fixture
def events(monkeypatch, tmp_path):
    """What was made durable and given its name, in order; drafts are `.name`."""
    seen = []

    def noted(kind, real):
        def call(*given):
            path = (
                Path(f"/proc/self/fd/{given[0]}").readlink() if kind == "sync" else Path(given[-1])
            )
            draft = path.name.startswith(".")
            seen.append(f"{kind} {path.stem if draft else path.relative_to(tmp_path).as_posix()}")
            return real(*given)

        return call

    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync))
    monkeypatch.setattr(os, "link", noted("link", os.link))
    monkeypatch.setattr(Path, "replace", noted("rename", Path.replace))
    return seen


def test_bytes_are_durable_before_their_name_and_the_list_comes_last(events, folder, tmp_path):
    store.publish(folder, f"file://{tmp_path}/a")
    assert {*events[:3]} == {
        "sync a/config.json",
        "sync a/model.safetensors",
        "sync a/sub/empty.txt",
    }
    assert events[3:] == ["sync a", "sync a/sub", f"sync .{FILES}", f"rename a/{FILES}", "sync a"]
    events.clear()
    local_files.put_once(f"file://{tmp_path}/b/c", b"1")
    local_files.put(f"file://{tmp_path}/b/c", b"2")
    assert events == ["sync .c", "link b/c", "sync b", "sync .c", "rename b/c", "sync b"]
    assert local_files.put_once(f"file://{tmp_path}/b/c", b"3") == b"2"
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["c"]  # no draft
    local_files.replace(tmp_path / "secret", b"1", 0o600)  # others can never read it
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_of_a_checkpoint_that_is_deleted_the_list_goes_first(place, folder, tmp_path, monkeypatch):
    pointer, deleted = publish(folder, place.root), []
    if place.root.startswith("s3:"):  # nothing is deleted after the first object
        real = s3.client().delete_object
        monkeypatch.setattr(
            s3.client(), "delete_object", lambda **given: deleted or deleted.append(real(**given))
        )
    else:
        monkeypatch.setattr(shutil, "rmtree", lambda _: None)
    store.delete(pointer.uri, below=place.root)
    with pytest.raises(WorkError, match="is gone"):
        store.fetch(pointer, tmp_path / "cache")
    assert store.read(f"{pointer.uri}/config.json") is not None


def test_no_space(tmp_path, folder):
    pointer = publish(folder, f"file://{tmp_path}/art")
    with (
        full_disk(100_000),
        pytest.raises(WorkError, match=r"no space left while writing .*checkpoints are intact"),
    ):
        publish(folder, f"file://{tmp_path}/art", "b")
    assert list((tmp_path / "art/models/b").iterdir()) == []
    assert contents(store.fetch(pointer, tmp_path / "cache")) == contents(folder)


CHILD = """
import os, signal, sys
from pathlib import Path
from ptl.storage import store
from ptl.storage.manifest import digest_of
folder, root, moment = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment in ("put", "put_once"):
    setattr(store._backend(root), moment, die)
uri = f"{root}/models/first"
files = store.publish(Path(folder), uri, on_progress=die if moment == "bytes" else lambda _: None)
store.commit(root, "run1", "prune-1", store.Record("k1", store.Pointer(uri, digest_of(files)), {"seconds": 1.5}))
die()
"""


def test_a_kill_leaves_all_or_nothing(place, folder, tmp_path):
    """While bytes are copied, before the list, before the record and after it."""
    pointer = publish(folder, place.root)
    for moment in ("bytes", "put", "put_once", "end"):
        root, cache = f"{place.root}/{moment}", tmp_path / "cache" / moment
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), root, moment], capture_output=True, text=True
        )
        assert child.returncode == -9, child.stderr
        half = store.committed(root, "run1", "prune-1")
        assert (half is not None) == (moment == "end")
        first = replace(pointer, uri=f"{root}/models/first")  # which nobody has yet
        if moment in ("bytes", "put"):
            with pytest.raises(WorkError, match="is gone"):
                store.fetch(first, cache)
        else:
            assert contents(store.fetch(first, cache)) == contents(folder)
        again = store.commit(root, "run1", "prune-1", record(publish(folder, root, "second")))
        assert again == half or half is None
        assert contents(store.fetch(again.pointer, cache)) == contents(folder)
