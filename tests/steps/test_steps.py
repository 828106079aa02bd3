"""What a step refuses before it does any work: it is compiled for a gate that is on or off, and needs its records."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptl.config.run import load_config
from ptl.config.schedule import MemoryGoal
from ptl.errors import InputError, WorkError
from ptl.lineage.run_status import StepRun
from ptl.steps import call, evaluate, import_model, recover, reporting
from ptl.steps.call import Call, Output
from ptl.steps.step import Step
from ptl.storage.store import Pointer, pointer_of

ROOT = Path(__file__).parents[2]
TINY = load_config(ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml")
CONFIG = TINY.model_dump(mode="json")
SCHEDULE = {name: CONFIG["schedule"][name] for name in call.SCHEDULE}
POINTER = Pointer("file:///recovered", "sha256:" + "c" * 64, params=9, original_params=9)


def gate(enabled):
    return CONFIG["gate"] | {"enabled": enabled}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_import_refuses_a_run_parameter_that_switches_the_gate(compiled, tmp_path):
    sections = {name: CONFIG[name] for name in ("prune", "calibration", "training", "evaluate")}
    settings = {**SCHEDULE, **sections, "model": "nowhere", "revision": "", "run_name": "r"}
    settings |= {"gate": gate(not compiled), "gated": compiled}
    with pytest.raises(InputError, match=f"gate.enabled: {str(not compiled).lower()}, but this pipeline was compiled"):
        import_model.import_model(Call("import-model", "e", settings))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_evaluation_refuses_it_too(compiled, tmp_path):
    """Its fallback is what the compiled pipeline has with the gate on."""
    inputs = {"model": POINTER} | ({"fallback": POINTER} if compiled else {})
    settings = {
        **{name: CONFIG[name] for name in ("prune", "evaluate", "seed")},
        **{"iterations": 4, "target": 0.4, "registered_model": "m", "gate": gate(not compiled)},
    }
    outputs = {name: Output(tmp_path / name) for name in ("accepted", "metrics")}
    with pytest.raises(InputError, match=r"compile and submit it again"):
        evaluate.evaluate(Call("evaluate-1", "e", settings, inputs, outputs))


class ScoredError(Exception):
    """The step has scored, and would decide now."""


@pytest.mark.parametrize(("step", "warned"), [("evaluate-0", True), ("evaluate-1", False)])
def test_dense_answers_that_hit_the_token_limit_are_a_warning_before_anything_is_pruned(
    step, warned, monkeypatch, capsys
):
    def decide(*_):
        raise ScoredError

    names = [{"task": "short", "truncated": 0.21}, {"task": "long", "truncated": 0.2}]
    monkeypatch.setattr(Call, "start", lambda *_: SimpleNamespace(step=step))
    monkeypatch.setattr(Step, "_open", lambda self: None)
    monkeypatch.setattr(Step, "fetch", lambda self, pointer: None)
    monkeypatch.setattr(reporting, "note_error", lambda *_: None)
    monkeypatch.setattr(evaluate, "_scores", lambda *_: {"tasks": names})
    monkeypatch.setattr(evaluate, "decide", decide)
    settings = {
        **{name: CONFIG[name] for name in ("prune", "evaluate", "seed")},
        **{"iterations": 4, "target": 0.4, "registered_model": "m", "gate": gate(False)},
    }
    with pytest.raises(ScoredError):
        evaluate.evaluate(Call(step, "e", settings, {"model": POINTER}))
    said = capsys.readouterr().out
    assert ("warning: 21% of the dense model's answers on short hit the token limit" in said) == warned
    assert ("max_new_tokens" in said) == warned and "long" not in said


@pytest.mark.parametrize("missing", ["import-model", "items"])
def test_a_recovery_without_a_record_that_it_needs_is_an_error(missing, tmp_path, monkeypatch):
    """The teacher's of a distillation, and that of the benchmarks' items."""
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path / "scratch"))
    step = Step(Call("recover-1", "e"), key={})
    step.run = SimpleNamespace(root=f"file://{tmp_path}/ptl", run="r")
    with pytest.raises(WorkError, match=f"run r: the record of {missing} is gone, .* run the same command again"):
        step.committed(missing)


def test_a_goal_s_parameters_travel_with_the_checkpoints():
    settings = {"iterations": 4, "target": 0, "cuts": "cubic"}
    goal = {"memory": "300kB", "tokens": 10}
    imported = call.schedule_of(Call("import-model", "e", settings | {"goal": goal}))
    assert imported.target == MemoryGoal(memory="300kB", tokens=10)
    handed_on = import_model._goal(imported, TINY.prune, ROOT / "examples/tiny_reasoner/checkpoint")
    assert handed_on["target_params"] == 147_440 and handed_on["goal"]["bytes"] == 300_000
    assert import_model._goal(TINY.schedule, TINY.prune, Path("nowhere")) == {}

    pointer = dataclasses.replace(POINTER, target_params=handed_on["target_params"])
    for step in ("prune-1", "control-prune", "evaluate-2"):
        assert call.schedule_of(Call(step, "e", settings, {"model": pointer})).target == 147_440
    assert pointer_of(dataclasses.asdict(pointer)) == Pointer.load(pointer.dump()) == pointer
    with pytest.raises(InputError, match=r"target: 0: Input should be greater than 0"):
        call.schedule_of(Call("prune-1", "e", settings, {"model": POINTER}))  # imported without a goal
    with pytest.raises(InputError, match=r"^target: 0\.3, and the run has the goal .* set target to 0, or goal"):
        call.schedule_of(Call("import-model", "e", settings | {"goal": goal, "target": 0.3}))
    assert call.schedule_settings(settings | {"goal": {}, "target": 0.3})["target"] == 0.3


def test_cut_sequences_of_all_stages_are_counted_and_said(capsys):
    chain = [{"sequences": 40, "cut_sequences": 3, "passes": 0.5}, {"rewards": []}]
    chain.append({"sequences": 60, "cut_sequences": 4, "passes": 2.5})
    assert recover.sequence_counts("recover-1", chain) == {"sequences": 100, "cut_sequences": 7, "passes": 2.5}
    assert capsys.readouterr().out.endswith("recover-1: 7 of 100 sequences were cut at recover.max_length\n")
    whole = [{"sequences": 40, "cut_sequences": 0, "passes": 0.1}]
    assert recover.sequence_counts("recover-1", whole) == {"sequences": 40, "cut_sequences": 0, "passes": 0.1}
    assert recover.sequence_counts("recover-1", [{"rewards": []}]) == {}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", ["prune", "recover"])
def test_each_step_knows_its_share_of_the_schedule(stage):
    """Prune is given the sizes, recover the tokens: what they compute is what the whole schedule says."""
    given = {
        "prune": ("iterations", "target", "cuts"),
        "recover": ("iterations", "recovery_tokens", "tokens"),
    }[stage]
    knows = Call(f"{stage}-2", "e", {name: SCHEDULE[name] for name in given})
    part = call.iterations_until(2, call.schedule_of(knows), TINY.prune)[-1]
    whole = call.iterations_until(2, call.schedule_of(Call("prune-2", "e", SCHEDULE)), TINY.prune)[-1]
    for field in {"prune": ("cut", "progress", "unit"), "recover": ("tokens", "tokens_before", "last")}[stage]:
        assert getattr(part, field) == getattr(whole, field)


def test_kubeflows_table_of_metrics_leads_to_mlflow(monkeypatch):
    task = {"accuracy": 0.9, "low": None, "high": None, "items": 10}
    scores = {"tasks": [task], "params": 9}
    metadata = {"scores": scores, "verdict": {"decision": "accepted"}}
    run = StepRun("4f", "2a", "7", "file:///root", "tiny-1", "file:///files", "evaluate-0", "loop")
    shown = {"accuracy": 0.9, "items": 10, "params": 9, "verdict": "accepted"}
    monkeypatch.setenv("PTL_MLFLOW_UI", "https://mlflow.example.com/")  # of a cluster, in whose MLflow this run is not
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert reporting.kubeflow_metrics(metadata, run) == shown
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.ptl.svc:5000")
    page = "https://mlflow.example.com/#/experiments/7/runs/4f?workflowType=machine_learning"
    assert reporting.kubeflow_metrics(metadata, run) == shown | {"mlflow": page}
