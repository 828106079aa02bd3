"""What an evaluate step decides, on records in a real store; only MLflow is replaced."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from checkout import DENSE, TINY
from working import OpenedError

from ptl.config.run import Gate, load_config
from ptl.config.schedule import Prune
from ptl.model.dimensions import smallest_cuts, static_cost
from ptl.steps import evaluate
from ptl.steps.call import Call, Output, key_of
from ptl.steps.prune import prune
from ptl.steps.step import Step
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer, Record

CUT = "sha256:" + "c" * 64
IMPORTED = Pointer("file:///dense", "sha256:" + "d" * 64, params=100_000, original_params=100_000)
RULE = Gate(enabled=True)
PRUNE = Prune()
SMALLEST = {"smallest_cuts": {"neurons": 1_000, "width": 1_000, "layers": 9_000}}
SCORES = {
    "tasks": [{"task": "t", "accuracy": 0.9, "low": 0.8, "high": 0.95, "items": 200}],
    "retention": {"texts": "x", "bytes": 20, "tokens": [10, 10], "losses": [10.0, 12.0]},
}


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """A run whose steps have scored 200 items; a function that commits one: name, checkpoint, right answers."""
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path / "scratch"))
    run = SimpleNamespace(root=f"file://{tmp_path}/ptl", run="r", step="evaluate-1")

    def scored(name, checkpoint, right):
        (tmp_path / name).mkdir()
        items(tmp_path / name, right)
        location = f"file://{tmp_path}/published/{name}"
        files = Pointer(location, digest_of(store.publish(tmp_path / name, location)))
        metadata = {"checkpoint": checkpoint.__dict__, "scores": SCORES, **SMALLEST}
        store.commit(run.root, run.run, name, Record("k", files, metadata))

    scored.run = run
    return scored


@pytest.fixture
def run(scored):
    """A run whose dense model solved all items; its smallest cuts are 1,000 by neurons and 9,000 by layers."""
    scored("evaluate-0", IMPORTED, 200)
    store.commit(scored.run.root, "r", "import-model", Record("k", IMPORTED, SMALLEST))
    return scored.run


def items(folder, right):
    rows = [
        {"task": "t", "id": str(i), "prompt_digest": "p", "correct": int(i < right)}
        for i in range(200)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def decided(run, tmp_path):
    """Verdict and what the loop continues with, for a candidate of so many parameters and right answers."""

    def decide(
        right, params, iteration=1, fallback=IMPORTED, rule=RULE, losses=(10.0, 12.0), **prune
    ):
        items(tmp_path, right)
        step = at_work(
            run, f"evaluate-{iteration}", pruned(params), Prune(**prune), rule, fallback=fallback
        )
        step.folder = tmp_path
        return evaluate.decide(
            step, DENSE, SCORES | {"retention": SCORES["retention"] | {"losses": [*losses]}}
        )

    return decide


@pytest.fixture
def registered(monkeypatch):
    """What was registered, in a mock of the registry."""
    calls = []
    monkeypatch.setattr(
        evaluate.mlflow_objects, "register", lambda *given: calls.append(given[1:]) or "7"
    )
    return calls


def pruned(params):
    return Pointer("file:///cut", CUT, params=params, original_params=100_000)


def at_work(run, name, candidate, prune=PRUNE, rule=RULE, registered_model="model", **inputs):
    """A step that has scored, and decides now."""
    schedule = {"iterations": 3, "target": 0.4}
    call = Call(
        name,
        "ptl",
        {"seed": 0, "registered_model": registered_model} | schedule,
        {"model": candidate, **inputs},
    )
    step = Step(call, key={"gate": rule, "prune": prune} | schedule)
    step.run = run
    return step


def test_what_forgets_other_text_is_rejected(decided, registered):
    """Its perplexity is 1.35 times the dense model's."""
    for limit, decision in ((1.3, "rejected"), (1.4, "accepted")):
        rule = RULE.model_copy(update={"retention": limit})
        verdict, _ = decided(right=200, params=96_000, rule=rule, losses=(13.0, 15.0))
        assert verdict["decision"] == decision


