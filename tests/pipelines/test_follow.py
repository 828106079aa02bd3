"""Following runs: answers of a real Kubeflow 2.17, played by a mock, and real MLflow runs in a database."""

import base64
import gzip
import json
import re
import signal
from datetime import UTC, datetime

import mock_kubernetes
import pytest
import run_records
from mlflow import MlflowClient
from mock_kfp import ADDED, MockKubeflow, recorded
from mock_kubernetes import EVENTS, PODS, WORKFLOWS

from pipelines.prune_tune_loop import follow, kfp_api, run_view
from pipelines.prune_tune_loop.kfp_api import Server
from pipelines.prune_tune_loop.pods import NODE
from ptl.config import dag
from ptl.config.run import load_config
from ptl.errors import InputError, WorkError
from ptl.report.build import build

SIX = ("import-model", "evaluate-0", "prune-1", "recover-1", "evaluate-1", "report")
EIGHTEEN = [
    "import-model",
    "evaluate-0",
    *(f"{stage}-{i}" for i in (1, 2, 3, 4) for stage in ("prune", "recover", "evaluate")),
    *(f"control-{stage}" for stage in ("prune", "recover", "evaluate")),
    "report",
]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(kfp_api, "PAUSE", 0.01)
    for name in ("MLFLOW_TRACKING_URI", "KFP_NAMESPACE", "KFP_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", "none")


@pytest.fixture
def status(world, said):
    def ask(run="run"):
        said.clear()
        return follow.status(run, Server(host=world.url), say=said.append)

    return ask


@pytest.fixture
def watch(world, said):
    def wait(run="run", **options):
        api = kfp_api.connect(Server(host=world.url))
        return follow.watch(api, run, False, options.pop("timeout", None), 0.01, said.append, **options)

    return wait


def rows(said):
    """The cells of the table by step."""
    table = next(text for text in said if "Step" in text and "State" in text)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines}


def states(said):
    return {step: cells[0] for step, cells in rows(said).items()}


def six(*values):
    return dict(zip(SIX, values, strict=True))


REST = ("not started",) * 4
DONE, FAILED, BEGUN = {}, {"status": "FAILED", "tags": {"error": "InputError: x"}}, {"status": "RUNNING"}


@pytest.mark.parametrize(
    ("name", "records", "code", "expected", "last"),
    [
        ("run-pending", (), 0, six(*("waiting",) * 6), "RUNNING"),
        ("run-running", (BEGUN,), 0, six("RUNNING", *("waiting",) * 5), "RUNNING"),
        ("run-canceling", (BEGUN,), 0, six("RUNNING", *("waiting",) * 5), "is being canceled"),
        ("run-canceled", (DONE, BEGUN), 1, six("SUCCEEDED", "CANCELED", *REST), "canceled"),
        ("run-failed-step", (FAILED,), 1, six("FAILED", "not started", *REST), "FAILED"),
        ("run-failed-driver", (DONE,), 1, six("SUCCEEDED", "not started", *REST), "FAILED"),
        ("run-retried", (DONE,) * 6, 0, six(*("SUCCEEDED",) * 6), "SUCCEEDED"),
        ("run-succeeded-6-tasks", (DONE,) * 6, 0, six(*("SUCCEEDED",) * 6), "SUCCEEDED"),
    ],
)
def test_recorded_runs_by_the_names_of_their_steps(world, said, status, tracked, name, records, code, expected, last):
    tracked(world.play(name), dict(zip(SIX, records, strict=False)))
    assert status() == code
    assert states(said) == expected and list(states(said)) == list(SIX)
    assert f": {last}  {world.url}/#/runs/details/" in said[-1]
    assert len(world.calls("GET", "/versions/")) == 1


@pytest.mark.parametrize(
    ("name", "state", "code"), [("run-failed-step", "unknown", 1), ("run-succeeded-6-tasks", "SUCCEEDED", 0)]
)
def test_without_mlflow_only_the_state_of_the_run_is_known(world, said, status, name, state, code):
    world.play(name)
    assert status() == code
    assert set(states(said).values()) == {state} and said[0].startswith("the steps' own records are not read: ")


