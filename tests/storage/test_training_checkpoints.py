"""Training checkpoints in the store: another machine resumes from them, and nothing of them stays after success."""

import shutil
from dataclasses import replace

import pytest
from recovering import DATA, DENSE, cut, recover

from ptl.recovery import launch
from ptl.recovery.recover import RECOVERIES
from ptl.storage import store, training_checkpoints
from ptl.storage.local_files import COMPLETE, last_complete
from ptl.storage.store import Pointer, Record, digest
from ptl.storage.training_checkpoints import TrainingCheckpoints


def folder(tmp_path, step):
    path = tmp_path / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step))
    (path / COMPLETE).touch()
    return path


def objects(place):
    if place.root.startswith("file://"):
        from ptl.storage.local_files import path_of

        root = path_of(place.root)
        return [str(path) for path in root.rglob("*") if path.is_file()]
    from ptl.storage.s3 import split

    bucket, key = split(place.root)
    return [item["Key"] for item in place.client.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", [])]


def test_save_restore_and_clear(place, tmp_path):
    checkpoints = TrainingCheckpoints(place.root, "run", "recover-1.0", "key", 0)
    for step in (2, 4, 6):
        checkpoints.save(folder(tmp_path / "here", step))
    assert [record.metadata["folder"] for record in checkpoints.records()] == [f"checkpoint-{i}" for i in (2, 4, 6)]
    assert sum(name.endswith("weights") for name in objects(place)) == 2  # older files are gone

    other = tmp_path / "other"
    (other / "checkpoint-6").mkdir(parents=True)  # half-written, without its mark
    checkpoints.restore(other)
    assert last_complete(other) == other / "checkpoint-6" and (other / "checkpoint-6/weights").read_text() == "6"
    folder(other, 8)
    checkpoints.restore(other)  # what is here is newer
    assert last_complete(other).name == "checkpoint-8"

    # a finished stage's files, for the stage after it on another machine
    assert checkpoints.fetch_result(tmp_path / "out") is None
    checkpoints.save_result(tmp_path / "here/checkpoint-6", "report")
    assert checkpoints.fetch_result(tmp_path / "out") == "report"
    assert (tmp_path / "out/weights").read_text() == "6"

    checkpoints.clear()
    assert checkpoints.records() == [] and objects(place) == []
    checkpoints.restore(tmp_path / "third")
    assert last_complete(tmp_path / "third") is None


@pytest.mark.parametrize(
    "uri", ["{art}/run/prune-1", "{art}/run/../run/prune-1", "file://{home}", "{art}/run//", "{art}"]
)
def test_a_forged_record_deletes_nothing_but_training_checkpoints(tmp_path, uri):
    art = f"file://{tmp_path}/art"
    checkpoints = TrainingCheckpoints(art, "run", "recover-1.0", "key", 0)
    kept = tmp_path / "art/run/prune-1/manifest.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    pointer = Pointer(uri.format(art=art, home=tmp_path), "sha256:" + "0" * 64)
    store.commit(art, "run", "recover-1.0.training-0", Record("key", pointer))
    for step in (2, 4):
        checkpoints.save(folder(tmp_path / "here", step))
    checkpoints.clear()
    assert [path.relative_to(tmp_path / "art").as_posix() for path in (tmp_path / "art").rglob("*.json")] == [
        "run/prune-1/manifest.json"
    ]
    assert last_complete(tmp_path / "here") is not None and checkpoints.records() == []


def test_checkpoints_of_other_settings_are_not_resumed(tmp_path):
    checkpoints = TrainingCheckpoints(f"file://{tmp_path}/art", "run", "recover-1.0", digest(["digest", DATA]), 0)
    checkpoints.save(folder(tmp_path, 2))
    checkpoints.save(folder(tmp_path, 4))
    other = replace(checkpoints, key="other")
    other.restore(tmp_path / "scratch")
    assert last_complete(tmp_path / "scratch") is None and other.records() == []
    # Theirs take the places of the old ones, of which none is taken for theirs.
    other.save(folder(tmp_path, 6))
    assert [record.metadata["folder"] for record in other.records()] == ["checkpoint-6"]
    assert checkpoints.records() == []


def test_the_interval_is_kept(tmp_path, monkeypatch):
    saved, clock = [], [100.0]
    monkeypatch.setattr(TrainingCheckpoints, "save", lambda checkpoints, path: saved.append(path.name))
    monkeypatch.setattr(training_checkpoints.time, "monotonic", lambda: clock[0])
    checkpoints = TrainingCheckpoints("file:///x", "run", "recover-1.0", "key", 10)
    for minute in (0, 4, 11, 12, 25):
        clock[0] = 100.0 + 60 * minute
        checkpoints.save_if_due(tmp_path / f"checkpoint-{minute}")
    assert saved == ["checkpoint-11", "checkpoint-25"]


@pytest.mark.slow
def test_another_machine_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """The first machine dies in the second stage and its disk is lost; the second machine has only the store."""
    small = cut(DENSE, tmp_path / "cut", 130_000)
    stages = ({"method": "cpt", "share": 0.25}, {"method": "cpt"})
    recover(small, tmp_path / "straight", *stages)
    stores = [TrainingCheckpoints(f"file://{tmp_path}/art", "run", f"recover-1.{i}", "key", 0) for i in range(2)]
    original, ran = RECOVERIES["cpt"], []

    def dies(src, dst, settings, job):
        def on_log(metrics, step):
            if job.budget.tokens == 1125 and metrics.get("num_input_tokens_seen", 0) > 700:
                raise KeyboardInterrupt
            job.on_log(metrics, step)

        ran.append(job.budget.tokens)
        return original(src, dst, settings, replace(job, on_log=on_log))

    monkeypatch.setitem(RECOVERIES, "cpt", dies)
    with pytest.raises(KeyboardInterrupt):
        recover(small, tmp_path / "out", *stages, stores=stores)
    shutil.rmtree(tmp_path / "out.training")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setitem(RECOVERIES, "cpt", original)
    report = recover(small, tmp_path / "out", *stages, stores=stores)
    assert ran == [375, 1125] and report.tokens == 1500
    assert report.details["stages"][1]["resumed_at"] >= 2
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "straight/model.safetensors").read_bytes()
    for checkpoints in stores:
        checkpoints.clear()
    left = [path for path in (tmp_path / "art").rglob("*") if path.is_file()]
    assert left == [] and store.committed(stores[1].root, "run", "recover-1.1.training-0") is None


@pytest.mark.slow
def test_several_processes_store_their_checkpoints_and_another_machine_resumes(tmp_path, monkeypatch):
    """The first process stores them; a mock of `launch.run` is the machine that dies."""
    small = cut(DENSE, tmp_path / "cut", 130_000)
    stage = {"method": "cpt", "processes": 2}
    checkpoints = TrainingCheckpoints(f"file://{tmp_path}/art", "run", "recover-1.0", "key", 0)
    original = launch.run

    def dies(*args):
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        recover(small, tmp_path / "out", stage, stores=[checkpoints])
    folders = [record.metadata["folder"] for record in checkpoints.records()]
    assert folders == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    straight = (tmp_path / "out/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out.training")
    monkeypatch.setattr(launch, "run", original)
    report = recover(small, tmp_path / "out", stage, stores=[checkpoints])
    assert report.resumed_at == 5
    assert (tmp_path / "out/model.safetensors").read_bytes() == straight
