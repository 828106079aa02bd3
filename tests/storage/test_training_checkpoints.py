"""Training checkpoints in the store: another machine resumes from them, and nothing of them stays after success."""

import errno
import os
import shutil
from dataclasses import replace
from unittest import mock

import pytest

from ptl.errors import InputError, WorkError
from ptl.storage import local_files, store, training_checkpoints
from ptl.storage.local_files import COMPLETE, last_complete
from ptl.storage.store import Pointer, Record
from ptl.storage.training_checkpoints import TrainingCheckpoints


def stored_at(root, key="key", minutes=0, stage=0):
    return TrainingCheckpoints(root, "run", f"recover-1.{stage}", key, minutes)


def folder(tmp_path, step):
    path = tmp_path / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_text(str(step))
    (path / COMPLETE).touch()
    return path


def steps(checkpoints):
    return [
        int(record.metadata["folder"].removeprefix("checkpoint-"))
        for record in checkpoints.records()
    ]


def test_save_restore_and_clear(place, tmp_path):
    checkpoints = stored_at(place.root)
    for step in (8, 9, 10):
        checkpoints.save(folder(tmp_path / "here", step))
    assert steps(checkpoints) == [8, 9, 10]
    weights = [path for path, *_ in store.walk(place.root) if path.endswith("weights")]
    # files of older ones are gone
    assert len(weights) == 2 and not any("training-0" in path for path in weights)

    other = tmp_path / "other"
    (other / "checkpoint-10").mkdir(parents=True)  # half-written, without its mark
    folder(other, 9)
    checkpoints.restore(other)
    assert (
        last_complete(other) == other / "checkpoint-10"
        and (other / "checkpoint-10/weights").read_text() == "10"
    )
    (other / "checkpoint-10/weights").write_text("mine")
    checkpoints.restore(other)  # what is here is as new
    assert (other / "checkpoint-10/weights").read_text() == "mine"
    assert {path.name for path in other.iterdir()} == {"checkpoint-9", "checkpoint-10"}

    # a finished stage's files, for the stage after it on another machine
    assert checkpoints.fetch_result(tmp_path / "out") is None
    checkpoints.save_result(tmp_path / "here/checkpoint-9", "report")
    assert checkpoints.fetch_result(tmp_path / "out") == "report"
    assert (tmp_path / "out/weights").read_text() == "9"

    other_stage = stored_at(place.root, stage=1)
    other_stage.save(folder(tmp_path / "next", 2))
    checkpoints.clear()
    assert checkpoints.records() == [] and steps(other_stage) == [2]
    other_stage.clear()
    assert list(store.walk(place.root)) == []
    checkpoints.restore(tmp_path / "third")
    assert last_complete(tmp_path / "third") is None


@pytest.mark.parametrize("killed", ["publish", "commit", "delete"])
def test_a_save_that_is_killed_loses_no_earlier_checkpoint(killed, tmp_path, monkeypatch):
    """Files, then their record, then the older files: each is killed before it begins."""
    checkpoints = stored_at(f"file://{tmp_path}/art")
    for step in (2, 4):
        checkpoints.save(folder(tmp_path / "here", step))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, killed, mock.Mock(side_effect=KeyboardInterrupt))
        checkpoints.save(folder(tmp_path / "here", 6))
    newest = 6 if killed == "delete" else 4
    checkpoints.restore(tmp_path / "other")
    assert last_complete(tmp_path / "other").name == f"checkpoint-{newest}"
    checkpoints.save(folder(tmp_path / "here", 8))
    assert steps(checkpoints)[-2:] == [newest, 8]


def test_a_forged_record_deletes_nothing_but_training_checkpoints(tmp_path):
    art = f"file://{tmp_path}/art"
    kept = tmp_path / "art/run/prune-1/manifest.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    for uri in (
        f"{art}/run/prune-1",
        f"{art}/run/../run/prune-1",
        f"file://{tmp_path}",
        f"{art}/run//",
        art,
    ):
        store.commit(
            art, "run", "recover-1.0.training-0", Record("key", Pointer(uri, "sha256:" + "0" * 64))
        )
        checkpoints = stored_at(art)
        for step in (2, 4):
            checkpoints.save(folder(tmp_path / "here", step))
        checkpoints.clear()
        assert [path for path in (tmp_path / "art").rglob("*") if path.is_file()] == [kept], uri
        assert last_complete(tmp_path / "here") is not None and checkpoints.records() == []


