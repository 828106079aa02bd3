"""What a step refuses before it does any work, and what it takes from its settings and hands on."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_records
from checkout import TINY
from working import OpenedError

from ptl.config import parameters
from ptl.config.data import Decontaminate
from ptl.config.recover import Recovery
from ptl.config.run import load_config
from ptl.config.schedule import plan
from ptl.errors import InputError, WorkError
from ptl.steps import answers, call, evaluate, import_model, prune, records, recover, report
from ptl.steps.call import Call, Key
from ptl.steps.step import Step
from ptl.storage.store import Pointer, Record

WANTED = load_config(TINY)
CONFIG = WANTED.model_dump(mode="json")
RUN = {
    "settings": parameters.structure(WANTED),
    **parameters.by_input(parameters.parameters(WANTED)),
}
RUN |= {"gated": WANTED.gate.enabled, "answered": False}  # as the import gets them
POINTER = Pointer("file:///recovered", "sha256:" + "c" * 64, params=9, original_params=9)
EVALUATE = {name: CONFIG[name] for name in ("prune", "chat", "evaluate", "seed")}
EVALUATE |= {"iterations": 4, "target": 0.4, "registered_model": "m"}


def gate(enabled):
    return CONFIG["gate"] | {"enabled": enabled}


def test_sampled_tasks_with_an_export_to_gguf_are_refused_by_the_import():
    """A run parameter may ask for samples after the config was checked."""
    exports = RUN["settings"] | {"export": [{"format": "gguf", "type": "f16"}]}
    settings = RUN | {"settings": exports, "evaluate": {"tasks": [{"name": "gsm8k", "samples": 2}]}}
    with pytest.raises(
        InputError, match=r"has samples, and answers of an export to gguf are greedy"
    ):
        import_model.import_model(Call("import-model", "e", settings))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("seed", 3_000_000_000, r"seed: .*2147483647"),
        ("recovery_tokens", 3, r"recovery_tokens=3 leaves"),
        ("registered_model", "team/model", r"storage\.registered_model: "),
        (
            "training",
            RUN["training"] | {"answers": "self"},
            r"training\.answers: self, but this pipeline was compiled",
        ),
    ],
)
def test_run_parameters_that_a_later_step_would_refuse_are_refused_by_the_import(name, value, told):
    with pytest.raises(InputError, match=told):
        import_model.import_model(Call("import-model", "e", RUN | {name: value}))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_parameter_that_switches_the_gate_is_refused_by_the_import(compiled):
    settings = RUN | {"gate": gate(not compiled), "gated": compiled, "answered": True}
    with pytest.raises(
        InputError,
        match=f"gate.enabled: {str(not compiled).lower()}, but this pipeline was compiled",
    ):
        import_model.import_model(Call("import-model", "e", settings))
    given = r"training\.answers: given, but .* compiled with another value.* --set training\.answers=given"
    with pytest.raises(InputError, match=given):
        import_model.import_model(Call("import-model", "e", settings | {"gated": not compiled}))


def test_mlflow_has_lengths_of_answers_and_pass_at_n():
    scores = run_records.scores(9, 0.5, 1)
    scores["tasks"][0] |= {"samples": 4, "pass_at_n": 0.75}
    shown = records.metrics({"scores": scores})
    found = [
        shown[f"tiny_reasoner/{name}"] for name in ("accuracy", "answer_tokens_p95", "pass_at_4")
    ]
    assert found == [0.5, 40, 0.75]
    assert "tiny_retention/pass_at_1" not in shown


@pytest.fixture
def key_of_step(monkeypatch):
    def opened(_call, *, key, reads=()):
        raise OpenedError(key)

    def key_of_step(module, work, step, settings, model):
        monkeypatch.setattr(module, "Step", opened)
        with pytest.raises(OpenedError) as caught:
            work(Call(step, "e", settings | {"iterations": 4, "seed": 7}, {"model": model}))
        return caught.value.args[0]

    return key_of_step


def test_a_prune_removes_its_share_of_the_dense_model(key_of_step):
    """Of 1,000 parameters, of which 900 are left, to 600 in four iterations."""
    for step, cuts, cap, goal in (
        ("prune-1", "uniform", None, 900),
        ("prune-3", "uniform", None, 700),
        ("prune-2", "cubic", None, 650),
        ("prune-2", "uniform", 30, 870),  # after a rejection
    ):
        changes = {"params": 900, "original_params": 1000, "chosen": {"hidden": 8}}
        model = dataclasses.replace(POINTER, **changes, gate={"cap": cap} if cap else {})
        settings = {"target": 0.4, "cuts": cuts} | {
            name: CONFIG[name] for name in ("prune", "chat", "calibration")
        }
        key = key_of_step(prune, prune.prune, step, settings, model)
        assert (key["goal"], key["end"], key["chosen"], key["unit"]) == (
            goal,
            600,
            {"hidden": 8},
            "width",
        )


def test_a_recovery_trains_on_its_share_of_the_tokens(key_of_step):
    for step, tokens, weights, share, skip in (
        ("recover-1", "doubling", (1, 2, 4, 8), 100, 0),
        ("recover-3", "doubling", (1, 2, 4, 8), 400, 300),
        ("recover-4", "uniform", (1, 1, 1, 1), 375, 1125),
    ):
        settings = {"recovery_tokens": 1500, "tokens": tokens}
        settings |= {name: CONFIG[name] for name in ("recover", "training", "chat")}
        key = key_of_step(recover, recover.recover, step, settings, POINTER)
        assert (key["tokens"], key["weights"], key["skip"], key["seed"]) == (
            share,
            weights,
            skip,
            7,
        )


def test_a_training_goes_on_where_mlflow_does_not_answer(monkeypatch, capfd):
    def fails(*_):
        raise WorkError("no answer")

    monkeypatch.setattr(recover.tracking, "log_metrics", fails)
    on_log = recover._reporter(SimpleNamespace(run=SimpleNamespace(step="recover-1")), 100)
    on_log({"loss": 1.5, "num_input_tokens_seen": 50}, 3)
    printed = capfd.readouterr().out
    assert (
        "warning: MLflow has no metrics of optimizer step 3: no answer" in printed
        and "loss 1.5" in printed
    )


def test_scores_outlive_what_is_done_with_them(monkeypatch, tmp_path):
    """MLflow may be away when an evaluation has taken hours."""
    made = []

    def evaluate_checkpoint(_src, dst, *_, **__):
        made.append(dst)
        (dst / "items.jsonl").write_text(f"{len(made)}")
        return POINTER  # any dataclass

    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path))
    monkeypatch.setattr("ptl.evaluation.evaluate.evaluate_checkpoint", evaluate_checkpoint)
    found = []
    for attempt, key in enumerate(["a" * 64, "a" * 64, "b" * 64]):
        step = Step(Call("evaluate-1", "e"), key=EVALUATE)
        step.folder = tmp_path / f"out-{attempt}"
        scores = evaluate._scored(step, Path(), key)
        found.append((step.folder / "items.jsonl").read_text())
        assert scores["params"] == POINTER.params
    assert found == ["1", "1", "2"]
    monkeypatch.setattr("ptl.recovery.answers.write_answers", evaluate_checkpoint)
    monkeypatch.setattr(Step, "fetch_model", lambda step: Path())
    for attempt in (3, 4):
        step = Step(
            Call("answers", "e", {}, {"model": POINTER}), key={"training": 0, "chat": 0, "seed": 0}
        )
        step.folder, step.key = tmp_path / f"out-{attempt}", Key("c" * 64, {})
        assert answers._written(step, None)["params"] == POINTER.params
    assert len(made) == 3


def test_a_report_needs_the_items_of_what_it_compares_and_no_others():
    wanted, other = POINTER, dataclasses.replace(POINTER, digest="sha256:" + "d" * 64)
    compared = {
        "evaluate-0": other,
        "evaluate-1": other,
        "evaluate-4": wanted,
        "control-evaluate": other,
    }

    def find(name):
        each = Call(name, "e")
        checkpoint = dataclasses.asdict(compared.get(name, other))
        metadata = {
            "stage": each.stage,
            "iteration": each.iteration,
            "arm": each.arm,
            "checkpoint": checkpoint,
        }
        return Record("k", POINTER, metadata) if name in compared else None

    step = SimpleNamespace(find=find, fetch_items=lambda _: ["item"])
    records = report._records(step, WANTED, wanted)
    assert {name: "items" in record.metadata for name, record in records.items()} == {
        "evaluate-0": True, "evaluate-1": False, "evaluate-4": True, "control-evaluate": True,
    }  # fmt: skip


def test_a_training_is_given_the_benchmarks_items_and_the_dense_model(monkeypatch, tmp_path):
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path))
    monkeypatch.setattr(recover.tracking, "tag", lambda *_: None)
    monkeypatch.setattr(Step, "committed", lambda _step, name: SimpleNamespace(pointer=name))
    monkeypatch.setattr(Step, "fetch", lambda _step, pointer: Path(pointer))
    data = WANTED.training.model_copy(update={"decontaminate": Decontaminate()})
    settings = {"training": data.model_dump(mode="json")}
    key = {"training": data, "chat": WANTED.chat, "seed": 5, "weights": (1, 2)}
    step = Step(Call("recover-2", "e", settings), key=key)
    step.run, step.key = SimpleNamespace(step="recover-2"), call.Key("0" * 64, {})
    iteration = plan(WANTED.schedule.model_copy(update={"iterations": 2}), WANTED.prune)[1]
    job = recover._job(step, Recovery(stages=[{"method": "distil"}]), iteration)
    assert (job.benchmark_items, job.teacher) == (Path("items"), Path("import-model"))
    assert (job.budget.tokens, job.budget.iteration, job.budget.last) == (iteration.tokens, 2, True)
    assert (job.budget.seed, job.budget.weights) == (5, (1, 2))
    assert recover._job(step, Recovery(stages=[{"method": "cpt"}]), iteration).teacher is None
    # Reinforcement learning keeps the rows' prompts, which have what is compared with.
    stages = [{"method": "distil"}, {"method": "grpo"}]
    distil, grpo = recover.with_prompts(Recovery(stages=stages), data).stages
    assert distil.prompts is None and grpo.prompts == data.sources[0]
    # Its own answers, which the text that is scored on may be too.
    step.settings["training"] = data.model_copy(update={"answers": "self"})
    own = recover._job(step, Recovery(stages=[{"method": "cpt"}]), iteration).data.sources
    assert [source.source for source in own] == ["answers/answers.jsonl"]
    assert answers.calibration(step, WANTED.calibration, WANTED.chat) is WANTED.calibration
    scored = WANTED.calibration.model_copy(update={"answers": "self"})
    assert answers.calibration(step, scored, WANTED.chat).data == own
    assert (answers.reads(scored), answers.reads(data)) == (["answers"], [])
