"""The same tests hold for every kind of store."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from conftest import FilePlace

from ptl.errors import InputError, WorkError
from ptl.storage import store
from ptl.storage.local_files import path_of
from ptl.storage.manifest import BLOCK, FILES, digest_of


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    rng = random.Random(0)
    (folder / "model.safetensors").write_bytes(rng.randbytes(300_000))
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "sub" / "empty.txt").write_text("")
    (folder / "model.safetensors").chmod(0o600)
    return folder


def publish(folder, place, attempt="a"):
    uri = f"{place.root}/models/{attempt}/artifacts"
    files = store.publish(folder, uri)
    return store.Pointer(uri, digest_of(files), run_id="0123abcd"), files


def record(pointer, key="k1"):
    return store.Record(key, pointer, {"seconds": 1.5})


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != FILES]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_round_trip(place, folder, tmp_path):
    pointer, files = publish(folder, place)
    assert [file.path for file in files] == ["config.json", "model.safetensors", "sub/empty.txt"]
    assert store.committed(place.root, "run1", "prune-1") is None
    written = store.commit(place.root, "run1", "prune-1", record(pointer))
    assert store.committed(place.root, "run1", "prune-1") == written
    assert written.metadata == {"seconds": 1.5}
    found = store.fetch(written.pointer, tmp_path / "cache")
    assert contents(found) == contents(folder)
    assert (found / "model.safetensors").stat().st_mode & 0o044  # safetensors writes 0600: other UIDs must read too
    assert store.fetch(pointer, tmp_path / "cache") == found


def test_every_block_has_a_digest(place, folder, tmp_path):
    data = random.Random(4).randbytes(2 * BLOCK)
    for name, size in (("model.safetensors", 2 * BLOCK), ("other.safetensors", BLOCK + 1)):
        (folder / name).write_bytes(data[:size])
    pointer, files = publish(folder, place)
    blocks = {file.path: file.blocks for file in files}
    whole, second = (hashlib.sha256(part).hexdigest() for part in (data[:BLOCK], data[BLOCK:]))
    assert blocks["model.safetensors"] == (whole, second)
    assert blocks["other.safetensors"] == (whole, hashlib.sha256(data[BLOCK : BLOCK + 1]).hexdigest())
    assert blocks["sub/empty.txt"] == (hashlib.sha256().hexdigest(),)
    assert contents(store.fetch(pointer, tmp_path / "cache")) == contents(folder)


def test_digest_is_of_contents_not_of_place(place, folder):
    first, files = publish(folder, place, "a")
    second, _ = publish(folder, place, "b")
    assert first.digest == second.digest == digest_of(reversed(files))
    assert digest_of(files[1:]) != first.digest


def test_flipped_bit_is_refused(place, folder, tmp_path):
    pointer, _ = publish(folder, place)

    def flip(data):
        return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]

    place.change(f"{pointer.uri}/model.safetensors", flip)
    with pytest.raises(WorkError, match=r"digest differs in file model.safetensors.*run the step"):
        store.fetch(pointer, tmp_path / "cache")


def test_cut_off_file_is_refused(place, folder, tmp_path):
    pointer, _ = publish(folder, place)
    place.change(f"{pointer.uri}/model.safetensors", lambda data: data[:-1])
    with pytest.raises(WorkError, match=r"model.safetensors has 299999 bytes, 300000 were published"):
        store.fetch(pointer, tmp_path / "cache")


def test_deleted_file_is_named(place, folder, tmp_path):
    pointer, _ = publish(folder, place)
    place.delete(f"{pointer.uri}/config.json")
    with pytest.raises(WorkError, match=r"file config.json was deleted; restore it or run the step"):
        store.fetch(pointer, tmp_path / "cache")


def test_deleted_checkpoint_is_named(place, folder, tmp_path):
    pointer, _ = publish(folder, place)
    place.delete(pointer.uri)
    with pytest.raises(WorkError, match=r"models/a/artifacts of run 0123abcd is gone.*start a new run"):
        store.fetch(pointer, tmp_path / "cache")


def test_replaced_checkpoint_is_refused(place, folder, tmp_path):
    pointer, _ = publish(folder, place)
    with pytest.raises(WorkError, match="digest differs"):
        store.fetch(replace(pointer, digest="sha256:" + "0" * 64), tmp_path / "cache")


def test_damaged_list_and_record_are_refused(place, folder, tmp_path):
    pointer, _ = publish(folder, place)
    store.commit(place.root, "run1", "prune-1", record(pointer))
    place.change(f"{place.root}/run1/prune-1/manifest.json", lambda data: data.replace(b"1.5", b"1.6"))
    with pytest.raises(WorkError, match=r"digest differs.*delete .*manifest.json"):
        store.committed(place.root, "run1", "prune-1")
    place.change(f"{place.root}/run1/prune-1/manifest.json", lambda data: data[:40])
    with pytest.raises(WorkError, match="damaged"):
        store.committed(place.root, "run1", "prune-1")
    place.change(f"{pointer.uri}/{FILES}", lambda data: data[:40])
    with pytest.raises(WorkError, match="damaged"):
        store.fetch(pointer, tmp_path / "cache")


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "a\\b", ""])
def test_paths_out_of_the_folder_are_refused(place, folder, tmp_path, path):
    pointer, files = publish(folder, place)
    listed = [replace(files[0], path=path), *files[1:]]

    def poison(data):
        raw = json.loads(data)
        raw["files"] = [asdict(file) for file in listed]
        return json.dumps(raw).encode()

    place.change(f"{pointer.uri}/{FILES}", poison)
    with pytest.raises(WorkError, match="outside of the checkpoint"):
        store.fetch(replace(pointer, digest=digest_of(listed)), tmp_path / "cache")
    assert not (tmp_path / "evil").exists()


def test_symlinks_are_refused(place, folder):
    (folder / "sub" / "link").symlink_to("/etc/passwd")
    with pytest.raises(WorkError, match="link is not a regular file"):
        publish(folder, place)


def test_empty_and_missing_folders_are_refused(place, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(WorkError, match="holds no files"):
            publish(tmp_path / name, place)


def test_a_record_of_another_key_is_not_taken_and_is_replaced(place, folder):
    pointer, _ = publish(folder, place)
    store.withdraw(place.root, "run1", "prune-1")  # there is none
    first = store.commit(place.root, "run1", "prune-1", record(pointer, "k1"))
    assert store.committed(place.root, "run1", "prune-1", key="k2") is None
    assert store.committed(place.root, "run1", "prune-1", key="k1") == first
    store.withdraw(place.root, "run1", "prune-1")
    assert store.committed(place.root, "run1", "prune-1") is None
    for key in ("k2", "k3"):  # in place of a withdrawn one, and of another
        written = store.commit(place.root, "run1", "prune-1", record(pointer, key))
        assert store.committed(place.root, "run1", "prune-1") == written and written.key == key


def test_a_record_of_damaged_files_counts_again_once_they_are_repaired(place, folder):
    pointer, _ = publish(folder, place)
    pointer = replace(pointer, step="prune-1")
    store.mark_damaged(place.root, "run1", pointer)  # there is none
    first = store.commit(place.root, "run1", "prune-1", record(pointer))
    store.mark_damaged(place.root, "run1", replace(pointer, digest="sha256:" + "0" * 64))  # of other files
    assert store.committed(place.root, "run1", "prune-1") == first
    store.mark_damaged(place.root, "run1", pointer)
    assert store.committed(place.root, "run1", "prune-1", "k1") == replace(first, damaged=True)
    assert store.commit(place.root, "run1", "prune-1", record(pointer)) == first


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_names_cannot_leave_the_root(place, name):
    with pytest.raises(InputError, match="must be 1-128 letters"):
        store.committed(place.root, name, "prune-1")
    with pytest.raises(InputError, match="must be 1-128 letters"):
        store.committed(place.root, "run1", name)


def test_four_writers_one_commit(place, folder):
    def write(attempt):
        pointer, _ = publish(folder, place, attempt)
        return store.commit(place.root, "run1", "prune-1", record(pointer))

    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(write, "abcd"))
    winner = store.committed(place.root, "run1", "prune-1")
    assert records == [winner] * 4


def test_one_claim_wins(place):
    with ThreadPoolExecutor(8) as pool:
        values = set(pool.map(lambda value: store.claim(place.root, "run1", "parent", str(value)), range(8)))
    assert len(values) == 1
    assert store.claim(place.root, "run1", "parent", "late") in values


CHILD = """
import sys
from dataclasses import asdict
from pathlib import Path
from ptl.storage import store
folder, root, attempt = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
uri = f"{root}/models/{attempt}/artifacts"
files = store.publish(Path(folder), uri)
pointer = store.Pointer(uri, digest_of(files))
store.commit(root, "run1", "prune-1", store.Record("k", pointer))
"""


@pytest.mark.slow
def test_kill_at_random_moments(place, folder, tmp_path):
    (folder / "model.safetensors").write_bytes(random.Random(1).randbytes(24 << 20))
    expected = contents(folder)
    start = time.perf_counter()
    pointer, _ = publish(folder, place, "timing")
    seconds = time.perf_counter() - start
    rng, outcomes = random.Random(2), []
    for number in range(10):
        root = f"{place.root}/{number}"
        command = [sys.executable, "-c", CHILD, str(folder), root, "first"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        child.stdin.write(b"\n")
        child.stdin.flush()
        time.sleep(rng.uniform(0, 1.3 * seconds))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        half = store.committed(root, "run1", "prune-1")
        cache = tmp_path / "cache" / str(number)
        try:
            # Even with a pointer that nobody could have yet, a half checkpoint is not accepted.
            complete = store.fetch(replace(pointer, uri=f"{root}/models/first/artifacts"), cache)
            assert contents(complete) == expected
        except WorkError:
            assert half is None
        outcomes.append(half is not None)
        if half is None:
            again, _ = publish(folder, FilePlace(root), "second")
            half = store.commit(root, "run1", "prune-1", record(again, "k"))
        assert contents(store.fetch(half.pointer, cache)) == expected
    assert False in outcomes  # at least one kill came before the commit, else nothing was tested


def test_progress_counts_every_byte(place, folder, tmp_path):
    sent, got = [], []
    files = store.publish(folder, f"{place.root}/models/p", on_progress=sent.append)
    store.fetch(store.Pointer(f"{place.root}/models/p", digest_of(files)), tmp_path / "c", on_progress=got.append)
    assert sum(sent) == sum(got) == sum(file.size for file in files)


def test_pointer_survives_json():
    pointer = store.Pointer("file:///a", "sha256:" + "a" * 64, params=7, gate={"cap": None, "rejections": 1})
    assert store.Pointer.load(pointer.dump()) == pointer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "pointer: Invalid JSON"),
        ("[]", "pointer: Input should be an object"),
        ('{"uri": "file:///a"}', "pointer.digest: Field required"),
        ('{"uri": "file:///a", "digest": "md5:1"}', "pointer.digest: String should match pattern"),
        (f'{{"uri": "file:///a", "digest": "sha256:{"0" * 64}", "colour": 1}}', "pointer.colour: Unexpected"),
        (f'{{"uri": "file:///a", "digest": "sha256:{"0" * 64}", "params": true}}', "pointer.params: .* valid integer"),
    ],
)
def test_wrong_pointers(text, message):
    with pytest.raises(InputError, match=message):
        store.Pointer.load(text)


def test_unknown_scheme_is_refused():
    with pytest.raises(InputError, match=r"mlflow-artifacts:/1.*--no-serve-artifacts"):
        store.committed("mlflow-artifacts:/1/ptl", "run1", "prune-1")


def test_published_location_is_not_overwritten(place, tmp_path, folder):
    pointer, _ = publish(folder, place)
    with pytest.raises(WorkError, match="already holds"):
        publish(folder, place)
    assert contents(store.fetch(pointer, tmp_path / "cache")) == contents(folder)


def test_stray_files_are_refused(tmp_path, folder):
    pointer, _ = publish(folder, FilePlace(f"file://{tmp_path}/art"))
    (path_of(pointer.uri) / "registered_model_meta").write_bytes(b"x")  # by MLflow, when it loads a registered version
    store.fetch(pointer, tmp_path)
    (path_of(pointer.uri) / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WorkError, match=r"pytorch_model.bin is not part of the checkpoint"):
        store.fetch(pointer, tmp_path)
    (path_of(pointer.uri) / "pytorch_model.bin").unlink()
    (path_of(pointer.uri) / "config.json").unlink()
    (path_of(pointer.uri) / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(WorkError, match=r"config.json is not a regular file"):
        store.fetch(pointer, tmp_path)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from ptl.storage import store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.publish(Path(sys.argv[1]), sys.argv[2])
except store.WorkError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_no_space(tmp_path, folder):
    """A file size limit stands for the full disk: the kernel refuses the write in the same way."""
    pointer, _ = publish(folder, FilePlace(f"file://{tmp_path}/art"))
    location = f"file://{tmp_path}/art/models/b/artifacts"
    command = [sys.executable, "-c", LIMITED, str(folder), location]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "no space left while writing" in done.stdout
    assert "earlier checkpoints are intact" in done.stdout
    assert list((tmp_path / "art/models/b").iterdir()) == []
    assert contents(store.fetch(pointer, tmp_path / "cache")) == contents(folder)


def test_check_of_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        store.check(f"file://{tmp_path}/file/art")
    store.check(f"file://{tmp_path}/art")
    assert list((tmp_path / "art").iterdir()) == []
