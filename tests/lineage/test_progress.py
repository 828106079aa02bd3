"""The steps' own records, read from a real MLflow database on sqlite."""

import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

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


@pytest.fixture(autouse=True)
def patience_of_a_watcher(monkeypatch):
    """Steps that ran in this process before have left MLflow's own patience, minutes, in its environment."""
    for name in run_status.WATCHING:
        monkeypatch.delenv(name, raising=False)


def test_what_each_step_says_of_itself(tracked):
    parent = tracked("run-p", {"evaluate-1": SCORED, "recover-2": TRAINING})
    tracked("run-q", {"evaluate-1": {"status": "FAILED"}})
    read = run_status.read("run-p")
    assert (read.parent_id, read.parent_status, list(read.steps)) == (parent, "RUNNING", ["evaluate-1", "recover-2"])
    scored, training = read.steps.values()
    assert scored == run_status.StepProgress(
        step="evaluate-1",
        run_id=scored.run_id,
        status="FINISHED",
        ended=datetime.fromtimestamp(1_800_000_000, UTC),
        attempt="1",
        seconds="34",
        accuracy="0.875",
        verdict="rejected",
        loop_ended="three rejections",
    )
    assert (training.status, training.attempt, training.ended) == ("RUNNING", "2", None)
    assert training.training == "12,288 of 60,000 tokens, loss 1.250"
    assert training.error == "RuntimeError: CUDA error"


def test_a_look_is_one_search(tracked, monkeypatch):
    tracked("run-p", {"evaluate-1": SCORED})
    found = run_status.read("run-p").experiment_id
    asked = []
    for name in ("search_runs", "search_experiments", "get_run"):
        plain = getattr(MlflowClient, name)

        def counted(*args, name=name, plain=plain, **kwargs):
            asked.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, counted)
    assert run_status.read("run-p", [found]).steps.keys() == {"evaluate-1"}
    assert asked == ["search_runs"]


def test_a_run_that_mlflow_does_not_know_is_none(tracked):
    tracked("run-p", {})
    assert run_status.read("run-x") is None and run_status.read("run-p", []) is None


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
    experiment = client.get_experiment(client.get_run(parent).info.experiment_id).name
    assert run_status.unfinished(experiment, "tiny") == ["new", "old"]
    assert run_status.unfinished(experiment, "tiny-large") == ["other"]
    assert run_status.unfinished("there is none", "tiny") == []


def test_closing_ends_what_is_running_and_nothing_else(tracked):
    tracked("run-p", {"evaluate-1": SCORED, "recover-2": TRAINING, "prune-3": {"status": "RUNNING"}})
    assert run_status.close(run_status.read("run-p"), "FAILED", "recover-2: killed", {"recover-2": "killed"})
    closed = run_status.read("run-p")
    assert closed.parent_status == "FAILED"
    assert {name: (step.status, step.error) for name, step in closed.steps.items()} == {
        "evaluate-1": ("FINISHED", ""),
        "recover-2": ("FAILED", "killed"),
        "prune-3": ("FAILED", "recover-2: killed"),
    }
    client = MlflowClient()
    assert client.get_run(closed.parent_id).data.tags["ptl.error"] == "recover-2: killed"
    assert not run_status.close(closed, "FAILED", "again", {})
    assert client.get_run(closed.parent_id).data.tags["ptl.error"] == "recover-2: killed"


def test_a_retry_reopens_the_parent_without_its_error(tracked):
    parent = tracked("run-p", {"prune-1": {"status": "RUNNING"}})
    run_status.close(run_status.read("run-p"), "KILLED", "canceled", {})
    assert MlflowClient().get_run(parent).info.status == "KILLED"
    run_status.reopen(run_status.read("run-p"))
    run = MlflowClient().get_run(parent)
    assert run.info.status == "RUNNING" and "ptl.error" not in run.data.tags
    assert run_status.read("run-p").steps["prune-1"].status == "KILLED"


def test_without_an_address_or_a_server_it_says_so(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI is not set"):
        run_status.read("run-p")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(WorkError, match=r"MLflow at http://127\.0\.0\.1:9"):
        run_status.read("run-p")


def test_a_server_that_hangs_is_given_up_soon(monkeypatch):
    hanging = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            hanging.wait(30)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        run_status, "WATCHING", {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    )
    try:
        with pytest.raises(WorkError, match=r"imed out|Max retries"):
            run_status.read("run-p", ["1"])
    finally:
        hanging.set()
        server.shutdown()


def test_a_watchers_settings_end_with_it_and_give_way_to_the_users(tracked, monkeypatch):
    tracked("run-p", {})
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    during = {}
    monkeypatch.setattr(run_status.mlflow_client, "connect", lambda: during.update(os.environ) or MlflowClient())
    run_status.read("run-p")
    assert [during[name] for name in run_status.WATCHING] == ["1", "77"]
    assert [os.environ.get(name) for name in run_status.WATCHING] == [None, "77"]


def test_it_imports_neither_torch_nor_kfp():
    code = "import sys, ptl.lineage.run_status; sys.exit(bool({'torch', 'kfp', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0