def test_a_run_of_which_kubeflow_lists_12_of_18_steps_is_shown_by_its_records(world, said, status, tracked):
    """Recorded: Kubeflow's list stopped at 1 MiB; the records go on."""
    run = world.play("run-succeeded-18-tasks", version="version-of-run-succeeded-18-tasks")
    world.played[0] |= {"state": "RUNNING", "finished_at": "1970-01-01T00:00:00Z"}
    del world.played[0]["state_history"][2:]
    training = {"train/num_input_tokens_seen": 51_200, "train/loss": 0.4567}
    tracked(
        run,
        {
            "evaluate-4": {"tags": {"verdict": "accepted"}, "metrics": {"seconds": 21.4, "accuracy": 0.998}},
            "control-recover": {"status": "RUNNING", "tags": {"tokens": 500_000, "attempt": 2}, "metrics": training},
            "recover-4": {"metrics": {"seconds": 60}},
        },
    )
    assert status() == 0
    table = rows(said)
    assert list(table) == EIGHTEEN
    assert table["evaluate-4"] == ["SUCCEEDED", "", "21", "0.998", "accepted", ""]
    assert table["control-recover"] == ["RUNNING", "2", "", "", "", "51,200 of 500,000 tokens, loss 0.457"]
    assert table["recover-4"][0] == "SUCCEEDED" and table["control-evaluate"][0] == "waiting"
    assert not any("records are not read" in text for text in said)


def test_records_that_cannot_be_read_are_said_once(world, said, watch, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    world.play("run-running", "run-running", "run-succeeded-6-tasks")
    assert watch() == 0
    assert len([text for text in said if "the steps' own records are not read" in text]) == 1
    assert said[-1].endswith(": SUCCEEDED")


@pytest.mark.parametrize(("name", "state"), [("run-failed-driver", "unknown"), ("run-pending", "waiting")])
def test_a_run_that_mlflow_does_not_know_is_shown_without_its_steps(world, said, status, tracked, name, state):
    tracked("another run", {"import-model": {}})
    world.play(name)
    assert status() == (name == "run-failed-driver")
    assert any(text.startswith("MLflow has no records of this run") for text in said)
    assert set(states(said).values()) == {state}


@pytest.mark.parametrize(("name", "rest"), [("run-canceling", "waiting"), ("run-succeeded-18-tasks", "SUCCEEDED")])
def test_steps_after_the_end_of_the_loop_are_not_needed(world, said, status, tracked, name, rest):
    run = world.play(name, version="version-of-run-succeeded-18-tasks")
    tracked(run, {"evaluate-2": {"tags": {"verdict": "rejected", "loop_ended": "no smaller cut"}}})
    assert status() == 0
    assert [step for step, state in states(said).items() if state == "not needed"] == EIGHTEEN[8:14]
    assert states(said)["evaluate-2"] == "SUCCEEDED" and states(said)["control-prune"] == rest


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(False, "see"), (True, "its driver failed: no container of the step was started; see")],
)
def test_a_failure_without_a_record_says_where_to_look(world, said, status, cluster, driver, reason):
    run = world.play("run-failed-step", version=None)  # as after the version was deleted
    (pod,) = recorded("pods-oom")["items"]
    pod["metadata"]["labels"]["pipeline/runid"] = run
    pod["metadata"]["annotations"][NODE] = f"w(0).root(0).prune-1{'-driver(0)' if driver else '(0).executor(0)'}"
    for container in pod["status"]["containerStatuses"]:
        container["state"] = {"terminated": {"exitCode": 1, "reason": "Error"}}
    cluster.of_run[PODS] = [pod]
    assert status() == 1
    where = f"`kubectl logs -c main --prefix --tail=20 -n kubeflow -l pipeline/runid={run}`"
    assert f"prune-1: {reason} {where} and {world.url}/#/runs/details/{run}" in said


@pytest.mark.parametrize("are_read", [True, False])
def test_a_wait_without_a_running_step_says_once_where_to_look(world, said, watch, cluster, monkeypatch, are_read):
    """As for a service account without the right; the run is older than a minute."""
    if not are_read:
        monkeypatch.setenv("KUBECONFIG", "none")
    run = world.play("run-pending", "run-pending", "run-pending")
    assert watch(timeout=0.03) == 4
    where = (
        f"`kubectl describe workflows,pods -n kubeflow -l pipeline/runid={run}` and {world.url}/#/runs/details/{run}"
    )
    idle = [text for text in said if text.startswith("no step is seen running")]
    assert idle == [f"no step is seen running: see {where}"]


