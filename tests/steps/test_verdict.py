"""What an evaluate step decides, on records in a real store; only MLflow is replaced."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptl.config.run import Evaluate, Gate, Speed, Task
from ptl.config.schedule import Prune
from ptl.steps import evaluate
from ptl.steps.call import Call, Output
from ptl.steps.prune import prune
from ptl.steps.step import Step
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer, Record

REASONER = Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint"
CUT = "sha256:" + "c" * 64
DENSE = Pointer("file:///dense", "sha256:" + "d" * 64, params=100_000, original_params=100_000)
RULE = Gate(enabled=True)
PRUNE = Prune()
SCORES = {"tasks": [{"task": "t", "accuracy": 0.9, "low": 0.8, "high": 0.95, "items": 200}]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose dense model solved 200 of 200 items; its smallest cuts are 1,000 by neurons and 9,000 by layers."""
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path / "scratch"))
    run = SimpleNamespace(root=f"file://{tmp_path}/ptl", run="r", step="evaluate-1")
    (tmp_path / "scores").mkdir()
    items(tmp_path / "scores", right=200)
    files = store.publish(tmp_path / "scores", f"file://{tmp_path}/published")
    pointer = Pointer(f"file://{tmp_path}/published", digest_of(files))
    metadata = {"checkpoint": DENSE.__dict__, "smallest_cuts": {"neurons": 1_000, "layers": 9_000}}
    for name, where in (("evaluate-0", pointer), ("import-model", DENSE)):
        store.commit(run.root, run.run, name, Record("k", where, metadata))
    return run


def items(folder, right):
    lines = [
        json.dumps({"task": "t", "id": str(i), "prompt_digest": "p", "correct": int(i < right)}) for i in range(200)
    ]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")


def decided(run, folder, right, params, iteration=1, **prune):
    folder.mkdir(exist_ok=True)
    items(folder, right)
    candidate = Pointer("file:///cut", CUT, params=params, original_params=100_000)
    step = at_work(run, f"evaluate-{iteration}", candidate, Prune(**prune), fallback=DENSE)
    step.folder = folder
    return evaluate.decide(step, SCORES)


def at_work(run, name, candidate, prune=PRUNE, rule=RULE, **inputs):
    """A step that has scored, and decides now."""
    schedule = {"iterations": 3, "target": 0.4}
    call = Call(name, "ptl", {"seed": 0, "registered_model": "model"} | schedule, {"model": candidate, **inputs})
    step = Step(call, key={"gate": rule, "prune": prune} | schedule)
    step.run = run
    return step


def test_a_rejected_cut_is_halved_while_half_of_it_can_be_cut(run, tmp_path):
    told, onward = decided(run, tmp_path / "scored", right=150, params=96_000)
    assert told["decision"] == "rejected" and told["numbers"]["smallest_cut"] == 1_000
    assert onward.digest == DENSE.digest
    assert onward.gate == {"cap": 2_000, "rejections": 1, "stopped": False, "reason": ""}


def test_a_cut_of_one_step_is_not_tried_again(run, tmp_path):
    told, onward = decided(run, tmp_path / "scored", right=150, params=99_000)
    assert told["reason"].endswith("no smaller step left (the smallest cut is 1,000 parameters): stopped")
    assert onward.gate["stopped"]
    assert (
        onward.gate["reason"]
        == "the loop ended in iteration 1: no smaller step left (the smallest cut is 1,000 parameters)"
    )


def test_the_smallest_cut_is_that_of_the_next_iterations_unit(run, tmp_path):
    both = {"target": "neurons_then_layers"}
    first, _ = decided(run, tmp_path / "scored", right=150, params=84_000, **both)
    second, _ = decided(run, tmp_path / "scored", right=150, params=84_000, iteration=2, **both)
    smallest = [told["numbers"]["smallest_cut"] for told in (first, second)]
    assert smallest == [1_000, 9_000]
    assert "stopped" not in first["reason"] and "9,000 parameters): stopped" in second["reason"]


def test_an_accepted_checkpoint_is_registered_and_ends_the_loop_at_the_target(run, tmp_path, monkeypatch):
    registered = []  # a mock of the registry
    monkeypatch.setattr(evaluate.mlflow_objects, "register", lambda *given: registered.append(given[1:]) or "7")
    told, onward = decided(run, tmp_path / "scored", right=199, params=60_000)
    assert (told["decision"], onward.digest, onward.model_version) == ("accepted", CUT, "7")
    assert onward.gate["reason"] == "the loop ended in iteration 1: target reached"
    assert len(registered) == 1