def test_a_damaged_checkpoint_is_passed_over_and_two_are_an_error(tmp_path, capsys):
    checkpoints = stored_at(f"file://{tmp_path}/art")
    for step in (2, 4, 6):
        checkpoints.save(folder(tmp_path / "here", step))
    *_, older, newest = checkpoints.records()
    for record, name in ((newest, "first"), (older, "second")):
        shutil.rmtree(record.pointer.uri.removeprefix("file://"))
        if record is newest:
            checkpoints.restore(tmp_path / name)
            assert last_complete(tmp_path / name).name == "checkpoint-4"
            assert "warning: an older training checkpoint is taken: " in capsys.readouterr().out
    with pytest.raises(WorkError, match="gone"):
        checkpoints.restore(tmp_path / "second")


def test_a_full_disk_is_named_also_where_a_folder_is_copied(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(shutil, "copy2", mock.Mock(side_effect=full))
    with pytest.raises(WorkError, match=rf"no space left while writing {tmp_path}/out/weights"):
        local_files.copy_tree(folder(tmp_path, 2), tmp_path / "out", COMPLETE)


def test_a_store_that_deletes_nothing_ends_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        store, "delete", mock.Mock(side_effect=InputError("access denied", field="store"))
    )
    checkpoints = stored_at(f"file://{tmp_path}/art")
    for step in (2, 4, 6):
        checkpoints.save(folder(tmp_path / "here", step))
    assert steps(checkpoints) == [2, 4, 6]
    checkpoints.clear()
    assert (
        "training checkpoints that nobody needs stay in the store: store: access denied"
        in capsys.readouterr().out
    )


def test_checkpoints_of_other_settings_are_not_resumed(tmp_path):
    checkpoints = stored_at(f"file://{tmp_path}/art")
    for step in (2, 4):
        checkpoints.save(folder(tmp_path, step))
    checkpoints.save_result(tmp_path / "checkpoint-4", "report")
    other = replace(checkpoints, key="other")
    other.restore(tmp_path / "scratch")
    assert last_complete(tmp_path / "scratch") is other.fetch_result(tmp_path / "out") is None
    # Theirs take the places of the old ones, of which none is taken for theirs.
    other.save(folder(tmp_path, 6))
    assert steps(other) == [6] and checkpoints.records() == []


def test_a_checkpoint_is_marked_once_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    made = folder(tmp_path, 2)
    mark = made / COMPLETE
    mark.unlink()
    synced = []
    monkeypatch.setattr(
        local_files, "_sync", lambda path: synced.append((path.name, mark.exists()))
    )
    local_files.mark_complete(made)
    assert synced == [("weights", False), (made.name, False), (made.name, True)]


def test_a_store_that_is_away_does_not_end_the_training(monkeypatch, capfd):
    monkeypatch.setattr(store, "committed", mock.Mock(side_effect=WorkError("no answer")))
    stored_at("s3://away/art").save_if_due("checkpoint-2")
    assert "warning: no training checkpoint was stored: no answer" in capfd.readouterr().out


def test_the_interval_is_kept(monkeypatch):
    saved, clock = [], [0.0]
    monkeypatch.setattr(TrainingCheckpoints, "save", lambda _, path: saved.append(path))
    monkeypatch.setattr(training_checkpoints.time, "monotonic", lambda: clock[0])
    checkpoints = stored_at("file:///x", minutes=10)
    for second in (100, 400, 699, 700, 701, 1299, 1300):
        clock[0] = second
        checkpoints.save_if_due(second)
    assert saved == [700, 1300]
    always = stored_at("file:///x", minutes=0)
    always.save_if_due(2)
    assert saved[2:] == [2]


def test_another_machine_resumes_to_the_same_bytes(small, tmp_path, monkeypatch):
    """The first machine dies in the second stage and its disk is lost; the second machine has only the store."""
    from recovering import recover

    from ptl.recovery.recover import RECOVERIES

    stages = ({"method": "cpt", "share": 0.25}, {"method": "cpt"})
    recover(small, tmp_path / "straight", *stages)
    stores = [stored_at(f"file://{tmp_path}/art", stage=i) for i in range(2)]
    original, ran = RECOVERIES["cpt"], []

    def dies(src, dst, settings, job):
        def on_log(metrics, step):
            if job.budget.tokens == 1125 and metrics.get("num_input_tokens_seen", 0) > 700:
                raise KeyboardInterrupt
            job.on_log(metrics, step)

        ran.append(job.budget.tokens)
        return original(src, dst, settings, replace(job, on_log=on_log))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(RECOVERIES, "cpt", dies)
        recover(small, tmp_path / "out", *stages, stores=stores)
    shutil.rmtree(tmp_path / "out.training")
    shutil.rmtree(tmp_path / "out")
    report = recover(small, tmp_path / "out", *stages, stores=stores)
    assert ran == [375, 1125] and report.tokens == 1500
    assert report.details["stages"][1]["resumed_at"] >= 2
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "straight/model.safetensors"
    ).read_bytes()
