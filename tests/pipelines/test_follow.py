"""Following runs: answers of a real Kubeflow 2.17, played by a mock, and real MLflow runs in a database."""

import base64
import copy
import gzip
import json
import signal
from datetime import UTC, datetime
from unittest import mock

import mock_kubernetes
import pytest
from mlflow import MlflowClient
from mock_kfp import recorded
from mock_kubernetes import EVENTS, PODS, WORKFLOWS

from pipelines.prune_tune_loop import follow, kfp_api, pods, run_view
from pipelines.prune_tune_loop.kfp_api import Server
from pipelines.prune_tune_loop.pods import NODE
from ptl.errors import InputError, WorkError

SIX = ("import-model", "evaluate-0", "prune-1", "recover-1", "evaluate-1", "report")


@pytest.fixture
def command(world, said):
    """`status`, `cancel` or `retry` of a run."""

    def go(function=follow.status, run="run", **options):
        said.clear()
        options |= {} if function is follow.status else {"poll": 0.01}
        return function(run, Server(host=world.url), say=said.append, **options)

    return go


@pytest.fixture
def watch(world, said):
    return lambda: follow.watch(
        kfp_api.connect(Server(host=world.url)), "run", False, None, 0.01, said.append
    )


def rows(said):
    """The cells of the table by step; the first is its state."""
    table = next(text for text in said if "Step" in text and "State" in text)
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in table.splitlines()
        if line.startswith("│")
    ]
    return {cells[0]: cells[1:] for cells in lines}


def in_mlflow(run_id):
    """The status of a run and the error that it has."""
    run = MlflowClient().get_run(run_id)
    return run.info.status, run.data.tags.get("ptl.error")


def mlflow_runs(run):
    """All MLflow runs of a pipeline run."""
    experiments = [each.experiment_id for each in MlflowClient().search_experiments()]
    return MlflowClient().search_runs(experiments, f"tags.`ptl.run` = '{run}'")


RUNNING = {"status": "RUNNING"}
FAILED = {"status": "FAILED", "tags": {"error": "InputError: x"}}
REST = ("not started",) * 5


def test_recorded_runs(world, said, command, tracked):
    """By the names of their steps; and their end is that of their parent in MLflow."""
    for name, records, code, expected, last, parent in (
        ("run-running", (RUNNING,), 0, ("RUNNING", *("waiting",) * 5), "RUNNING", "RUNNING"),
        (
            "run-canceled",
            ({}, RUNNING),
            1,
            ("SUCCEEDED", "CANCELED", *REST[1:]),
            "canceled",
            "KILLED",
        ),
        ("run-failed-step", (FAILED,), 1, ("FAILED", *REST), "FAILED", "FAILED"),
        ("run-failed-driver", ({},), 1, ("SUCCEEDED", *REST), "FAILED", "FAILED"),
        ("run-succeeded-6-tasks", ({},) * 6, 0, ("SUCCEEDED",) * 6, "SUCCEEDED", "FINISHED"),
    ):
        run = tracked(world.play(name), dict(zip(SIX, records, strict=False)))
        assert command() == code, name
        assert [(step, cells[0]) for step, cells in rows(said).items()] == list(
            zip(SIX, expected, strict=True)
        )
        assert f": {last}  {world.url}/#/runs/details/" in said[-1]
        assert ("import-model: InputError: x" in said) == ("FAILED" in expected)
        assert in_mlflow(run)[0] == parent, name


