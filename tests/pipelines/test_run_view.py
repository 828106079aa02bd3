"""The states of steps, and why they are in them, as they follow from a run, its records in MLflow and its pods."""

import random
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

from checkout import TINY

from pipelines.prune_tune_loop import run_view
from pipelines.prune_tune_loop.pods import Pod
from ptl.config import dag
from ptl.config.run import load_config
from ptl.lineage.run_status import StepProgress

LOOP = [f"{stage}-{i}" for i in (1, 2, 3, 4) for stage in ("prune", "recover", "evaluate")]
CONTROL = [f"control-{stage}" for stage in ("prune", "recover", "evaluate")]
NAMES = ["doctor", "import-model", "evaluate-0", *LOOP, *CONTROL, "report"]
BEGIN = datetime(2026, 11, 28, 8, 0, tzinfo=UTC)
MINUTE, SECOND = timedelta(minutes=1), timedelta(seconds=1)

DONE, RUNNING = StepProgress(status="FINISHED"), StepProgress(status="RUNNING")
ENDS_THE_LOOP = StepProgress(status="FINISHED", loop_ended="no smaller cut")
NAN = StepProgress(status="FAILED", error="nan", ended=BEGIN + 2 * MINUTE)
BEFORE = StepProgress(status="FAILED", error="old", ended=BEGIN + 2 * MINUTE - SECOND)
OOM = Pod(BEGIN, "Failed", reason="OOMKilled", container="main")
PENDING = Pod(BEGIN + 4 * MINUTE)
NO_NODE = Pod(BEGIN, reason="Unschedulable", message="0/1 nodes are available")
NO_GPU = (
    "pending since 08:00 UTC: Unschedulable: 0/1 nodes are available; check resources.accelerator and accelerators, "
    "node_selector and tolerations, cpu and memory (of this kind of step: resources.steps.prune)"
)
PODS, LOGS = "see describe workflows,pods", "see logs -c main --prefix --tail=20"
MEMORY = "raise resources.steps"
KILLED = f"killed from outside, most likely out of memory (or past resources.timeout): {MEMORY}"
OUT_OF_MEMORY = f"OOMKilled: {MEMORY}.recover.memory or raise recover.accumulation, which splits the batch; {PODS}"
RETRIED = "RUNNING FAILED RUNNING"
LOST, STOPPED = "FAILED: nan", "FAILED: it was stopped when the run failed"
ATTEMPT = "PENDING: another attempt follows, unless it was the last"
NO_CONTAINER = "its driver failed: no container of the step was started"


def look(history, records=None, pods=None, names=NAMES, tasks=()):
    """A run that has had these states, one a minute, looked at in the fifth; it is in the last one.

    `tasks` are what Kubeflow lists: name, state and the minute of the end, if it says one.
    """
    listed = [
        SimpleNamespace(
            display_name=name,
            state=state,
            start_time=BEGIN,
            end_time=None if minute is None else BEGIN + minute * MINUTE,
        )
        for name, state, minute in tasks
    ]
    moments = enumerate(history.split())
    entries = [
        SimpleNamespace(state=each, update_time=BEGIN + number * MINUTE) for number, each in moments
    ]
    about = {
        "run_id": "id",
        "display_name": "tiny-1",
        "created_at": BEGIN,
        "state": entries[-1].state,
        "run_details": SimpleNamespace(task_details=listed),
    }
    run = SimpleNamespace(state_history=entries, **about)
    return run_view.view(run, names, records, pods or {}, lambda command: f"see {command}")


def test_a_driver_that_fails_within_a_minute_of_the_retry_fails_again():
    for minute, again in ((2, True), (1, False), (3, False), (None, False)):
        run = look("RUNNING FAILED RUNNING FAILED", tasks=[("prune-1-driver", "FAILED", minute)])
        assert run.fails_again == again, minute