def test_a_failure_with_a_record_gives_its_reason(world, said, status, tracked):
    run = world.play("run-failed-step")
    tracked(run, {"import-model": {"status": "FAILED", "tags": {"error": "InputError: model.path: no folder x"}}})
    assert status() == 1
    assert "import-model: InputError: model.path: no folder x" in said


def test_a_record_that_is_running_after_the_end_means_killed_and_is_closed(world, said, status, tracked):
    run = world.play("run-retried")
    world.played[0] |= {"state": "FAILED"}
    parent = tracked(run, {"prune-1": {}, "recover-1": {"status": "RUNNING"}})
    assert status() == 1
    reason = next(text for text in said if text.startswith("recover-1: "))
    assert "killed from outside, most likely out of memory" in reason
    for remedy in ("resources.memory", "resources.steps.recover.memory", "recover.accumulation", "kubectl describe"):
        assert remedy in reason
    client = MlflowClient()
    closed = client.get_run(parent)
    assert closed.info.status == "FAILED" and closed.data.tags["ptl.error"] == reason
    step = client.search_runs(
        [closed.info.experiment_id], f"tags.`ptl.run` = '{run}' and tags.`ptl.step` = 'recover-1'"
    )
    assert step[0].info.status == "FAILED" and step[0].data.tags["ptl.error"] == reason.removeprefix("recover-1: ")
    assert status() == 1 and reason in said  # what was closed says the same


def test_a_step_that_another_took_with_it_is_not_called_out_of_memory(world, said, status, tracked):
    run = world.play("run-failed-driver")
    failed = {"status": "FAILED", "tags": {"error": "WorkError: the loss is nan"}}
    tracked(run, {"evaluate-0": failed, "prune-1": {"status": "RUNNING"}})
    assert status() == 1
    assert "evaluate-0: WorkError: the loss is nan" in said
    assert "prune-1: it was stopped when the run failed" in said


def test_a_loop_that_failed_while_the_control_works_says_how_to_end_the_run(world, said, status, tracked):
    """The run's own state stays RUNNING until what can still run has ended."""
    run = world.play("run-running")
    failed = {"status": "FAILED", "tags": {"error": "the loss is nan"}}
    world.played[0] |= {"state": "RUNNING", "state_history": []}
    tracked(run, {"import-model": failed, "evaluate-0": {"status": "RUNNING"}})
    assert status() == 0
    hint = next(text for text in said if "has failed, and the run ends when" in text)
    assert hint.startswith("import-model has failed, and the run ends when evaluate-0 has ended; `ptl cancel ")


def test_a_failure_without_a_record_closes_the_parent(world, status, tracked):
    parent = tracked(world.play("run-failed-driver"), {"import-model": {}})
    assert status() == 1
    run = MlflowClient().get_run(parent)
    assert run.info.status == "FAILED" and run.data.tags["ptl.error"].startswith("see `kubectl describe")


def test_a_canceled_run_is_killed_in_mlflow_and_says_so(world, said, status, tracked):
    parent = tracked(world.play("run-canceled"), {"import-model": {}, "evaluate-0": {"status": "RUNNING"}})
    assert status() == 1 and states(said)["evaluate-0"] == "CANCELED"
    run = MlflowClient().get_run(parent)
    assert run.info.status == "KILLED" and run.data.tags["ptl.error"] == "canceled"
    assert status() == 1 and states(said)["evaluate-0"] == "CANCELED"


def test_a_run_that_is_going_or_done_is_not_closed(world, status, tracked):
    parent = tracked(world.play("run-running"), {"import-model": {"status": "RUNNING"}})
    assert status() == 0 and MlflowClient().get_run(parent).info.status == "RUNNING"
    parent = tracked(world.play("run-succeeded-6-tasks"), {}, status="FINISHED")
    assert status() == 0
    run = MlflowClient().get_run(parent)
    assert run.info.status == "FINISHED" and "ptl.error" not in run.data.tags