def test_a_run_of_which_kubeflow_lists_12_of_18_steps_is_shown_by_its_records(
    world, said, command, tracked
):
    """Recorded: Kubeflow's list stopped at 1 MiB; the records go on."""
    run = world.play("run-succeeded-18-tasks", version="version-of-run-succeeded-18-tasks")
    world.played[0] |= {"state": "RUNNING", "finished_at": "1970-01-01T00:00:00Z"}
    del world.played[0]["state_history"][2:]
    training = {"train/num_input_tokens_seen": 51_200, "train/loss": 0.4567}
    scores = {"tags": {"verdict": "accepted"}, "metrics": {"seconds": 21.4, "accuracy": 0.998}}
    control = {"status": "RUNNING", "tags": {"tokens": 500_000, "attempt": 2}, "metrics": training}
    tracked(
        run,
        {
            "evaluate-4": scores,
            "control-recover": control,
            "recover-4": {"metrics": {"seconds": 60}},
        },
    )
    assert command() == 0
    table = rows(said)
    assert len(table) == 18
    assert table["evaluate-4"] == ["SUCCEEDED", "", "21", "0.998", "accepted", ""]
    assert table["control-recover"] == [
        "RUNNING",
        "2",
        "",
        "",
        "",
        "51,200 of 500,000 tokens, loss 0.457",
    ]
    assert table["recover-4"][0] == "SUCCEEDED" and table["control-evaluate"][0] == "waiting"


