"""`ptl status` of runs of this machine, whose steps note in the run's directory how far they are."""

import dataclasses
import json

import pytest
from run_records import scores
from working import execute, run_locally

from pipelines.prune_tune_loop.follow import DONE, FAILED
from ptl import processes
from ptl.lineage import tracking
from ptl.local import progress
from ptl.steps import records
from ptl.steps.attempts import Failure
from ptl.steps.call import Call
from ptl.storage.store import Pointer

PLAN = ("import-model", "evaluate-0", "prune-1", "recover-1", "evaluate-1", "report")
STOPPED = Pointer(
    "file:///x", "sha256:" + "c" * 64, gate={"stopped": True, "reason": "the model is small enough"}
)


@pytest.fixture
def begin(tmp_path, mlflow_folder, monkeypatch):
    """Begin a run of six steps on this machine, which may take over steps of an earlier one; returns its directory."""

    def run(earlier=""):
        name = run_locally(monkeypatch, tmp_path, mlflow_folder)
        folder = tmp_path / ".ptl" / "runs" / name
        folder.mkdir(parents=True)
        monkeypatch.setenv("PTL_RUN_DIR", str(folder))
        progress.begin(folder, dict.fromkeys(PLAN, 1.0))
        if earlier:  # as import-model does
            tracking.name_earlier_runs(Call("import-model", "status").start(), [earlier])
        return folder

    return run


def made(_src, dst, _run):
    (dst / "model.safetensors").write_bytes(b"weights")
    return {"params": 1234, "tokens": 8, "steps": 1}


def rows(printed):
    """The cells of the table by step, without the time."""
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in printed.splitlines()
        if line.startswith("│")
    ]
    return {cells[0]: [cells[1], *cells[3:]] for cells in lines}


def test_a_second_terminal_sees_the_steps_of_a_run(ptl, begin):
    earlier = begin()
    execute(Call("prune-1", "status"), None, {}, made)
    folder = begin(earlier.name)
    model = execute(Call("import-model", "status"), None, {}, made).pointer
    evaluation = {"scores": scores(9, 0.5, 1), "verdict": {"decision": "baseline"}, "seconds": 4.2}
    evaluation["accepted"] = dataclasses.asdict(model)
    execute(Call("evaluate-0", "status"), model, {}, lambda *given: made(*given) and evaluation)
    execute(Call("prune-1", "status"), None, {}, None)
    progress.note("recover-1", progress.RUNNING)
    (folder / "log.txt").write_text(
        "loading\nptl: recover-1: started\nptl: [##--] 20% 10 s left\na warning\n"
    )
    with processes.lifeline(folder / "lifeline-1"):
        code, printed = ptl("status", folder.name)
        listing = ptl("status")[1]
        document = json.loads(ptl("status", folder.name, "--json")[1])
    assert code == DONE
    assert f"\n[##--] 20% 10 s left\n{folder.name}: running, step 4 of 6, about " in printed
    steps = rows(printed)
    assert steps["import-model"] == ["done", "0", "", "1,234 parameters"]
    assert steps["evaluate-0"] == ["done", "4", "0.500", "baseline"]
    # The other run's time is not this one's.
    assert steps["prune-1"] == ["done", "", "", f"1,234 parameters, taken over from {earlier.name}"]
    assert steps["recover-1"] == ["running", "", "", ""] and steps["report"] == [
        "waiting",
        "",
        "",
        "",
    ]
    assert "step 4 of 6" in listing and listing.index(folder.name) < listing.index(earlier.name)
    assert (document["state"], document["step"], document["of"]) == ("running", 4, 6)
    assert [step["state"] for step in document["steps"]] == [
        "done",
        "done",
        "done",
        "running",
        "waiting",
        "waiting",
    ]

    # The command is killed.
    code, printed = ptl("status", folder)
    assert code == FAILED and f"{folder.name}: interrupted, step 4 of 6" in printed
    assert rows(printed)["recover-1"][0] == "interrupted" and "10 s left" not in printed


