"""A step that dies is tried again by its parent; the attempts of all pods and runners together are retries + 1."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from types import SimpleNamespace

import pytest
from checkout import ROOT
from mlflow import MlflowClient
from test_processes import gone

from ptl import processes
from ptl.lineage import tracking
from ptl.steps import attempts, supervisor
from ptl.storage.store import Pointer

FIRST = "run-x(0).root(0).prune-1(0).executor(0)"
DENSE = Pointer("file:///dense", "sha256:" + "d" * 64, params=9, original_params=9)
ON_A_CLUSTER = {"PTL_RUN_ID": "", "KFP_RUN_ID": f"kfp-{uuid.uuid4().hex[:8]}"}


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """The process of the work is forked from its parent, which then has its libraries; to start one takes longer."""
    settings = {
        "PTL_RUN_ID": f"run-{uuid.uuid4().hex[:8]}",
        "PTL_RUN_DIR": str(tmp_path),
        "PTL_RETRY_WAIT": "0.01",
    }
    settings |= {"PTL_SCRATCH": str(tmp_path / "scratch"), "PTL_TEST_FOLDER": str(tmp_path)}
    settings["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    # Nobody answers here at once: what a failure reports to MLflow has tests of its own below.
    settings |= {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(supervisor, "PROCESS", "failing_step")
    monkeypatch.setattr(supervisor, "forks", True)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run a step as its component does; returns its exit code and the metadata of its output."""

    def run(plan, retries=2, step="prune-1", pointer=None, **more):
        for name, value in {"PTL_TEST_PLAN": plan, "PTL_RETRIES": str(retries), **more}.items():
            monkeypatch.setenv(name, value)
        out = SimpleNamespace(path=str(tmp_path / "out"), metadata={})
        given = {"step": step, "experiment": "attempts", "out": out, "fallback": None}
        if pointer is not None:
            (tmp_path / "model").write_text(pointer.dump())
            given["model"] = SimpleNamespace(path=str(tmp_path / "model"), metadata={})
        try:
            supervisor.run(given | {"run": supervisor.run}, ["out"])
        except SystemExit as end:
            return end.code, out.metadata
        return 0, out.metadata

    return run


def tried(tmp_path):
    return len(list(tmp_path.glob("attempt-*")))


def error_file(tmp_path):
    return json.loads((tmp_path / "error.json").read_text())


def test_on_a_cluster_a_kill_names_the_memory_of_its_kind_of_step(monkeypatch):
    """It comes before resources.memory; a retry has the memory of the compiled pipeline."""
    monkeypatch.setattr(processes, "on_a_cluster", lambda: True)
    words = supervisor._unexplained(-signal.SIGKILL, "control-recover")
    assert (
        "raise resources.steps.recover.memory, or lower the batch size, and submit again" in words
    )


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("killed", "killed by SIGKILL (what the kernel does when memory is used up: free memory)"),
        ("cuda", "RuntimeError: CUDA error: an illegal memory access"),
        ("exit", "ended with exit code 9"),
        ("no-space", "no space left while writing a file"),
        ("out-of-memory", "Tried to allocate 20 GiB; lower calibration.batch_size"),
    ],
)
def test_after_a_crash_the_step_is_tried_again(plan, reason, go, tmp_path, capfd):
    assert go(f"{plan} ok") == (0, {"digest": "sha256:1"})
    assert tried(tmp_path) == 2 and (tmp_path / "out").read_text() == "done"
    said = capfd.readouterr().out
    assert (
        "ptl: prune-1: failed: " in said
        and "the next attempt begins in 0.01 s" in said
        and reason in said
    )


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        ("input", "schedule.target: 7 must be below 1"),
        ("import", "packages: ModuleNotFoundError: No"),
    ],
)
def test_a_wrong_input_is_never_tried_again_and_is_the_last_line_of_the_log(
    plan, error, go, tmp_path, capfd
):
    assert go(f"{plan} ok") == (2, {}) and tried(tmp_path) == 1
    said = capfd.readouterr()
    assert said.err.splitlines()[-1].startswith(f"error: prune-1: {error}")
    assert ("Traceback" in said.err) == (plan == "import")
    # MLflow, which does not answer here, does not hide why the step failed.
    assert "warning: the failure could not be reported to MLflow" in said.out
    left = error_file(tmp_path)
    assert (left["step"], left["exit_code"]) == ("prune-1", 2) and left["message"].startswith(error)