def test_the_states_of_steps(monkeypatch):
    monkeypatch.setattr(run_view, "now", lambda: BEGIN + 5 * MINUTE)
    of_report = f"FAILED: {KILLED}.report.memory; {PODS}"
    of_import = f"FAILED: OOMKilled: {MEMORY}.import-model.memory; {PODS}"
    for history, records, pods, expected in (
        ("RUNNING", None, {}, {"doctor": "unknown", "prune-1": "unknown"}),
        (
            "RUNNING",
            {"import-model": RUNNING},
            {},
            {"doctor": "SUCCEEDED", "import-model": "RUNNING"},
        ),
        ("FAILED", {}, {}, {"doctor": "not started", "run": PODS}),
        # Of a pod that was killed the record is still RUNNING.
        ("SUCCEEDED", {"prune-1": RUNNING}, {}, {"prune-1": "SUCCEEDED"}),
        (
            "RUNNING CANCELING FAILED",
            {"evaluate-0": RUNNING},
            {},
            {"evaluate-0": "CANCELED", "run": "canceled"},
        ),
        # What comes after the end of the loop is not needed; the control is apart.
        (
            "RUNNING",
            {"evaluate-2": ENDS_THE_LOOP},
            {},
            {"prune-3": "not needed", "control-prune": "waiting"},
        ),
        # After a retry, two minutes after the begin
        (
            RETRIED,
            {"evaluate-0": BEFORE, "prune-1": NAN},
            {},
            {"evaluate-0": "waiting", "prune-1": LOST},
        ),
        # Only since the last retry it was asked to end.
        ("CANCELING FAILED RUNNING FAILED", {"prune-1": NAN}, {}, {"run": "prune-1: nan"}),
        # Why a step failed
        (
            "FAILED",
            {"recover-1": RUNNING},
            {"recover-1": OOM},
            {"run": f"recover-1: {OUT_OF_MEMORY}"},
        ),
        (
            "FAILED",
            {"evaluate-0": NAN, "prune-1": RUNNING},
            {},
            {"prune-1": STOPPED, "run": "evaluate-0: nan"},
        ),
        ("FAILED", {"import-model": RUNNING}, {"import-model": OOM}, {"import-model": of_import}),
        # Not by the control
        ("FAILED", {"control-prune": NAN, "report": RUNNING}, {}, {"report": of_report}),
        ("FAILED", {"control-prune": NAN}, {}, {"run": "control-prune: nan"}),
        (
            "FAILED",
            {},
            {"prune-1": Pod(BEGIN, "Failed", True)},
            {"prune-1": f"FAILED: {NO_CONTAINER}; {LOGS}"},
        ),
        # Why a step is pending
        (
            "RUNNING",
            {},
            {"prune-1": PENDING},
            {"prune-1": f"PENDING: pending since 08:04 UTC; {PODS}"},
        ),
        ("RUNNING", {"prune-1": NAN}, {"prune-1": NO_NODE}, {"prune-1": f"PENDING: {NO_GPU}"}),
        (
            "RUNNING",
            {"recover-1": RUNNING},
            {"recover-1": OOM},
            {"recover-1": f"{ATTEMPT}: {OUT_OF_MEMORY}"},
        ),
    ):
        view = look(history, records, pods)
        found = {
            step.name: f"{step.state}: {step.reason}".removesuffix(": ") for step in view.steps
        }
        found["run"] = view.reason
        assert {name: found[name] for name in expected} == expected


def test_kubeflows_list_counts_where_the_records_are_silent():
    """Also of a retried run, whose list has the failures before; a step of the control fails without failing a task."""
    listed = [
        ("prune-1", "FAILED", 1),
        ("evaluate-0", "SUCCEEDED", 1),
        ("import-model", "SUCCEEDED", 1),
    ]
    for history, records, tasks, expected in (
        # A list of 19 steps may have stopped.
        (
            "RUNNING",
            None,
            [*listed, ("recover-1", "RUNNING", 0)],
            {"evaluate-0": "SUCCEEDED", "recover-1": "unknown"},
        ),
        (RETRIED, {}, listed, {"prune-1": "waiting", "evaluate-0": "SUCCEEDED"}),
        (RETRIED, {}, [("prune-1", "FAILED", 3)], {"prune-1": "FAILED"}),
        ("FAILED", {}, [("prune-1-driver", "FAILED", 0)], {"prune-1": "FAILED"}),
        ("RUNNING CANCELING FAILED", {}, [("prune-1", "FAILED", 2)], {"prune-1": "CANCELED"}),
        (
            "RUNNING",
            {"control-prune": NAN},
            [("control-prune", "SUCCEEDED", 1)],
            {"control-prune": "FAILED"},
        ),
        (
            "RUNNING",
            {"evaluate-1": ENDS_THE_LOOP},
            [("prune-2", "SUCCEEDED", 1)],
            {"prune-2": "not needed"},
        ),
    ):
        tasks = [("root-driver", "SUCCEEDED", 0), *tasks]
        states = {step.name: step.state for step in look(history, records, tasks=tasks).steps}
        assert {name: states[name] for name in expected} == expected


def test_a_loop_that_failed_while_the_control_works_says_how_to_end_the_run():
    """The run's own state stays RUNNING until what can still run has ended. A failed control does not end it."""
    hint = look("RUNNING", {"recover-1": NAN, "control-prune": RUNNING}).hint_to_cancel
    assert (
        "recover-1 has failed, and the run ends when control-prune has ended; `ptl cancel id` ends it now"
        in hint
    )
    assert look("RUNNING", {"control-prune": NAN, "recover-1": RUNNING}).hint_to_cancel == ""


def test_steps_are_listed_as_one_machine_executes_them():
    """Iteration 10 after 2; Kubeflow's own list is sorted by keys."""
    sets = {"schedule.iterations": 16, "export": [{"format": "gguf", "type": "q8_0"}]}
    sets |= {"training.answers": "self"}
    names = [node.name for node in dag.nodes(load_config(TINY, sets))]
    # The sort is stable: what has no order of its own, as import and doctor, keeps Kubeflow's.
    shuffled = random.Random(0).sample(names[1:-2], len(names) - 3)
    assert sorted([*names[-2:], *shuffled, names[0]], key=run_view._position) == names