def test_of_a_run_whose_records_cannot_be_read_its_own_state_is_known(
    world, said, command, watch, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    world.play("run-running", "run-running", "run-succeeded-6-tasks")
    assert watch() == 0 and said[-1].endswith(": SUCCEEDED")
    assert len([text for text in said if "the steps' own records are not read" in text]) == 1
    world.play("run-failed-step", version=None)  # as after the version was deleted
    assert command() == 1 and rows(said) == {}


def test_without_records_what_kubeflow_lists_counts(world, said, command, monkeypatch):
    """Recorded. The list of a run of many steps stops: then it says only what has ended."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = ("SUCCEEDED",) * 3
    of_import = "version-of-run-image-missing"
    for name, version, expected in (
        ("run-taken-over", of_import, (*done, "RUNNING", "waiting", "waiting")),
        ("run-image-missing", of_import, ("PENDING", *("waiting",) * 5)),
        ("run-oom", of_import, (*done, "FAILED", "not started", "not started")),
        ("run-driver-poisoned", of_import, (*done, "SUCCEEDED", "SUCCEEDED", "not started")),
    ):
        world.play(name, version=version)
        command()
        assert tuple(rows(said)[step][0] for step in SIX) == expected, name
    world.play("run-succeeded-18-tasks", version="version-of-run-succeeded-18-tasks")
    world.played[0]["state"] = "RUNNING"
    command()
    table = rows(said)
    assert [table[step][0] for step in ("recover-3", "recover-4", "report")] == [
        "SUCCEEDED",
        "unknown",
        "unknown",
    ]


def test_a_step_that_kubeflow_calls_succeeded_is_finished_in_mlflow_too(
    world, said, command, tracked
):
    """As when MLflow was away at its end; other steps of the run that are still RUNNING there were killed."""
    run = world.play("run-oom", version="version-of-run-image-missing")
    tracked(run, {"import-model": {}, "prune-1": RUNNING, "recover-1": RUNNING})
    assert command() == 1
    table = rows(said)
    assert (table["prune-1"][0], table["recover-1"][0]) == ("SUCCEEDED", "FAILED")
    found = {entry.data.tags.get("ptl.step"): entry.info.status for entry in mlflow_runs(run)}
    assert (found["prune-1"], found["recover-1"]) == ("FINISHED", "FAILED")


def test_what_is_running_after_the_end_was_killed_and_is_closed(world, said, command, tracked):
    run = world.play("run-retried")
    world.played[0] |= {"state": "FAILED"}
    parent = tracked(run, {"prune-1": {}, "recover-1": RUNNING})
    for _ in range(2):  # what was closed says the same
        assert command() == 1
        (reason,) = [text for text in said if text.startswith("recover-1: ")]
        assert "killed from outside, most likely out of memory" in reason
        assert in_mlflow(parent) == ("FAILED", reason)
    experiment = MlflowClient().get_run(parent).info.experiment_id
    (step,) = MlflowClient().search_runs(
        [experiment], f"tags.`ptl.run` = '{run}' and tags.`ptl.step` = 'recover-1'"
    )
    assert in_mlflow(step.info.run_id) == ("FAILED", reason.removeprefix("recover-1: "))


def test_a_wait_has_one_line_for_each_change(world, said, watch, tracked):
    run = world.play(
        "run-pending", "run-running", "run-running", "run-running", "run-succeeded-6-tasks"
    )
    training = {"train/num_input_tokens_seen": 51_200, "train/loss": 0.4567}
    tracked(run, {"import-model": RUNNING | {"metrics": training}})
    assert watch() == 0
    lines = [
        text.removeprefix("import-model: ") for text in said if text.startswith("import-model")
    ]
    assert lines == ["RUNNING", "51,200 tokens, loss 0.457", "SUCCEEDED"]
    assert "evaluate-1: SUCCEEDED" in said and said[-1].endswith(": SUCCEEDED")


def test_a_step_that_was_taken_over_says_from_which_run(world, said, command, watch, tracked):
    """Recorded: prune-1 took 25 s of this run, and its record has the 16 s of the other one."""
    run = world.play("run-taken-over", version="version-of-run-image-missing")
    earlier = recorded("run-taken-over")["runtime_config"]["parameters"]["earlier_runs"]
    copied = {"tags": {"taken_over_from": earlier}, "metrics": {"seconds": 16.2}}
    tracked(
        run,
        {"import-model": {"metrics": {"seconds": 9.1}}, "prune-1": copied, "recover-1": RUNNING},
    )
    assert command() == 0
    assert rows(said)["prune-1"] == ["SUCCEEDED", "", "", "", "", f"taken over from {earlier}"]
    world.played = [world.played[0], {**world.played[0], "state": "SUCCEEDED"}]
    said.clear()
    assert watch() == 0
    assert (
        f"prune-1: SUCCEEDED, taken over from {earlier}" in said
        and "import-model: SUCCEEDED in 9 s" in said
    )


def test_ctrl_c_ends_the_wait_and_says_that_the_run_continues(watch, monkeypatch, capsys):
    monkeypatch.setattr(follow, "get_run", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        watch()
    assert ended.value.code == 130
    assert (
        "interrupted by SIGINT: the run continues; `ptl status run` shows it"
        in capsys.readouterr().err
    )


def test_cancel_waits_for_the_end_and_closes_mlflow(world, said, command, tracked):
    run = world.play("run-running", "run-canceling", "run-canceling", "run-canceled")
    world.answers = [("POST", ":terminate", "post-terminate")]
    parent = tracked(run, {"import-model": RUNNING})
    assert command(follow.cancel, run) == 0
    assert said[-1].endswith(": canceled") and in_mlflow(parent)[0] == "KILLED"
    world.play("run-running", "run-succeeded-6-tasks")
    world.answers = [("POST", ":terminate", "post-terminate-finished")]
    assert command(follow.cancel) == 0 and "has ended before (SUCCEEDED)" in said[-1]


def test_only_a_run_that_has_failed_is_retried(world, said, command, tracked):
    """The wait does not begin with the old attempt, of which Kubeflow's list and the step's record are for seconds."""
    world.play("run-running")
    with pytest.raises(InputError, match="is RUNNING; only a run that failed or was canceled"):
        command(follow.retry)
    run = world.play("run-failed-step", "run-failed-step", "run-failed-step", "run-retried")
    old, *retried, _ = world.played
    for look in retried:
        look["state"] = "RUNNING"
    ended = datetime.fromisoformat(old["finished_at"]).timestamp()
    parent = tracked(run, {"import-model": FAILED | {"ended": ended}}, status="FAILED")
    assert command(follow.retry, run, wait=True) == 0
    assert "runs again" in said[0] and "import-model: SUCCEEDED" in said
    assert not any(text.startswith("import-model: FAILED") for text in said)
    assert in_mlflow(parent)[0] == "FINISHED"
    world.play("run-failed-step")
    world.answers = [("POST", ":retry", "post-retry-succeeded")]
    with pytest.raises(InputError, match=r"409 .*Workflow must be Failed/Error to retry"):
        command(follow.retry, run)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("status", "cut answer"),
        ("cancel", "empty object"),
        ("cancel", "hang"),
        ("retry", "bad JSON"),
    ],
)
def test_nonsense_is_no_success_of_any_command(world, said, command, monkeypatch, name, fault):
    """The server's own answer to a request is `{}`, and so may be that of a proxy that has passed nothing on."""
    monkeypatch.setattr(kfp_api, "READ_TIMEOUT", 0.02)
    monkeypatch.setattr(follow, "SETTLING", 0.05)
    run = world.play("run-running" if name == "cancel" else "run-failed-step")
    asked = ("GET", "/runs/") if name == "status" else ("POST", run)
    world.answers = [(*asked, fault)] * (kfp_api.REPEATS + 1)
    with pytest.raises(
        WorkError, match=r"Kubeflow Pipelines at|as before; the session may have expired"
    ):
        command(getattr(follow, name), run)
    assert not any("asked to end" in text or "runs again" in text for text in said)


def test_a_run_is_named_by_its_name_too(world, command):
    world.runs = [
        {
            "run_id": f"id-{number}",
            "display_name": name,
            "state": "FAILED",
            "state_history": [],
            "looks": 0,
        }
        for number, name in enumerate(["tiny-1", "twice", "twice"])
    ]
    world.play("run-failed-step")
    command(follow.cancel, "tiny-1")
    assert world.calls("GET", "/runs/id-0") and not world.calls("GET", "/runs/tiny-1")
    with pytest.raises(InputError, match="2 runs have the name twice; give an id: id-1 and id-2"):
        command(follow.cancel, "twice")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The Kubernetes API that a kubeconfig names, five minutes after the recorded pods could not start."""
    monkeypatch.setattr(run_view, "now", lambda: datetime(2026, 11, 28, 7, 53, tzinfo=UTC))
    with mock_kubernetes.serving(tmp_path) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made


def test_a_run_shows_its_pods(world, said, command, cluster, tracked, monkeypatch):
    cluster.of_run[PODS] = recorded("pods-unschedulable")["items"]
    world.play("run-image-missing", version="version-of-run-image-missing")
    world.played[0]["run_id"] = cluster.of_run[PODS][0]["metadata"]["labels"]["pipeline/runid"]
    tracked(world.played[0]["run_id"], {"import-model": {}})
    assert command() == 0
    assert [rows(said)[step][0] for step in ("evaluate-0", "prune-1", "recover-1")] == [
        "PENDING",
        "PENDING",
        "waiting",
    ]
    unschedulable = (
        "Unschedulable: 0/1 nodes are available: 1 node(s) didn't match Pod's node affinity"
    )
    assert any(
        text.startswith(f"prune-1: pending since 07:46 UTC: {unschedulable}") for text in said
    )
    run = world.play("run-oom", version="version-of-run-image-missing")
    cluster.of_run[PODS] = recorded("pods-oom")["items"]
    tracked(run, {"import-model": {}, "evaluate-0": {}, "prune-1": {}, "recover-1": RUNNING})
    assert command() == 1
    assert any(
        text.startswith("recover-1: OOMKilled: raise resources.steps.recover.memory or ")
        for text in said
    )
    assert (
        "a retry has the same memory: submit it again, which takes the finished steps over" in said
    )
    # A claim that is not there, which Kubernetes reports as it does the lack of a node.
    monkeypatch.setattr(run_view, "now", lambda: datetime(2026, 12, 3, 17, 35, tzinfo=UTC))
    cluster.show("claim-missing")
    world.play("run-claim-missing", version="version-of-run-image-missing")
    assert command() == 0
    claim = 'Unschedulable: 0/1 nodes are available: persistentvolumeclaim "nothere" not found. not found'
    remedy = "check storage.cache_claim: the claim must exist in this namespace, and be bound"
    assert f"import-model: pending since 17:28 UTC: {claim}; {remedy}" in said


AS_ROOT = "CreateContainerConfigError: container has runAsNonRoot and image will run as root"
QUOTA = (
    'pods "quota-nwdlb-system-dag-driver-3946042863" is forbidden: failed quota: q2: '
    "must specify limits.memory for: "
)


def test_a_run_whose_own_driver_cannot_start_says_why(
    world, said, command, cluster, tracked, monkeypatch
):
    """Recorded: its pod keeps all steps waiting, or a quota refuses it and the run ends before its first step."""
    monkeypatch.setattr(run_view, "now", lambda: datetime(2026, 12, 3, 17, 25, tzinfo=UTC))
    for name, code, state, reason in (
        ("root-driver-pending", 0, "waiting", f"root-driver: pending since 17:23 UTC: {AS_ROOT}"),
        (
            "quota",
            1,
            "not started",
            f"root-driver: {QUOTA}init,wait; requests.memory for: init,wait; Kubeflow's own",
        ),
    ):
        world.play(f"run-{name}")
        cluster.show(name)
        assert command() == code
        assert [text for text in said if text.startswith(reason)], name
        assert [rows(said)[step][0] for step in SIX] == [state] * 6
    # Without the pods, which this account may not list, the workflow says the same.
    cluster.show("root-driver-pending")
    cluster.of_run[PODS] = []
    world.play("run-root-driver-pending")
    command()
    assert [
        text for text in said if text.startswith(f"root-driver: pending since 17:23 UTC: {AS_ROOT}")
    ]


def with_poisoned_driver(cluster):
    """The recorded driver of prune-3 that failed after a retry: its node and its log; its pod is made of another's."""
    cluster.show("root-driver-pending")
    (pod,) = cluster.of_run[PODS]
    cluster.show("driver-poisoned")
    (workflow,) = cluster.of_run[WORKFLOWS]
    node = workflow["status"]["nodes"]["gate-qzrv9-874575215"]
    pod["metadata"]["name"] = "gate-qzrv9-system-container-driver-874575215"
    pod["metadata"]["creationTimestamp"] = node["startedAt"]
    pod["metadata"]["annotations"] |= {NODE: node["name"], pods.NODE_ID: node["id"]}
    pod["metadata"]["labels"] = workflow["metadata"]["labels"]
    pod["status"] = {"phase": "Failed"}
    cluster.of_run[PODS] = [pod]
    log = (mock_kubernetes.OF_RUNS / "driver-poisoned.log").read_text()
    cluster.logs[pod["metadata"]["name"]] = lambda: [
        "I1203 18:02:24.1 14 main.go:100] begins\n",
        log,
    ]


def test_a_run_that_no_retry_can_resume_is_submitted_again(
    world, said, command, watch, cluster, tracked
):
    """Recorded: Kubeflow has a task of it twice, and each driver fails at once, also after `ptl retry`."""
    run = world.play("run-driver-poisoned", version=None)
    with_poisoned_driver(cluster)
    tracked(run, {"import-model": {}})
    assert watch() == 1
    words = "failed to resolve inputs: failed to resolve input artifact model with spec task_output_artifact:"
    assert f"FAILED: prune-3: its driver failed: {words}" in said[-1]
    assert said[-1].endswith(
        'two tasks have the same task name "prune-3_59", id1=75 id2=76; no retry can work, as Kubeflow has a task of '
        "this run twice: submit it again, which takes the finished steps over"
    )
    with pytest.raises(
        InputError, match=r"no retry can work.*two tasks have.*; submit it again, which takes"
    ):
        command(follow.retry, run)
    assert not world.calls("POST", ":retry")
    assert command() == 1 and "no retry can work" in said[-2]


def test_without_the_drivers_log_a_second_failure_within_a_minute_is_a_hint(
    world, said, watch, cluster
):
    world.play("run-driver-poisoned", version=None)
    with_poisoned_driver(cluster)
    cluster.forbidden = ".*/log"
    hint = "if it does again, submit it again, which takes the finished steps over"
    assert watch() == 1
    assert "prune-3: its driver failed: main: Error (exit code 1); see `kubectl logs" in said[-1]
    assert said[-1].endswith(hint) and "`ptl retry " in said[-1]
    cluster.forbidden = ".*"  # Kubeflow's list alone
    assert watch() == 1 and said[-1].endswith(hint)
    for retried in ("18:00:00", "18:02:50"):  # long before the failure, and after it
        world.played[0]["state_history"][-2]["update_time"] = f"2026-12-03T{retried}Z"
        assert watch() == 1 and not said[-1].endswith(hint)


def test_a_wait_names_the_reason_of_a_run_that_ended_before_its_first_step(
    world, said, watch, cluster
):
    world.play("run-quota")
    cluster.show("quota")
    assert watch() == 1
    assert said[-1].startswith(f"quota-20261203-181826-601b: FAILED: root-driver: {QUOTA}")


POSTPONED = "Workflow processing has been postponed because too many workflows are already running"


def test_a_run_of_which_no_pod_lives_for_two_minutes_says_what_argo_says(
    world, said, cluster, tracked, monkeypatch
):
    """Recorded: a run between two steps, those before it taken over. The workflow is made up, after Argo's source."""
    run = world.play("run-taken-over", version="version-of-run-image-missing")
    tracked(run, {"import-model": {"ended": 1}})
    api = kfp_api.connect(Server(host=world.url))
    status = {}
    workflow = {"metadata": {"labels": {"pipeline/runid": run}}, "status": status}

    def line(time, observer):
        monkeypatch.setattr(run_view, "now", lambda: datetime.fromisoformat(f"2026-12-03T{time}Z"))
        said.clear()
        observer.look(kfp_api.get_run(api, run))
        return next((text.partition("; see `kubectl")[0] for text in said if "minutes" in text), "")

    cluster.of_run[WORKFLOWS] = [workflow]
    observer = follow.Observer(api, said.append)
    assert line("17:47:10", observer) == ""  # recover-1 began at 17:45:15
    assert line("17:47:20", follow.Observer(api, said.append)) == (
        "for 2 minutes no pod of the run has been alive: Argo has not begun its workflow: is the workflow controller "
        "running?"
    )
    status |= {"phase": "Pending", "message": POSTPONED}
    words = f"for 2 minutes no pod of the run has been alive: its workflow is Pending: {POSTPONED}"
    assert line("17:47:20", observer) == words and line("17:47:25", observer) == ""  # nothing twice
    # As long as a pod lives, nothing is said, and for two minutes after.
    cluster.show("root-driver-pending")
    cluster.of_run[PODS][0]["metadata"]["labels"]["pipeline/runid"] = run
    cluster.of_run[WORKFLOWS] = [workflow]
    observer = follow.Observer(api, said.append)
    assert line("18:00:00", observer) == ""
    cluster.of_run[PODS] = []
    assert line("18:01:50", observer) == "" and line("18:02:10", observer) == words


def test_what_argo_says_of_a_step_counts_beside_the_pods_of_others(cluster):
    """As a quota that refuses one arm while the other works; what has succeeded since has no reason any more."""
    cluster.show("root-driver-pending")
    (workflow,) = cluster.of_run[WORKFLOWS]
    nodes = workflow["status"]["nodes"]
    (driver,) = [node for node in nodes.values() if node["displayName"] == "root-driver(0)"]
    later = {
        "id": "n-1",
        "name": "w(0).root(0).prune-1(0).executor(0)",
        "startedAt": "2026-12-03T17:30:00Z",
    }
    nodes["n-1"] = (
        driver | later | {"phase": "Error", "message": "pods is forbidden: exceeded quota: q2"}
    )
    run = workflow["metadata"]["labels"]["pipeline/runid"]
    found = pods.read("kubeflow", run)
    assert (found["root-driver"].phase, found["prune-1"].phase) == ("Pending", "Failed")
    assert found["prune-1"].message.endswith("exceeded quota: q2")
    nodes["n-2"] = driver | {"id": "n-2", "name": "w(0).root-driver(1)", "phase": "Succeeded"}
    nodes["n-2"]["startedAt"] = "2026-12-03T17:24:00Z"
    assert list(pods.read("kubeflow", run)) == ["prune-1"]


def test_an_answer_that_fails_once_hides_no_pods(world, said, cluster, tracked, monkeypatch):
    found = {"prune-1": pods.Pod(datetime.now(UTC), reason="Unschedulable")}
    monkeypatch.setattr(pods, "read", mock.Mock(side_effect=[found, WorkError("503"), found]))
    run = world.play("run-running", version="version-of-run-image-missing")
    api = kfp_api.connect(Server(host=world.url))
    tracked(run, {"import-model": {}})
    observer = follow.Observer(api, said.append)
    for _ in range(3):
        observer.look(kfp_api.get_run(api, run))
        assert observer.pods == found
    assert pods.read.call_count == 3


NEVER_PULLED = 'Container image "ptl-prune:9.9" is not present with pull policy of Never'
NOT_FOUND = "rpc error: code = NotFound desc = failed to pull and unpack image: not found"
BACK_OFF = f'Back-off pulling image "x": ErrImagePull: {NOT_FOUND}'


def test_a_container_that_cannot_start_says_why(cluster):
    """The recorded pod, whose container waits for another reason."""
    for reason, message, sentence, remedy in (
        (
            "ErrImageNeverPull",
            NEVER_PULLED,
            f"ErrImageNeverPull: {NEVER_PULLED}",
            "check images.registry, images.tag",
        ),
        ("ImagePullBackOff", BACK_OFF, f"ImagePullBackOff: {NOT_FOUND}", "check images.registry"),
        # its newest event
        ("ContainerCreating", "", "FailedMount: no such claim", "check storage.cache_claim"),
    ):
        (pod,) = cluster.of_run[PODS] = recorded("pods-image-missing")["items"]
        container = next(
            entry for entry in pod["status"]["containerStatuses"] if entry["name"] == "main"
        )
        container["state"]["waiting"] = {"reason": reason, "message": message}
        cluster.of_run[EVENTS] = recorded("events-pending")["items"]
        if not message:
            mount = {
                "reason": "FailedMount",
                "message": "no such claim",
                "lastTimestamp": "2026-11-28T07:51:00Z",
            }
            cluster.of_run[EVENTS].insert(0, cluster.of_run[EVENTS][0] | mount)
        found = pods.read("kubeflow", pod["metadata"]["labels"]["pipeline/runid"])["import-model"]
        assert (found.phase, found.sentence) == ("Pending", sentence) and found.remedy(
            "prune"
        ).startswith(remedy)


def test_of_a_steps_pods_the_newest_counts_and_a_driver_is_no_container(cluster):
    (pod,) = recorded("pods-oom")["items"]
    driver = copy.deepcopy(pod)
    driver["metadata"]["annotations"][NODE] = "w(0).root(0).recover-1-driver(0)"
    driver["metadata"]["creationTimestamp"] = "2026-11-28T07:00:00Z"
    for container in driver["status"]["containerStatuses"]:
        container["state"] = {"terminated": {"exitCode": 1, "reason": "Error"}}
    for entries in ([pod, driver], [driver, pod]):
        cluster.of_run[PODS] = entries
        found = pods.read("kubeflow", pod["metadata"]["labels"]["pipeline/runid"])
        assert found == {
            "recover-1": pods.Pod(datetime(2026, 11, 28, 7, tzinfo=UTC), "Failed", is_driver=True)
        }


def test_a_pod_that_a_quota_refuses_is_explained_by_the_workflow(cluster):
    """Made up after Argo's source: it keeps such a node pending, with the answer to its request as the message."""
    quota = 'pods "n-1" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: 0, limited: 4'
    node = {
        "name": "noimg-rhr5h(0).root(0).import-model(0).executor(0)",
        "phase": "Pending",
        "message": quota,
    }
    nodes = {
        "noimg-rhr5h-1": node
        | {"id": "noimg-rhr5h-1", "type": "Pod", "startedAt": "2026-11-28T07:48:16Z"}
    }
    packed = base64.b64encode(gzip.compress(json.dumps(nodes).encode())).decode()
    for state in ({"nodes": nodes}, {"compressedNodes": packed}):
        cluster.of_run[WORKFLOWS] = [
            {"metadata": {"labels": {"pipeline/runid": "run"}}, "status": state}
        ]
        (found,) = pods.read("kubeflow", "run").items()
        assert found == (
            "import-model",
            pods.Pod(datetime(2026, 11, 28, 7, 48, 16, tzinfo=UTC), message=quota),
        )
        assert found[1].remedy("prune").startswith("ask for less (resources.steps.prune)")