@pytest.mark.parametrize(
    ("plan", "retries", "pauses"), [("killed cuda exit work", 3, [5, 10, 20]), ("work ok", 0, [])]
)
def test_pauses_double_until_the_last_attempt_ends_the_step(
    plan, retries, pauses, go, tmp_path, monkeypatch, capfd
):
    slept = []
    monkeypatch.setattr(supervisor.time, "sleep", slept.append)
    assert go(plan, retries, PTL_RETRY_WAIT="5")[0] == 1
    assert tried(tmp_path) == retries + 1 and slept == pauses
    assert capfd.readouterr().err.splitlines()[-1] == "error: prune-1: the store is away"


def test_one_machine_does_not_try_again_unless_told_and_a_cluster_does(monkeypatch):
    monkeypatch.delenv("PTL_RETRY_WAIT")
    assert attempts.policy() == attempts.Policy(retries=0, pause=1.0, timeout=None)
    monkeypatch.delenv("PTL_RUN_ID")
    monkeypatch.setenv("KFP_RUN_ID", "k")
    assert attempts.policy() == attempts.Policy(retries=2, pause=60.0, timeout=None)


@pytest.mark.parametrize("plan", ["hangs-with-child ok", "crash-with-child ok"])
def test_a_timeout_and_a_crash_end_all_processes_of_the_attempt(plan, go, tmp_path, monkeypatch):
    """Launchers, workers and loaders: they hold the GPU, and would write into the same folder."""
    monkeypatch.setattr(supervisor, "GRACE", 100)  # SIGTERM is enough
    began = time.monotonic()
    assert go(plan, PTL_TIMEOUT="3") == (0, {"digest": "sha256:1"})
    assert tried(tmp_path) == 2 and time.monotonic() - began < 90
    assert gone(int((tmp_path / "grandchild").read_text()))


PARENT = """
import sys
from types import SimpleNamespace
from ptl.steps import supervisor

supervisor.PROCESS = "failing_step"
supervisor.forks = sys.argv[2] == "forked"
heavy = {"torch", "transformers", "mlflow", "numpy"} & set(sys.modules)
assert not heavy, heavy
out = SimpleNamespace(path=sys.argv[1] + "/out", metadata={})
supervisor.run({"step": "prune-1", "experiment": "e", "out": out}, ["out"])
"""


@pytest.mark.parametrize(
    ("number", "origin"),
    [(signal.SIGTERM, "started"), (signal.SIGINT, "forked"), (signal.SIGKILL, "started")],
)
def test_a_signal_to_the_parent_ends_the_work_and_is_no_reason_to_try_again(
    number, origin, tmp_path
):
    """The parent imports nothing heavy, so that it survives what its work does not."""
    environment = os.environ | {"PTL_TEST_PLAN": "hangs ok", "PTL_RETRIES": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), origin], env=environment
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == (-9 if number == signal.SIGKILL else 128 + number)
    assert gone(int((tmp_path / "attempt-1").read_text())) and tried(tmp_path) == 1


@pytest.fixture
def pod(monkeypatch, tmp_path):
    """Claim an attempt as a pod of the cluster does."""
    monkeypatch.delenv("PTL_RUN_ID")
    monkeypatch.setenv("PTL_RETRIES", "2")
    monkeypatch.setenv("KFP_RUN_ID", "r")

    def claim(node, uid):
        monkeypatch.setenv("KFP_POD_UID", uid)
        monkeypatch.setenv("PTL_ARGO_NODE", node)
        return attempts.claim(f"file://{tmp_path}/ptl", "r", "prune-1")

    return claim


def test_attempts_in_one_pod_and_in_pods_that_argo_starts_are_counted_together(pod):
    assert [pod(FIRST, "a"), pod(FIRST, "a")] == [1, 2]
    evicted = FIRST.replace("executor(0)", "executor(1)")
    assert pod(evicted, "b") == 3
    # With the policy Always the executor, its DAG and the root each repeat it.
    repeated = [
        FIRST.replace(f"{level}(0)", f"{level}(2)") for level in ("executor", "prune-1", "run-x")
    ]
    for number, node in enumerate([evicted, *repeated]):
        with pytest.raises(attempts.NoAttemptLeftError, match="all 3 attempts were used"):
            pod(node, f"c{number}")