def test_a_mlflow_that_refuses_to_close_is_one_line(world, said, status, tracked, monkeypatch):
    tracked(world.play("run-canceled"), {})

    def refuse(*_):
        raise InputError("read only")

    monkeypatch.setattr(follow.run_status, "close", refuse)
    assert status() == 1 and "MLflow: the run could not be closed: read only" in said


def test_a_wait_has_one_line_for_each_change(world, said, watch, tracked, monkeypatch):
    run = recorded("run-running")["run_id"]
    tracked(run, {"import-model": {"status": "RUNNING", "tags": {"attempt": 1}}})
    world.play("run-pending", "run-running", "run-running", "run-running")
    looks, client = [], MlflowClient()
    experiment = client.get_experiment_by_name("tracked").experiment_id

    def log(**metrics):
        child = client.search_runs([experiment], f"tags.`ptl.run` = '{run}' and tags.`ptl.step` = 'import-model'")[0]
        for name, value in metrics.items():
            client.log_metric(child.info.run_id, name.replace("train_", "train/"), value)
        return child.info.run_id

    def sleep(_):
        looks.append(None)
        if len(looks) == 1:
            log(train_num_input_tokens_seen=100, train_loss=2)
        if len(looks) == 2:  # within a minute: not shown
            log(train_num_input_tokens_seen=200, train_loss=1)
        if len(looks) == 3:
            client.set_terminated(log(seconds=12, accuracy=0.5), "FINISHED")
            client.set_tag(log(), "ptl.verdict", "accepted")
            world.play("run-succeeded-6-tasks")
            world.played[0]["run_id"] = run

    monkeypatch.setattr(follow.time, "sleep", sleep)
    assert watch() == 0
    assert said[:3] == [
        "import-model: RUNNING",
        "import-model: 100 tokens, loss 2.000",
        "import-model: SUCCEEDED in 12 s, accuracy 0.500, accepted",
    ]
    assert len([text for text in said if text.startswith("import-model")]) == 3
    assert "evaluate-1: SUCCEEDED" in said and said[-1].endswith(": SUCCEEDED")


def test_a_failed_wait_ends_with_the_reason(world, said, watch, tracked):
    run = world.play("run-pending", "run-running", "run-failed-step")
    for played in world.played:
        played["run_id"] = run
    tracked(run, {"import-model": {"status": "FAILED", "tags": {"error": "InputError: x", "attempt": 3}}})
    assert watch() == 1
    assert "import-model: FAILED (attempt 3): InputError: x" in said
    assert said[-1].endswith(f": FAILED: import-model: InputError: x; `ptl retry {run}` resumes from what is finished")


def test_cancel_waits_for_the_end_and_closes_mlflow(world, said, tracked):
    world.play("run-running", "run-canceling", "run-canceling", "run-canceled")
    run = recorded("run-canceled")["run_id"]
    for played in world.played:
        played["run_id"] = run
    world.answers = [("POST", ":terminate", "post-terminate")]
    parent = tracked(run, {"import-model": {"status": "RUNNING"}})
    assert follow.cancel(run, Server(host=world.url), say=said.append, poll=0.01) == 0
    assert said[-1].endswith(": canceled")
    assert MlflowClient().get_run(parent).info.status == "KILLED"


def test_cancel_of_a_run_that_has_ended_meanwhile(world, said):
    world.play("run-running", "run-succeeded-6-tasks")
    world.answers = [("POST", ":terminate", "post-terminate-finished")]
    assert follow.cancel("run", Server(host=world.url), say=said.append) == 0
    assert "has ended before (SUCCEEDED)" in said[-1]
    world.play("run-running")
    world.answers = [("POST", ":terminate", "post-terminate-unknown")]
    with pytest.raises(InputError, match=r"404 .*; check the id.*\(Run 0{8}-[0-]* not found\)"):
        follow.cancel("run", Server(host=world.url), say=said.append)


def test_cancel_of_a_failed_run_closes_it(world, said, tracked):
    parent = tracked(world.play("run-failed-driver"), {})
    assert follow.cancel("run", Server(host=world.url), say=said.append) == 0
    assert world.calls("POST", ":terminate") == []
    assert MlflowClient().get_run(parent).info.status == "FAILED"


