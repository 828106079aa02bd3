"""The steps' own records, read from a real MLflow database on sqlite."""

import os
import socket
from datetime import UTC, datetime
from types import SimpleNamespace
from unittest import mock

import pytest
from mlflow import MlflowClient

from ptl.errors import InputError, WorkError
from ptl.lineage import run_status

TRAINING = {
    "status": "RUNNING",
    "tags": {"attempt": 2, "tokens": 60_000, "error": "RuntimeError: CUDA error"},
    "metrics": {"train/num_input_tokens_seen": 12_288, "train/loss": 1.25},
}
SCORED = {
    "tags": {"attempt": 1, "verdict": "rejected", "loop_ended": "three rejections"},
    "metrics": {"seconds": 33.5, "accuracy": 0.875},
    "ended": 1_800_000_000,
}


def test_what_each_step_says_of_itself_in_one_search(tracked, monkeypatch):
    parent = tracked("run-p", {"evaluate-1": SCORED, "recover-2": TRAINING})
    tracked("run-q", {"evaluate-1": {"status": "FAILED"}})
    read = run_status.read("run-p")
    assert (read.parent_id, read.parent_status, list(read.steps)) == (
        parent,
        "RUNNING",
        ["evaluate-1", "recover-2"],
    )
    scored, training = read.steps.values()
    assert (scored.status, scored.ended) == ("FINISHED", datetime.fromtimestamp(1_800_000_000, UTC))
    assert (scored.attempt, scored.seconds, scored.accuracy) == ("1", "34", "0.875")
    assert (scored.verdict, scored.loop_ended) == ("rejected", "three rejections")
    assert (training.status, training.attempt, training.ended) == ("RUNNING", "2", None)
    assert training.training == "12,288 of 60,000 tokens, loss 1.250"
    assert training.error == "RuntimeError: CUDA error"
    assert run_status.read("run-x") is None and run_status.read("run-p", []) is None
    asked = mock.Mock(side_effect=MlflowClient().search_runs)
    monkeypatch.setattr(MlflowClient, "search_runs", asked)
    for name in ("search_experiments", "get_run"):
        monkeypatch.setattr(MlflowClient, name, None)
    assert run_status.read("run-p", [read.experiment_id]) == read and asked.call_count == 1


def test_nodes_that_start_again_come_before_the_numbers_of_the_training(tracked):
    words = "nodes started again (restart 1): 1 of 3 run"
    for nodes, expected in ((words, words), ("", "12,288 of 60,000 tokens, loss 1.250")):
        tracked(
            f"run-{nodes}",
            {"recover-2": {**TRAINING, "tags": {**TRAINING["tags"], "nodes": nodes}}},
        )
        assert run_status.read(f"run-{nodes}").steps["recover-2"].training == expected


def test_a_step_that_was_taken_over_names_the_run_and_no_time_of_its_own(tracked):
    tracked(
        "run-p", {"prune-1": {"tags": {"taken_over_from": "run-o"}, "metrics": {"seconds": 16.2}}}
    )
    step = run_status.read("run-p").steps["prune-1"]
    assert (step.taken_over_from, step.seconds) == ("run-o", "")


def test_unfinished_runs_of_a_config_are_found_by_its_name(tracked):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    for run, name, status in [
        ("old", "tiny-20261125-184122-9d1f", "FAILED"),
        ("done", "tiny-20261125-184123-9d1f", "FINISHED"),
        ("other", "tiny-large-20261125-184124-9d1f", "FAILED"),
        ("by-hand", "tiny-again", "FAILED"),
        ("new", "tiny-20261125-184125-0000", "RUNNING"),
    ]:
        parent = tracked(run, {"import-model": {}}, status)
        client.update_run(parent, name=name)
    assert run_status.unfinished("tiny") == ["new", "old"]
    assert run_status.unfinished("tiny-large") == ["other"]


def test_closing_ends_what_is_running_and_nothing_else_until_a_retry(tracked):
    parent = tracked(
        "run-p", {"evaluate-1": SCORED, "recover-2": TRAINING, "prune-3": {"status": "RUNNING"}}
    )
    assert run_status.close(
        run_status.read("run-p"), "KILLED", "recover-2: killed", {"recover-2": "killed"}
    )
    closed = run_status.read("run-p")
    ends = {"evaluate-1": ("FINISHED", ""), "recover-2": ("KILLED", "killed")}
    ends["prune-3"] = ("KILLED", "recover-2: killed")
    assert {name: (step.status, step.error) for name, step in closed.steps.items()} == ends
    assert closed.parent_status == "KILLED"
    assert not run_status.close(closed, "FAILED", "again", {})
    assert MlflowClient().get_run(parent).data.tags["ptl.error"] == "recover-2: killed"
    run_status.reopen(closed)
    run = MlflowClient().get_run(parent)
    assert run.info.status == "RUNNING" and "ptl.error" not in run.data.tags
    assert run_status.read("run-p").steps["prune-3"].status == "KILLED"  # it reopens its own
    run_status.close(run_status.read("run-p"), "FINISHED", "", {})
    run = MlflowClient().get_run(parent)
    assert run.info.status == "FINISHED" and "ptl.error" not in run.data.tags


def test_without_an_address_or_a_server_that_answers_it_says_so_soon(monkeypatch):
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI is not set"):
        run_status.read("run-p")
    impatient = dict.fromkeys(run_status.WATCHING, "1") | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    monkeypatch.setattr(run_status, "WATCHING", impatient)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port, error in ((9, "connection refused"), (silent.getsockname()[1], "timed out")):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
            sentence = (
                rf"^MLflow at http://127\.0\.0\.1:{port} does not answer: {error}; is the server up"
            )
            with pytest.raises(WorkError, match=sentence) as caught:
                run_status.read("run-p", ["1"])
            assert "secret" not in str(caught.value)


def run(step, status, arm="loop"):
    tags = {"ptl.step": step, "ptl.arm": arm, "ptl.error": "away"}
    return SimpleNamespace(data=SimpleNamespace(tags=tags), info=SimpleNamespace(status=status))


def test_a_step_has_its_finished_run_and_a_run_the_state_of_its_report_or_a_failed_step(
    monkeypatch,
):
    runs = [run("prune-1", status) for status in ("FAILED", "FINISHED", "RUNNING")]
    assert run_status.by_step(runs) == {"prune-1": runs[1]}
    assert run_status.by_step(runs[::2]) == {"prune-1": runs[2]}

    # A failed control does not fail it.
    def status(**steps):
        runs = {
            step: run(step, status, "control" if step == "control" else "loop")
            for step, status in steps.items()
        }
        monkeypatch.setattr(run_status, "steps_of", lambda *_: runs)
        return run_status._status(None, SimpleNamespace(experiment_id="1", run="r"))

    assert (
        status(recover="FINISHED", report="RUNNING")
        == status(recover="FINISHED")
        == ("RUNNING", "")
    )
    assert status(recover="FINISHED", report="FINISHED") == ("FINISHED", "")
    assert status(control="FAILED", report="FINISHED") == ("FINISHED", "")
    # the loop was repeated and ended before it
    assert status(recover="FAILED", report="FINISHED") == ("FINISHED", "")
    assert status(control="FAILED", recover="FAILED") == ("FAILED", "recover: away")