def test_a_rejected_cut_is_halved_while_the_next_iterations_unit_can_be_cut_by_half(decided):
    verdict, onward = decided(right=150, params=96_000)
    assert verdict["decision"] == "rejected" and verdict["numbers"]["smallest_cut"] == 1_000
    assert onward.digest == IMPORTED.digest
    assert onward.gate == {"cap": 2_000, "rejections": 1, "stopped": False, "reason": ""}
    verdict, onward = decided(right=150, params=99_000)
    why = "no smaller step left (the smallest cut is 1,000 parameters)"
    assert verdict["reason"].endswith(f"{why}: stopped") and onward.gate["stopped"]
    assert onward.gate["reason"] == f"the loop ended in iteration 1: {why}"
    unit = {"target": "neurons_then_layers"}
    first, second, third = (decided(150, 84_000, iteration, **unit)[0] for iteration in (1, 2, 3))
    assert [each["numbers"]["smallest_cut"] for each in (first, second, third)] == [
        1_000,
        9_000,
        9_000,
    ]
    assert "stopped" not in first["reason"] and "9,000 parameters): stopped" in second["reason"]


def test_a_rejected_width_is_not_tried_again_where_half_of_its_cut_is_rounded_up_to_the_whole():
    dense = evaluate._dimensions(DENSE)  # 64 hidden, 192 neurons, 2 KV heads
    prune = Prune(width_multiple=8)
    parent = {
        "smallest_cuts": smallest_cuts(dense, 8),
        "scores": dataclasses.asdict(static_cost(DENSE)),
    }
    for hidden, neurons, smallest in ((56, 192, None), (48, 192, 6144), (64, 176, 6144)):
        sizes = dataclasses.replace(dense, hidden=hidden, width=neurons)
        # All neurons stay to the end, but where some go: then these go one by one.
        end = {"hidden": 32, "width": 192 if neurons == 192 else 64, "kv_heads": 1, "experts": 0}
        candidate = Pointer("file:///cut", CUT, params=sizes.params, chosen=end)
        cut = evaluate._smallest_cut(candidate, DENSE, prune, parent, "width")
        assert cut == (smallest or dense.params - sizes.params), sizes
    assert (
        evaluate._smallest_cut(candidate, DENSE, prune, parent, "layers")
        == parent["smallest_cuts"]["layers"]
    )


def test_each_candidate_is_compared_with_the_dense_model_and_with_its_parent(decided, scored):
    """A fall in two small steps: neither is one against the parent."""
    parent = Pointer("file:///parent", "sha256:" + "e" * 64, params=90_000, original_params=100_000)
    scored("evaluate-1", parent, 194)
    verdict, accepted = decided(right=190, params=80_000, iteration=2, fallback=parent)
    assert (verdict["decision"], accepted.digest) == ("rejected", parent.digest)
    assert [verdict["numbers"][name]["regressions"] for name in ("baseline", "parent")] == [10, 4]
    assert "against the baseline" in verdict["reason"]


def test_an_accepted_checkpoint_is_registered_and_ends_the_loop_at_the_target(decided, registered):
    verdict, onward = decided(right=199, params=60_000)
    assert (verdict["decision"], onward.digest, onward.model_version) == ("accepted", CUT, "7")
    assert (
        onward.gate["reason"] == "the loop ended in iteration 1: target reached"
        and len(registered) == 1
    )
    assert not decided(right=199, params=60_001)[1].gate["stopped"]