@pytest.mark.parametrize("name", ["run-failed-step", "run-canceled"])
@pytest.mark.slow
def test_retry_of_a_failed_and_of_a_canceled_run_reopens_it(world, said, tracked, name):
    run = world.play(name, name, "run-retried")
    for played in world.played:
        played["run_id"] = run
    parent = tracked(run, {"import-model": {"status": "RUNNING"}})
    assert follow.retry(run, Server(host=world.url), say=said.append) == 0
    assert len(world.calls("POST", ":retry")) == 1 and "runs again" in said[-1]
    reopened = MlflowClient().get_run(parent)
    assert reopened.info.status == "RUNNING" and "ptl.error" not in reopened.data.tags


def test_retry_waits_for_the_new_end(world, said):
    world.play("run-failed-step", "run-failed-step", "run-retried")
    assert follow.retry("run", Server(host=world.url), wait=True, poll=0.01, say=said.append) == 0
    assert any(": runs again" in text for text in said) and said[-1].endswith("SUCCEEDED")


@pytest.mark.parametrize("command", [follow.cancel, follow.retry])
def test_an_empty_answer_without_an_effect_is_no_success(world, said, monkeypatch, command):
    """The server's own answer is `{}`, and so may be that of a proxy that has passed nothing on."""
    monkeypatch.setattr(follow, "SETTLING", 0.05)
    run = world.play("run-running" if command is follow.cancel else "run-failed-step")
    world.answers = [("POST", run, "empty object")]
    with pytest.raises(WorkError, match="as before; the session may have expired: log in again"):
        command(run, Server(host=world.url), say=said.append, poll=0.01)
    assert world.answers == [] and not any("asked to end" in text or "runs again" in text for text in said)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (command, fault)
        for command in (follow.status, follow.cancel, follow.retry)
        for fault in sorted(ADDED)
        if command is follow.status or fault != "empty object"
    ],
)
def test_nonsense_for_good_is_no_success_of_any_command(world, said, monkeypatch, command, fault):
    monkeypatch.setattr(kfp_api, "READ_TIMEOUT", 0.02)
    monkeypatch.setattr(follow, "SETTLING", 0.05)
    run = world.play("run-running" if command is follow.cancel else "run-failed-step")
    asked = ("GET", "/runs/") if command is follow.status else ("POST", run)
    world.answers = [(*asked, fault)] * (kfp_api.REPEATS + 1)
    options = {} if command is follow.status else {"poll": 0.01}
    with pytest.raises(WorkError, match=r"Kubeflow Pipelines at|as before; the session may have expired"):
        command(run, Server(host=world.url), say=said.append, **options)
    assert not any("asked to end" in text or "runs again" in text for text in said)


@pytest.mark.parametrize("command", [follow.status, follow.cancel, follow.retry])
def test_no_request_follows_a_redirect(world, command, monkeypatch):
    """A token would go with it, or a login page would come back."""
    monkeypatch.setenv("KFP_TOKEN", "secret")
    other = MockKubeflow()
    world.redirect = f"http://user:secret@{other.url.removeprefix('http://')}"
    try:
        with pytest.raises(InputError, match=r"302 it points to http://\*\*\*@127.*log in again") as error:
            command("run-0", Server(host=world.url))
        assert len(world.requests) == 1 and other.requests == [] and "secret" not in str(error.value)
    finally:
        other.close()


def test_a_retry_that_is_refused_says_which_runs_can_be_retried(world, said, tracked):
    world.play("run-running")
    with pytest.raises(InputError, match="is RUNNING; only a run that failed or was canceled"):
        follow.retry("run", Server(host=world.url))
    parent = tracked(world.play("run-failed-step"), {})
    world.answers = [("POST", ":retry", "post-retry-succeeded")]
    with pytest.raises(InputError, match=r"409 .*Workflow must be Failed/Error to retry"):
        follow.retry("run", Server(host=world.url), say=said.append)
    assert MlflowClient().get_run(parent).info.status == "FAILED"


def test_after_a_retry_an_old_failure_is_not_the_steps_state(world, said, status, tracked):
    """Recorded: failed 17:48:32, retried 17:49:03. The step's record is from before, its pod has not begun again."""
    run = world.play("run-retried")
    world.played[0] |= {"state": "RUNNING"}
    del world.played[0]["state_history"][4:]
    before = datetime.fromisoformat("2026-11-25T17:48:30+00:00").timestamp()
    tracked(run, {"prune-1": {"status": "FAILED", "tags": {"error": "old"}, "ended": before}})
    assert status() == 0
    assert states(said)["prune-1"] == "waiting" and not any("old" in text for text in said)