def test_a_retry_by_a_person_begins_to_count_anew(pod):
    """Kubeflow's retry deletes the failed pods, and Argo numbers the new ones from 0."""
    assert [pod(FIRST, "a") for _ in range(3)] == [1, 2, 3]
    assert pod(FIRST, "after the retry") == 1
    assert pod(FIRST.replace("executor(0)", "executor(10)"), "evicted") == 2


@pytest.fixture
def mlflow(mlflow_folder, monkeypatch):
    """Status and tags of the MLflow run of a step; without its name of the pipeline run."""
    uri = f"sqlite:///{mlflow_folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{mlflow_folder}/attempts")
    monkeypatch.setenv("PTL_TEST_STORE", "1")
    client = MlflowClient(uri)

    def tags(step=""):
        experiment = client.get_experiment_by_name("attempts").experiment_id
        runs = client.search_runs([experiment], f"tags.`ptl.run` = '{tracking.pipeline_run()}'")
        (run,) = [run for run in runs if run.data.tags.get("ptl.step", "") == step]
        return run.info.status, run.data.tags

    return tags


def test_a_step_that_failed_for_good_says_so_on_its_pages_until_that_was_overcome(
    go, mlflow, capfd
):
    plan = "cuda killed cuda ok"
    assert go(plan, retries=1)[0] == 1
    for name in ("prune-1", ""):
        status, tags = mlflow(name)
        assert status == "FAILED" and "killed by SIGKILL" in tags["ptl.error"]
    assert mlflow()[1]["mlflow.note.content"].startswith(
        "**Failed** in prune-1: its process was killed by SIGKILL"
    )
    assert go(plan, retries=3)[0] == 0
    assert "ptl: prune-1: started, attempt 4 of 4" in capfd.readouterr().out
    status, tags = mlflow("prune-1")
    assert status == "FINISHED" and tags["ptl.attempt"] == "4" and "ptl.error" not in tags
    status, tags = mlflow()
    assert status == "RUNNING" and "ptl.error" not in tags and "mlflow.note.content" not in tags


def test_a_failed_control_does_not_fail_its_run_on_a_cluster(go, mlflow, tmp_path):
    """A failed task would fail the run and keep its report from being written."""
    code, metadata = go("work", retries=1, step="control-prune", pointer=DENSE, **ON_A_CLUSTER)
    assert code == 0 and metadata["uri"] == DENSE.uri
    passed = Pointer.load((tmp_path / "out").read_text())
    assert (
        passed.gate["stopped"]
        and passed.gate["reason"] == "control-prune failed: the store is away"
    )
    assert mlflow("control-prune")[0] == "FAILED" and mlflow()[0] == "RUNNING"


def test_on_one_machine_a_failed_control_is_resumed_like_any_step_and_an_export_is_not(
    go, mlflow, tmp_path
):
    # The command does not end with an export: the report is written, and what may fail later has its own reason.
    assert go("input", retries=0, step="export-gguf-q8-0", pointer=DENSE)[0] == 0
    assert Pointer.load((tmp_path / "out").read_text()).digest == DENSE.digest
    assert not (tmp_path / "error.json").exists()
    status, tags = mlflow("export-gguf-q8-0")
    assert status == "FAILED" and tags["ptl.error"] == "schedule.target: 7 must be below 1"
    assert go("input work ok", retries=0, step="control-prune", pointer=DENSE)[0] == 1
    assert error_file(tmp_path)["step"] == "control-prune"
    assert (
        go("ok", step="control-prune", pointer=DENSE)[0] == 0
        and mlflow("control-prune")[0] == "FINISHED"
    )


def test_a_webhook_hears_once_when_a_step_failed_for_good(go, mlflow, monkeypatch, serve):
    posted, run, reason = [], os.environ["PTL_RUN_ID"], "the store is away"
    webhook = serve(lambda _request, _path, body: posted.append(json.loads(body)) or (200, {}))
    monkeypatch.setenv("PTL_KFP_UI", "https://kubeflow.example.com/pipeline/")
    for _ in range(2):  # as with the policy Always
        assert (
            go("killed work", retries=1, PTL_LAUNCH="one", PTL_WEBHOOK_URL=f"{webhook}/token")[0]
            == 1
        )
    page = f"https://kubeflow.example.com/pipeline/#/runs/details/{run}"
    text = f"ptl: run {run} failed in prune-1: {reason}"
    assert posted == [
        {"text": text, "run": run, "step": "prune-1", "reason": reason, "kubeflow": page}
    ]