def test_the_time_left_follows_the_plan_and_then_what_was_measured(begin, monkeypatch):
    """The forecast's hours are of another machine: only their shares count."""
    monkeypatch.setattr("time.time", lambda: 1000.0)
    folder = begin()
    work = {
        "import-model": 0.0,
        "evaluate-0": 0.1,
        "prune-1": 0.2,
        "recover-1": 0.3,
        "evaluate-1": 0.1,
        "report": 0.0,
    }
    progress.begin(folder, work)

    def position(step, **seconds):
        for ended, its_seconds in seconds.items():
            progress.note(ended.replace("_", "-"), progress.DONE, seconds=its_seconds)
        progress.note(step, progress.RUNNING, since=1000.0)
        with processes.lifeline(folder / "lifeline-1"):
            return progress.position_of(step)

    assert position("import-model") == " (step 1 of 6)"
    assert position("evaluate-0", import_model=9.0) == " (step 2 of 6)"  # its work is not known
    assert position("prune-1", evaluate_0=100.0) == " (step 3 of 6, about 10 min left)"
    # The second evaluation takes as long as the first, whatever pruning has taken.
    assert position("recover-1", prune_1=20.0) == " (step 4 of 6, about 3 min 40 s left)"
    monkeypatch.setattr("time.time", lambda: 1050.0)
    with processes.lifeline(folder / "lifeline-1"):
        # 50 s of it are over.
        assert progress.read(folder).seconds_left(1050.0) == pytest.approx(170)
    assert position("evaluate-1", recover_1=77.0) == " (step 5 of 6, about 50.0 s left)"


def test_after_the_loops_end_only_what_is_still_needed_takes_time(begin):
    folder = begin()
    progress.begin(
        folder,
        {
            "evaluate-1": 1.0,
            "prune-2": 5.0,
            "recover-2": 5.0,
            "evaluate-2": 1.0,
            "control-prune": 2.0,
        },
    )
    progress.note("evaluate-1", progress.DONE, seconds=10.0)
    assert progress.read(folder).seconds_left(0.0) == pytest.approx(130)
    progress.note("evaluate-1", progress.DONE, seconds=10.0, ends_loop=True)
    assert progress.read(folder).seconds_left(0.0) == pytest.approx(20)


def test_why_a_step_failed_and_which_was_not_needed(ptl, begin):
    folder = begin()
    Call("prune-1", "status", {}, {"model": STOPPED}).pass_through()
    call = {"settings": {"step": "recover-1", "experiment": "status"}, "inputs": {}, "outputs": {}}
    with pytest.raises(SystemExit):
        records.give_up(call, Failure("the data is gone"), {})
    code, printed = ptl("status", folder.name)
    assert (
        code == FAILED
        and f"recover-1: the data is gone\n{folder.name}: failed, step 2 of 6" in printed
    )
    assert rows(printed)["prune-1"] == ["not needed", "", "", "the model is small enough"]
    # The next command has everything before it.
    progress.begin(folder, dict.fromkeys(PLAN, 1.0))
    assert rows(ptl("status", folder.name)[1])["recover-1"] == ["waiting", "", "", ""]


def test_without_a_run_there_is_a_remedy(ptl, begin):
    code, printed = ptl("status")
    assert code == 2 and "run: no run is named, and there are none in .ptl; give the id" in printed
    begin()
    code, printed = ptl("status", "other")
    assert code == 2 and "run: .ptl has no run other, and no cluster is named" in printed


def test_a_run_on_a_cluster_is_json_too(ptl, world, tracked):
    run = world.play("run-succeeded-6-tasks")
    tracked(run, {"import-model": {"status": "FINISHED"}})
    code, printed = ptl("status", run, "--host", world.url, "--json")
    document = json.loads(printed[printed.index("{") :])
    assert code == DONE and (document["run_id"], document["state"]) == (run, "SUCCEEDED")
    assert [step["step"] for step in document["steps"]] == list(PLAN)
    assert document["link"].endswith(run)