def test_an_unknown_run(world, status):
    with pytest.raises(InputError, match=r"404 .*; check the id.*\(Run 0{8}-[0-]* not found\)"):
        status("00000000-0000-0000-0000-000000000000")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The Kubernetes API that a kubeconfig names, five minutes after the recorded pods could not start."""
    monkeypatch.setattr(run_view, "_now", lambda: datetime(2026, 11, 28, 7, 53, tzinfo=UTC))
    with mock_kubernetes.serving(tmp_path) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made


def started(world, pods=""):
    """A run that waits for its pods, with the recorded ones; returns its id."""
    world.play("run-image-missing", version="version-of-run-image-missing")
    if pods:
        world.played[0]["run_id"] = recorded(pods)["items"][0]["metadata"]["labels"]["pipeline/runid"]
    return world.played[0]["run_id"]


NEVER_PULLED = 'Container image "ptl-prune:9.9" is not present with pull policy of Never'
NOT_FOUND = "rpc error: code = NotFound desc = failed to pull and unpack image: not found"


def waiting(reason, message):
    """The recorded pod, whose container waits for another reason."""
    (pod,) = recorded("pods-image-missing")["items"]
    container = next(entry for entry in pod["status"]["containerStatuses"] if entry["name"] == "main")
    container["state"]["waiting"] = {"reason": reason, "message": message}
    return [pod]


@pytest.mark.parametrize(
    ("reason", "message", "line"),
    [
        ("ErrImageNeverPull", NEVER_PULLED, f"ErrImageNeverPull: {NEVER_PULLED}; check images.registry, images.tag"),
        ("ErrImagePull", NOT_FOUND, f"ImagePullBackOff: {NOT_FOUND}; check images.registry"),
        (
            "ImagePullBackOff",
            f'Back-off pulling image "x": ErrImagePull: {NOT_FOUND}',
            f"ImagePullBackOff: {NOT_FOUND}; check images.registry",
        ),
        ("CreateContainerConfigError", 'secret "s" not found', 'ConfigError: secret "s" not found; check that the im'),
        ("ContainerCreating", "", "UTC: FailedMount: no such claim; check storage.cache_claim"),
    ],
)
def test_a_container_that_cannot_start_says_why(world, said, status, cluster, reason, message, line):
    started(world)
    cluster.of_run[PODS] = waiting(reason, message)
    mount = {"reason": "FailedMount", "message": "no such claim", "lastTimestamp": "2026-11-28T07:51:00Z"}
    cluster.of_run[EVENTS] = recorded("events-pending")["items"]
    if not message:
        cluster.of_run[EVENTS].append(cluster.of_run[EVENTS][0] | mount)
    assert status() == 0 and states(said)["import-model"] == "PENDING"
    (text,) = [text for text in said if text.startswith("import-model: ")]
    assert text.startswith("import-model: pending since 07:48 UTC: ") and line in text


def test_a_pod_that_no_node_takes_says_what_nodes_it_asks_for(world, said, status, cluster, tracked):
    tracked(started(world, "pods-unschedulable"), {"import-model": {}})
    cluster.of_run[PODS] = recorded("pods-unschedulable")["items"]
    assert status() == 0
    assert [states(said)[step] for step in ("evaluate-0", "prune-1", "recover-1")] == ["PENDING", "PENDING", "waiting"]
    (text,) = [text for text in said if text.startswith("prune-1: ")]
    assert "Unschedulable: 0/1 nodes are available: 1 node(s) didn't match Pod's node affinity" in text
    assert "node_selector and tolerations" in text and "resources.steps.prune" in text


def test_a_pod_that_was_killed_is_followed_by_another(world, said, status, cluster, tracked):
    """Kubeflow waits for up to two minutes before that."""
    (pod,) = recorded("pods-oom")["items"]
    run = started(world)
    pod["metadata"]["labels"]["pipeline/runid"] = run
    pod["metadata"]["annotations"][NODE] = "w(0).root(0).prune-1(0).executor(0)"
    cluster.of_run[PODS] = [pod]
    tracked(run, {"import-model": {}, "evaluate-0": {"status": "RUNNING"}, "prune-1": {"status": "RUNNING"}})
    assert status() == 0
    assert states(said)["prune-1"] == "PENDING" and not any("ptl cancel" in text for text in said)
    (text,) = [text for text in said if text.startswith("prune-1: ")]
    assert "another attempt follows" in text and "OOMKilled" in text and "resources.memory" in text


QUOTA = 'pods "noimg-1" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: 0, limited: 4'


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_pod_that_a_quota_refuses_is_explained_by_the_workflow(world, said, status, cluster, is_packed):
    """Made up after Argo's source: it keeps such a node pending, with the answer to its request as the message."""
    run = started(world)
    node = {"name": "noimg-rhr5h(0).root(0).import-model(0).executor(0)", "phase": "Pending", "message": QUOTA}
    nodes = {"noimg-rhr5h-1": node | {"startedAt": "2026-11-28T07:48:16Z"}}
    packed = {"compressedNodes": base64.b64encode(gzip.compress(json.dumps(nodes).encode())).decode()}
    metadata = {"labels": {"pipeline/runid": run}}
    cluster.of_run[WORKFLOWS] = [{"metadata": metadata, "status": packed if is_packed else {"nodes": nodes}}]
    assert status() == 0
    (text,) = [text for text in said if text.startswith("import-model: ")]
    assert QUOTA in text and text.endswith("or have the namespace's quota raised")