def test_a_checkpoint_of_a_run_without_the_gate_is_registered_and_not_tested(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.mlflow_objects, "register", lambda *given: "7")  # a mock of the registry
    candidate = Pointer("file:///cut", CUT, params=60_000, original_params=100_000)
    told, onward = evaluate.decide(at_work(run, "evaluate-1", candidate, rule=Gate()), SCORES)
    assert told == {
        "decision": "gate off",
        "reason": "the gate is off",
        "numbers": {"params": 60_000, "target_params": 60_000},
    }
    assert (onward.digest, onward.model_version) == (CUT, "7")


def test_the_control_is_registered_too(run, tmp_path, monkeypatch):
    registered = []  # a mock of the registry
    monkeypatch.setattr(evaluate.mlflow_objects, "register", lambda *given: registered.append(given[1:]) or "8")
    candidate = Pointer("file:///cut", CUT, params=60_000, original_params=100_000)
    decision, onward = evaluate.decide(at_work(run, "control-evaluate", candidate), SCORES)
    assert decision["decision"] == "control" and (onward.digest, onward.model_version) == (CUT, "8")
    ((name, checkpoint, tags),) = registered
    assert (name, checkpoint, tags["step"], tags["arm"]) == ("model", candidate, "control-evaluate", "control")
    # As texts: what the version's page shows of its score.
    score = {"task": "t", "items": 200, "accuracy": "0.9", "low": "0.8", "high": "0.95", "share_removed": "0.4000"}
    assert score.items() <= tags.items()


def test_smallest_cuts_of_a_real_checkpoint():
    # 64 hidden, 3 matrices, 4 layers: a channel in every layer is 768 parameters
    assert evaluate.cuts_of(REASONER, Prune(width_multiple=1))["neurons"] == 768
    whole = evaluate.cuts_of(REASONER, Prune(width_multiple=8))
    assert whole["neurons"] == 8 * 768
    assert whole["layers"] == 3 * 64 * 192 + 64 * 64 * 3 + 2 * 64  # FFN, attention with half the key-value heads, norms
    assert "neurons" not in evaluate.cuts_of(REASONER, Prune(width_multiple=192))


@pytest.mark.parametrize(
    ("arm", "iteration", "stopped", "ends"),
    [
        ("loop", 0, False, False),
        ("loop", 1, False, False),
        ("loop", 2, True, True),
        ("loop", 3, False, True),
        ("control", 1, False, False),
    ],
)
def test_the_speed_is_measured_where_the_loop_ends(arm, iteration, stopped, ends):
    onward = Pointer("file:///cut", CUT, gate={"stopped": stopped})
    call = Call("control-evaluate" if arm == "control" else f"evaluate-{iteration}", "ptl")
    assert evaluate.ends_the_loop(call, 1 if arm == "control" else 3, onward) == ends


def test_why_speed_is_not_measured_is_told(run, monkeypatch):
    import torch

    final = Pointer("file:///cut", CUT)
    wanted = Evaluate(tasks=[Task(name="t")])
    off = Evaluate(tasks=[Task(name="t")], speed=Speed(repeats=0))
    step = at_work(run, "evaluate-1", final)
    assert evaluate.speed_beside_dense(step, DENSE, wanted) == {"reason": "the run ends with the dense model"}
    assert evaluate.speed_beside_dense(step, final, off) == {"reason": "evaluate.speed.repeats is 0"}

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(evaluate.tracking, "computing_beside", lambda run: [])
    monkeypatch.setattr(Step, "fetch", lambda step, pointer: pointer.uri)
    monkeypatch.setattr("ptl.evaluation.speed.side_by_side", full)  # a mock of a GPU that is too small
    told = evaluate.speed_beside_dense(step, final, wanted)
    assert told["reason"].startswith("the GPU does not hold the dense and the final model at once (CUDA out of memory")


def test_a_step_that_is_not_needed_says_why_and_passes_its_input_on(tmp_path, capsys):
    gate = {"cap": None, "rejections": 0, "stopped": True, "reason": "the loop ended in iteration 2: target reached"}
    pointer, out = Pointer("file:///cut", CUT, gate=gate), Output(tmp_path / "out")
    prune(Call("prune-3", "ptl", {}, {"model": pointer}, {"out": out}))
    assert out.path.read_text() == pointer.dump()
    assert out.metadata == {"uri": "file:///cut"}
    said = "ptl: prune-3: not needed, its input is passed through: the loop ended in iteration 2: target reached\n"
    assert capsys.readouterr().out == said
