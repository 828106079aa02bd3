"""A step that dies is tried again by its parent; the attempts of all pods and runners together are retries + 1."""

import errno
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from ptl.lineage import mlflow_client, run_status, tracking
from ptl.steps import attempts, supervisor
from ptl.steps.call import Call
from ptl.storage import store
from ptl.storage.store import Pointer

HERE = Path(__file__).parents[1]
ROOT = HERE.parent
FIRST = "run-x(0).root(0).prune-1(0).executor(0)"
CLUSTER = ("KFP_RUN_ID", "KFP_POD_UID", "KFP_RETRY_INDEX", "PTL_ARGO_NODE", "PTL_LAUNCH", "PTL_RETRIES", "PTL_TIMEOUT")


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    settings = {
        "PTL_RUN_ID": f"run-{uuid.uuid4().hex[:8]}",
        "PTL_RUN_DIR": str(tmp_path),
        "PTL_SCRATCH": str(tmp_path / "scratch"),
        "PTL_RETRY_WAIT": "0.01",
        "PTL_TEST_FOLDER": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
        # Nobody answers here at once: what a failure reports to MLflow has tests of its own below.
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(supervisor, "PROCESS", "failing_step")


@pytest.fixture(params=["started", "forked"])
def origin(request, environment, monkeypatch):
    """The process of the work is started, or forked from its parent, which then has its libraries."""
    forks = request.param == "forked"
    monkeypatch.setattr(supervisor, "forks", forks)
    monkeypatch.setenv("PTL_TEST_FORKS", "1" if forks else "")


# What the parent reports does not depend on where the work's process comes from.
by_the_parent = pytest.mark.parametrize("origin", ["started"], indirect=True)


@pytest.fixture
def go(tmp_path, monkeypatch, origin):
    """Run a step as its component does; returns its exit code and the metadata of its output."""

    def run(plan, retries=2, step="prune-1", pointer=None, **more):
        monkeypatch.setenv("PTL_TEST_PLAN", plan)
        monkeypatch.setenv("PTL_RETRIES", str(retries))
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        out = SimpleNamespace(path=str(tmp_path / "out"), metadata={})
        inputs = {"fallback": None}
        if pointer is not None:
            (tmp_path / "model").write_text(pointer.dump())
            inputs["model"] = SimpleNamespace(path=str(tmp_path / "model"), metadata={})
        try:
            supervisor.run(step, "ptl-test", inputs, {"out": out})
        except SystemExit as end:
            return end.code, out.metadata
        return 0, out.metadata

    return run


def tried(tmp_path):
    return len(list(tmp_path.glob("attempt-*")))


@pytest.mark.parametrize("plan", ["killed", "segfault", "cuda", "work", "exit"])
def test_after_a_crash_the_step_is_tried_again(plan, go, tmp_path, capfd):
    assert go(f"{plan} ok") == (0, {"digest": "sha256:1"})
    assert tried(tmp_path) == 2 and (tmp_path / "out").read_text() == "done"
    said = capfd.readouterr().out
    assert "ptl: prune-1: failed: " in said and "the next attempt begins in 0.01 s" in said
    reasons = {
        "killed": "killed by SIGKILL (what the kernel does when memory is used up: free memory)",
        "segfault": "killed by SIGSEGV;",
        "cuda": "RuntimeError: CUDA error: an illegal memory access",
        "work": "the store is away",
        "exit": "ended with exit code 9",
    }
    assert reasons[plan] in said


@pytest.mark.parametrize(("plan", "file"), [("no-space", "a file"), ("no-space-for-the-reason", "{0}/ptl-step-")])
def test_a_full_disk_is_named_with_what_to_do(plan, file, go, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert go(f"{plan} ok") == (0, {"digest": "sha256:1"})
    said = capfd.readouterr().out
    assert f"failed: no space left while writing {file.format(tmp_path)}" in said
    assert f"set TMPDIR to a folder on another disk (temporary files are in {tmp_path})" in said


@by_the_parent
def test_no_space_for_the_call_itself_is_named_too(go, monkeypatch, capfd):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(supervisor.Path, "write_text", full)
    monkeypatch.setattr("ptl.steps.reporting.leave_for_runner", lambda step, failure: None)
    assert go("ok")[0] == 1
    assert "error: prune-1: no space left while writing a file" in capfd.readouterr().err


def test_an_input_error_is_never_tried_again_and_ends_the_log_with_one_line(go, tmp_path, capfd):
    assert go("input ok") == (2, {})
    assert tried(tmp_path) == 1
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert "error: prune-1: schedule.target: 7 must be below 1\n" in said.err
    assert json.loads((tmp_path / "error.json").read_text()) == {
        "step": "prune-1",
        "message": "schedule.target: 7 must be below 1",
        "exit_code": 2,
    }


def test_a_library_that_cannot_be_imported_is_not_tried_again(go, tmp_path, capfd):
    assert go("import ok")[0] == 2 and tried(tmp_path) == 1
    said = capfd.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("error: prune-1: packages: ModuleNotFoundError: No")


def test_the_last_attempt_ends_the_step(go, tmp_path, capfd):
    assert go("killed cuda work", retries=2)[0] == 1
    assert tried(tmp_path) == 3
    assert capfd.readouterr().err.splitlines()[-1] == "error: prune-1: the store is away"
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "the store is away"


def test_without_retries_there_is_one_attempt(go, tmp_path):
    assert go("killed ok", retries=0)[0] == 1 and tried(tmp_path) == 1


def test_one_machine_does_not_try_again_unless_told_and_a_cluster_does(monkeypatch):
    monkeypatch.delenv("PTL_RETRY_WAIT")
    assert attempts.policy() == attempts.Policy(retries=0, pause=1.0, timeout=None)
    monkeypatch.delenv("PTL_RUN_ID")
    monkeypatch.setenv("KFP_RUN_ID", "k")
    assert attempts.policy() == attempts.Policy(retries=2, pause=60.0, timeout=None)


def test_pauses_double(go, monkeypatch):
    slept = []
    monkeypatch.setattr(supervisor.time, "sleep", slept.append)
    go("work", retries=3, PTL_RETRY_WAIT="5")
    assert slept == [5, 10, 20]


@pytest.mark.slow
def test_the_timeout_is_of_one_attempt_and_ends_all_of_its_processes(go, tmp_path):
    assert go("hangs-with-child ok", PTL_TIMEOUT="6") == (0, {"digest": "sha256:1"})
    assert tried(tmp_path) == 2
    assert gone(int((tmp_path / "grandchild").read_text()))


def test_what_a_crash_leaves_behind_is_ended_before_the_next_attempt(go, tmp_path):
    """Launchers, workers and loaders: they hold the GPU, and would write into the same folder."""
    assert go("crash-with-child ok") == (0, {"digest": "sha256:1"})
    assert gone(int((tmp_path / "grandchild").read_text()))


def gone(pid):
    """Whether a process has ended (its zombie may still wait for a parent)."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


PARENT = """
import os, sys
from types import SimpleNamespace
from ptl.steps import supervisor

supervisor.PROCESS = "failing_step"
supervisor.forks = bool(os.environ.get("PTL_TEST_FORKS"))
out = SimpleNamespace(path=sys.argv[1] + "/out", metadata={})
try:
    supervisor.run("prune-1", "e", {}, {"out": out})
finally:
    heavy = {"torch", "transformers", "mlflow", "numpy"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""


def parent(tmp_path, plan):
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        env=os.environ | {"PTL_TEST_PLAN": plan, "PTL_RETRIES": "2"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_parent_imports_nothing_heavy(tmp_path):
    output, _ = parent(tmp_path, "ok").communicate(timeout=60)
    assert "heavy: []" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_parent_ends_the_work_and_is_no_reason_to_try_again(number, tmp_path, origin):
    process = parent(tmp_path, "hangs ok")
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert gone(int((tmp_path / "attempt-1").read_text())) and tried(tmp_path) == 1


def test_a_failure_is_reported_with_fewer_retries_than_work_has(monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")  # the user's own
    mlflow_client.connect()  # sets the default of work
    with mlflow_client.briefly():
        assert mlflow_client.connect() and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == mlflow_client.RETRIES


@pytest.fixture
def root(tmp_path):
    return f"file://{tmp_path}/art/ptl"


@pytest.fixture
def pod(monkeypatch, root):
    """Claim an attempt as a pod of the cluster does."""
    run = uuid.uuid4().hex

    def claim(node, uid, retries="2"):
        monkeypatch.delenv("PTL_RUN_ID", raising=False)
        settings = {"KFP_RUN_ID": run, "KFP_POD_UID": uid, "PTL_ARGO_NODE": node, "PTL_RETRIES": retries}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return attempts.claim(root, run, "prune-1")

    return claim


def test_attempts_in_one_pod_and_in_pods_that_argo_starts_are_counted_together(pod):
    assert [pod(FIRST, "a"), pod(FIRST, "a")] == [1, 2]
    evicted = FIRST.replace("executor(0)", "executor(1)")
    assert pod(evicted, "b") == 3
    with pytest.raises(attempts.NoAttemptLeftError, match="all 3 attempts were used"):
        pod(evicted, "b")
    with pytest.raises(attempts.NoAttemptLeftError):
        pod(evicted.replace("(1)", "(2)"), "c")


def test_the_policy_always_repeats_at_every_level_and_gets_no_more_attempts(pod):
    """36 runs of one failing step were seen: executor, its DAG and the root each repeated it."""
    worked = 0
    for root_ in range(3):
        for dag in range(3):
            for executor in range(4):
                node = f"run-x({root_}).root(0).prune-1({dag}).executor({executor})"
                try:
                    pod(node, f"{root_}{dag}{executor}")
                except attempts.NoAttemptLeftError:
                    continue
                worked += 1
    assert worked == 3


def test_a_retry_by_a_person_begins_to_count_anew(pod):
    """Kubeflow's retry deletes the failed pods, and Argo numbers the new ones from 0."""
    for number in (1, 2, 3):
        assert pod(FIRST, "a") == number
    assert pod(FIRST, "after the retry") == 1
    assert pod(FIRST.replace("executor(0)", "executor(1)"), "evicted") == 2


def test_a_backend_without_argos_node_name_counts_by_its_own_index(pod, monkeypatch):
    assert pod("", "a") == 1
    monkeypatch.setenv("KFP_RETRY_INDEX", "1")
    assert pod("", "b") == 2


def test_a_local_runner_that_repeats_the_component_gets_no_more_attempts(monkeypatch, root):
    monkeypatch.setenv("PTL_RETRIES", "1")
    monkeypatch.setenv("PTL_LAUNCH", "one ptl run")
    assert [attempts.claim(root, "r", "prune-1") for _ in range(2)] == [1, 2]
    with pytest.raises(attempts.NoAttemptLeftError):
        attempts.claim(root, "r", "prune-1")
    monkeypatch.setenv("PTL_LAUNCH", "the same command again")
    assert attempts.claim(root, "r", "prune-1") == 1


@pytest.fixture
def mlflow(new_database, tmp_path, monkeypatch):
    uri = f"sqlite:///{new_database(tmp_path)}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/art")
    monkeypatch.setenv("PTL_TEST_STORE", "1")
    client = MlflowClient(uri)

    def tags(step):
        (experiment,) = (each for each in client.search_experiments() if each.name == "ptl-test")
        where = f"tags.`ptl.step` = '{step}'" if step else "tags.`ptl.role` = 'parent'"
        (run,) = client.search_runs([experiment.experiment_id], where)
        return run.info.status, run.data.tags

    return tags


@pytest.mark.slow
@by_the_parent
def test_mlflow_shows_the_attempt_and_forgets_errors_that_were_overcome(go, mlflow, tmp_path, capfd):
    assert go("cuda killed ok")[0] == 0
    status, tags = mlflow("prune-1")
    assert status == "FINISHED" and tags["ptl.attempt"] == "3" and "ptl.error" not in tags and tags["ptl.node"]
    assert mlflow("")[0] == "RUNNING"
    assert "ptl: prune-1: started, attempt 3 of 3" in capfd.readouterr().out


@pytest.mark.slow
@by_the_parent
def test_a_step_that_failed_for_good_says_so_on_the_runs_page_too(go, mlflow):
    assert go("killed", retries=1)[0] == 1
    for name in ("prune-1", ""):
        status, tags = mlflow(name)
        assert status == "FAILED" and "killed by SIGKILL" in tags["ptl.error"]
    assert mlflow("")[1]["mlflow.note.content"].startswith("**Failed** in prune-1: its process was killed by SIGKILL")
    assert go("ok")[0] == 0  # the same command again
    assert mlflow("prune-1")[0] == "FINISHED"
    status, tags = mlflow("")
    assert status == "RUNNING" and "ptl.error" not in tags and "mlflow.note.content" not in tags


@pytest.mark.slow
@by_the_parent
def test_an_exhausted_step_says_why_its_last_attempt_failed(go, mlflow, capfd):
    assert go("work", retries=0, PTL_LAUNCH="one")[0] == 1
    assert go("ok", retries=0, PTL_LAUNCH="one")[0] == 1
    assert "all 1 attempts were used" in (said := capfd.readouterr().err) and "; the last one failed: " in said
    assert "the store is away" in said.splitlines()[-1]


DENSE = Pointer("file:///dense", "sha256:" + "d" * 64, params=9, original_params=9)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["control-prune", "export-gguf-q8-0"])
@by_the_parent
def test_what_a_run_can_do_without_does_not_fail_it_on_a_cluster(step, go, mlflow, tmp_path, monkeypatch, capfd):
    """A failed task would fail the run and keep its report from being written."""
    monkeypatch.delenv("PTL_RUN_ID")
    monkeypatch.setenv("KFP_RUN_ID", "kfp-run")
    code, metadata = go("work", retries=1, step=step, pointer=DENSE)
    assert code == 0 and metadata["uri"] == DENSE.uri
    passed = Pointer.load((tmp_path / "out").read_text())
    assert passed.gate["stopped"] and passed.gate["reason"] == f"{step} failed: the store is away"
    assert mlflow(step)[0] == "FAILED" and mlflow("")[0] == "RUNNING"
    assert "failed: the store is away; the run continues without it" in capfd.readouterr().out


@pytest.mark.slow
@by_the_parent
def test_on_one_machine_a_failed_control_is_resumed_like_any_step(go, mlflow, tmp_path):
    assert go("work", retries=0, step="control-prune", pointer=DENSE)[0] == 1
    assert json.loads((tmp_path / "error.json").read_text())["step"] == "control-prune"
    assert go("ok", step="control-prune", pointer=DENSE)[0] == 0 and mlflow("control-prune")[0] == "FINISHED"


@pytest.mark.slow
@by_the_parent
def test_on_one_machine_too_a_failed_export_does_not_keep_the_report_from_being_written(go, mlflow, tmp_path):
    assert go("input", retries=0, step="export-gguf-q8-0", pointer=DENSE)[0] == 0
    assert Pointer.load((tmp_path / "out").read_text()).digest == DENSE.digest
    # The command does not end with this step: what may fail later has its own reason.
    assert not (tmp_path / "error.json").exists()
    status, tags = mlflow("export-gguf-q8-0")
    assert status == "FAILED" and tags["ptl.error"] == "schedule.target: 7 must be below 1"
    assert go("ok", step="export-gguf-q8-0", pointer=DENSE)[0] == 0 and mlflow("export-gguf-q8-0")[0] == "FINISHED"


def started(step):
    return Call(step, "ptl-test").start()


def finished(run):
    tracking.finish(run, params={}, metrics={}, inputs=[], output=None, step=0)


def test_the_parents_status_follows_all_steps_not_the_last_writer(mlflow):
    loop, control = started("prune-1"), started("control-prune")
    tracking.fail(loop, "the store is away")
    assert mlflow("")[0] == "FAILED"
    finished(control)  # it was still at work when the loop failed
    assert mlflow("control-prune")[0] == "FINISHED" and mlflow("")[0] == "FAILED"
    started("control-recover")
    assert mlflow("")[0] == "FAILED"
    started("prune-1")  # a retry
    assert mlflow("")[0] == "RUNNING" and "ptl.error" not in mlflow("")[1]


def test_steps_that_settle_at_the_same_time_end_with_the_truth(mlflow, monkeypatch):
    """Another step fails between this one's search and its write."""
    control, loop = started("control-prune"), started("prune-1")
    search, late = run_status._status, iter([lambda: tracking.fail(loop, "late")])

    def status(client, run):
        seen = search(client, run)
        for act in late:  # once
            act()
        return seen

    monkeypatch.setattr(run_status, "_status", status)
    finished(control)
    assert mlflow("")[0] == "FAILED" and mlflow("")[1]["ptl.error"] == "prune-1: late"


@pytest.mark.slow
@by_the_parent
def test_a_control_works_beside_a_loop_that_has_failed(go, mlflow):
    """After a retry of the run its steps start in any order, and the loop's failure is still there to see."""
    assert go("work", retries=0)[0] == 1
    assert go("ok", step="control-prune", pointer=DENSE, PTL_LAUNCH="the retry")[0] == 0
    assert mlflow("")[0] == "FAILED"
    assert go("ok", PTL_LAUNCH="the retry")[0] == 0 and mlflow("")[0] == "RUNNING"


@by_the_parent
def test_a_failure_that_was_half_written_is_a_death(go, tmp_path, monkeypatch, capfd):
    real = supervisor.subprocess.Popen.wait

    def cut(process, timeout=None):
        code = real(process, timeout)
        for path in Path(process.args[3]).parent.glob("failure.json"):
            path.write_text(path.read_text()[:9])
        return code

    monkeypatch.setattr(supervisor.subprocess.Popen, "wait", cut)
    assert go("work ok")[0] == 0 and "ended with exit code 1" in capfd.readouterr().out


@pytest.mark.slow
@by_the_parent
def test_a_webhook_hears_nothing_of_pods_that_found_no_attempt_left(go, mlflow, webhook, monkeypatch):
    monkeypatch.setenv("PTL_WEBHOOK_URL", webhook[0])
    for _ in range(3):  # as with the policy Always
        assert go("work", retries=0, PTL_LAUNCH="one")[0] == 1
    assert len(webhook[1]) == 1
    assert mlflow("prune-1")[1]["ptl.error"] == "the store is away", "not an error around an error for each pod"


@by_the_parent
def test_mlflow_away_does_not_hide_why_a_step_failed(go, tmp_path, capfd):
    assert go("input")[0] == 2
    said = capfd.readouterr()
    assert "warning: the failure could not be reported to MLflow" in said.out
    assert json.loads((tmp_path / "error.json").read_text())["message"].startswith("schedule.target")


@pytest.fixture
def webhook(monkeypatch):
    """A real HTTP server that keeps what is posted."""
    posted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path.startswith("/broken") else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    server.server_close()


@by_the_parent
def test_a_webhook_hears_once_when_a_step_failed_for_good(go, webhook, monkeypatch):
    url, posted = webhook
    monkeypatch.setenv("PTL_WEBHOOK_URL", f"{url}/token")
    monkeypatch.setenv("PTL_KFP_UI", "https://kubeflow.example.com/pipeline/")
    assert go("killed work", retries=1)[0] == 1
    run = os.environ["PTL_RUN_ID"]
    assert posted == [
        {
            "text": f"ptl: run {run} failed in prune-1: the store is away",
            "run": run,
            "step": "prune-1",
            "reason": "the store is away",
            "kubeflow": f"https://kubeflow.example.com/pipeline/#/runs/details/{run}",
        }
    ]


@by_the_parent
def test_a_broken_webhook_is_a_line_that_keeps_its_address(go, webhook, monkeypatch, capfd):
    monkeypatch.setenv("PTL_WEBHOOK_URL", f"{webhook[0]}/broken/secret-token")
    assert go("work", retries=0)[0] == 1
    said = "".join(capfd.readouterr())
    assert "could not be reported to the webhook: 500" in said and "secret-token" not in said


def test_claims_are_no_checkpoints_to_the_inventory(root, monkeypatch):
    monkeypatch.setenv("PTL_LAUNCH", "l")
    attempts.claim(root, "r", "prune-1")
    names = [path for path, _, _ in store.walk(f"{root}/r")]
    assert names == ["prune-1.attempt-1.claim"]