def test_where_pods_cannot_be_read_they_are_left_out(world, said, status, cluster, monkeypatch):
    started(world)
    for kubeconfig in (str(cluster.kubeconfig), "none"):  # one of another cluster, which has no such pods; and none
        monkeypatch.setenv("KUBECONFIG", kubeconfig)
        assert status() == 0
        assert set(states(said).values()) == {"unknown"}


def test_within_the_first_minute_a_pod_is_just_pending(world, said, status, cluster, monkeypatch):
    monkeypatch.setattr(run_view, "_now", lambda: datetime(2026, 11, 28, 7, 48, 50, tzinfo=UTC))
    started(world)
    cluster.of_run[PODS] = recorded("pods-image-missing")["items"]
    assert status() == 0 and states(said)["import-model"] == "PENDING"
    assert not any(text.startswith("import-model: ") for text in said)


def test_a_wait_gives_the_reason_once(world, said, watch, cluster, monkeypatch):
    """A pull that failed is ErrImagePull and ImagePullBackOff by turns."""
    started(world)
    reasons = ["ErrImagePull", "ImagePullBackOff"] * 3
    cluster.of_run[PODS] = waiting("ContainerCreating", "")

    def sleep(_):
        if reasons:
            cluster.of_run[PODS] = waiting(reasons.pop(), NOT_FOUND)
        else:
            world.play("run-succeeded-6-tasks")

    monkeypatch.setattr(follow.time, "sleep", sleep)
    assert watch() == 0
    lines = [text for text in said if text.startswith("import-model: ") and "SUCCEEDED" not in text]
    assert len(lines) == 2 and all(line.startswith("import-model: PENDING: pending since 07:48") for line in lines)
    assert "ContainerCreating" in lines[0] and NOT_FOUND in lines[1]


def test_an_oom_killed_pod_is_named(world, said, status, cluster, tracked):
    run = world.play("run-oom", version="version-of-run-image-missing")
    cluster.of_run[PODS] = recorded("pods-oom")["items"]
    done = {step: {} for step in ("import-model", "evaluate-0", "prune-1")}
    tracked(run, {**done, "recover-1": {"status": "RUNNING"}})
    assert status() == 1
    memory = "raise resources.memory or resources.steps.recover.memory or raise recover.accumulation"
    assert any(text.startswith(f"recover-1: OOMKilled: {memory}") for text in said)
    assert states(said)["evaluate-1"] == "not started"