def test_without_the_gate_and_in_the_control_checkpoints_are_registered_and_not_tested(
    run, registered
):
    candidate = pruned(60_000)
    verdict, onward = evaluate.decide(
        at_work(run, "evaluate-1", candidate, rule=Gate()), DENSE, SCORES
    )
    numbers = {"params": 60_000, "target_params": 60_000}
    assert verdict == {"decision": "gate off", "reason": "the gate is off", "numbers": numbers}
    assert (onward.digest, onward.model_version) == (CUT, "7")
    verdict, onward = evaluate.decide(at_work(run, "control-evaluate", candidate), DENSE, SCORES)
    assert verdict["decision"] == "control" and (onward.digest, onward.model_version) == (CUT, "7")
    name, checkpoint, tags = registered[-1]
    assert (name, checkpoint, tags["step"], tags["arm"]) == (
        "model",
        candidate,
        "control-evaluate",
        "control",
    )
    # As texts: what the version's page shows of its score.
    score = {
        "task": "t",
        "items": 200,
        "accuracy": "0.9",
        "low": "0.8",
        "high": "0.95",
        "share_removed": "0.4000",
    }
    assert score.items() <= tags.items()
    verdict, onward = evaluate.decide(at_work(run, "evaluate-0", IMPORTED), DENSE, SCORES)
    assert verdict["decision"] == "baseline" and onward == IMPORTED and len(registered) == 2


def test_without_a_name_in_the_registry_nothing_is_registered(run, registered):
    step = at_work(run, "evaluate-1", pruned(60_000), rule=Gate(), registered_model="")
    _, onward = evaluate.decide(step, DENSE, SCORES)
    assert (onward.digest, onward.model_version, registered) == (CUT, "", [])


def test_smallest_cuts_of_a_real_checkpoint():
    dense = evaluate._dimensions(DENSE)
    # 64 hidden, 3 matrices, 4 layers: a channel in every layer is 768 parameters
    assert smallest_cuts(dense, 1)["neurons"] == 768
    whole = smallest_cuts(dense, 8)
    assert whole["neurons"] == 8 * 768
    # FFN, attention with half the key-value heads, norms
    assert whole["layers"] == 3 * 64 * 192 + 64 * 64 * 3 + 2 * 64
    assert "neurons" not in smallest_cuts(dense, 192)
    # A small step of width is one of the FFN, which takes what the other sizes leave.
    assert whole["width"] == whole["neurons"]


def test_the_speed_is_measured_where_the_loop_ends_and_a_later_step_passes_its_input_on(tmp_path):
    for step, iterations, stopped, ends in [
        ("evaluate-0", 3, False, False),
        ("evaluate-1", 3, False, False),
        ("evaluate-2", 3, True, True),
        ("evaluate-3", 3, False, True),
        ("control-evaluate", 1, False, False),
    ]:
        onward = Pointer("file:///cut", CUT, gate={"stopped": stopped})
        assert evaluate.ends_the_loop(Call(step, "ptl"), iterations, onward) == ends, step
    pointer, out = (
        Pointer("file:///cut", CUT, gate={"stopped": True, "reason": "it ended"}),
        Output(tmp_path / "out"),
    )
    prune(Call("prune-3", "ptl", {}, {"model": pointer}, {"out": out}))
    assert out.path.read_text() == pointer.dump() and out.metadata == {"uri": "file:///cut"}


def test_a_verdict_depends_on_the_state_of_the_gate(monkeypatch):
    """The same candidate is judged anew where the gate had another cap."""
    keys = []

    def opened(_call, *, key):
        keys.append(key_of("", key).digest)
        raise OpenedError

    monkeypatch.setattr(evaluate, "Step", opened)
    config = load_config(TINY).model_dump(mode="json")
    settings = {name: config[name] for name in ("evaluate", "chat", "prune", "seed")} | {
        "gate": {"enabled": True}
    }
    settings |= {"iterations": 3, "target": 0.4}
    for cap in (1_000, 1_000, 2_000):
        inputs = {
            "model": Pointer("file:///cut", CUT),
            "fallback": dataclasses.replace(IMPORTED, gate={"cap": cap}),
        }
        with pytest.raises(OpenedError):
            evaluate.evaluate(Call("evaluate-2", "e", settings, inputs))
    assert keys[0] == keys[1] != keys[2]