@pytest.mark.slow
def test_a_run_of_50_steps_is_complete_by_its_records(world, said, status, tracked):
    """Recorded: Kubeflow's list stopped at evaluate-4 and prune-5."""
    tiny = "pipelines/prune_tune_loop/configs/tiny.yaml"
    names = [node.name for node in dag.nodes(load_config(tiny, {"schedule.iterations": 16, "control": False}))]
    run = world.play("run-succeeded-50-tasks")
    world.version = {
        "pipeline_spec": {"root": {"dag": {"tasks": {name: {"taskInfo": {"name": name}} for name in names}}}}
    }
    world.version |= {"pipeline_id": "p", "pipeline_version_id": "v"}
    tracked(run, {name: {"metrics": {"seconds": 1}} for name in names}, status="FINISHED")
    assert status() == 0 and len(names) == 51
    assert set(states(said).values()) == {"SUCCEEDED"}


def logged_result(tracked, tmp_path, run, result):
    parent = tracked(run, {}, status="FINISHED")
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    MlflowClient().log_artifact(parent, str(path), "report")


def test_a_wait_ends_with_the_result(world, said, watch, tracked, tmp_path, monkeypatch):
    run = world.play("run-succeeded-6-tasks")
    logged_result(
        tracked,
        tmp_path,
        run,
        build(run_records.records(), run_records.settings(), **run_records.RUN).model_dump(mode="json"),
    )
    monkeypatch.setattr(follow.address, "is_server", lambda uri: uri.startswith(("sqlite:", "http:")))
    assert watch() == 0
    text = " ".join(said[-2].split())
    assert "4 (final)" in text and "127,872" in text and "control 127,872" in text  # the table
    assert "one-shot pruning reached 90.0 %" in text
    assert f"Report: `ptl fetch {run} DIR --report` writes it" in text
    assert re.search(r"MLflow: sqlite:///\S+/#/experiments/\d+/runs/[0-9a-f]{32}", text)
    name = world.played[0]["display_name"]
    assert said[-1].startswith(f"{name}: SUCCEEDED, gate passed: iteration 4 accepted, ")


def test_a_result_of_another_version_changes_no_exit_code(world, said, watch, tracked, tmp_path):
    logged_result(tracked, tmp_path, world.play("run-succeeded-6-tasks"), {"rows": []})
    assert watch() == 0 and said[-2].startswith("its result cannot be read: ") and said[-1].endswith(": SUCCEEDED")


@pytest.mark.parametrize("command", [follow.status, follow.cancel, follow.retry])
def test_a_run_is_named_by_its_name_too(world, said, command):
    world.runs = [
        {"run_id": f"id-{number}", "display_name": name, "state": "FAILED", "state_history": [], "looks": 0}
        for number, name in enumerate(["tiny-1", "twice", "twice"])
    ]
    world.play("run-failed-step", "run-retried") if command is follow.retry else world.play("run-failed-step")
    command("tiny-1", Server(host=world.url), say=said.append)
    assert world.calls("GET", "/runs/id-0") and not world.calls("GET", "/runs/tiny-1")
    with pytest.raises(InputError, match="2 runs have the name twice; give an id: id-1 and id-2"):
        command("twice", Server(host=world.url))


@pytest.mark.parametrize("is_in_history", [True, False])
def test_a_wait_after_a_retry_does_not_begin_with_the_old_attempt(world, said, tracked, is_in_history):
    """Kubeflow's list is that of the old attempt for some seconds, and so is the step's record."""
    run = world.play("run-failed-step", "run-failed-step", "run-failed-step", "run-retried")
    failed, *retried, last = world.played
    failed["run_id"] = last["run_id"] = run
    for look in retried:
        look |= {"state": "RUNNING", "run_id": run}
        if is_in_history:
            look["state_history"].append({"state": "RUNNING", "update_time": "2030-01-01T00:00:00Z"})
    before = datetime.fromisoformat(failed["finished_at"]).timestamp()
    tracked(run, {"import-model": {"status": "FAILED", "tags": {"error": "old"}, "ended": before}})
    assert follow.retry(run, Server(host=world.url), wait=True, poll=0.01, say=said.append) == 0
    assert "runs again" in said[1] and "import-model: SUCCEEDED" in said
    assert not any(text.startswith("import-model: FAILED") for text in said)


def test_ctrl_c_ends_the_wait_and_says_that_the_run_continues(watch, monkeypatch, capsys):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(follow, "get_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        watch()
    assert ended.value.code == 130
    assert "interrupted by SIGINT: the run continues; `ptl status run` shows it" in capsys.readouterr().err
