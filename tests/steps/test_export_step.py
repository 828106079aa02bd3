"""The export step with a mock of a format: attempts that were killed, and a run that ends with the dense model."""

import dataclasses
import json
import uuid
from types import SimpleNamespace

import pytest
from run_records import scores
from working import execute

from ptl.config.dag import export_step
from ptl.config.export import Export
from ptl.config.run import Evaluate, check, load_config
from ptl.errors import InputError
from ptl.evaluation.scoring import TaskScore
from ptl.export import formats
from ptl.lineage import tracking
from ptl.steps.call import Call, Output
from ptl.steps.export import export
from ptl.storage import store
from ptl.storage.store import Pointer

CONFIG = load_config("pipelines/prune_tune_loop/configs/tiny.yaml").model_dump(mode="json")
FORM = {"format": "compressed-tensors", "type": "fp8"}
SCORE = TaskScore(
    task="t", version=1, metric="exact_match", accuracy=0.5, low=0.1, high=0.9, items=2, num_fewshot=0, truncated=0.0,
    code_timeouts=0, cut_prompts=0.0, higher_is_better=True, seconds=1.0, answer_tokens=1.0,
)  # fmt: skip


def item(id, correct):
    return {"task": "t", "id": id, "prompt_digest": id, "correct": correct}


@pytest.fixture
def run(tmp_path, mlflow_folder, monkeypatch):
    """A pipeline run whose dense and final model were evaluated; a function that exports the final one."""
    for name in ("KFP_RUN_ID", "PTL_RETRIES", "PTL_LAUNCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_folder}/mlflow.db")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/artifacts")
    monkeypatch.setenv("PTL_RUN_ID", f"run-{uuid.uuid4().hex[:8]}")
    monkeypatch.setenv("PTL_SCRATCH", str(tmp_path / "scratch"))
    experiment = f"export-{uuid.uuid4().hex[:8]}"

    def model(step, data):
        def work(_src, dst, _run):
            (dst / "model.safetensors").write_bytes(data)
            (dst / "config.json").write_text("{}")
            return {"params": 9}

        return execute(Call(step, experiment), None, {}, work).pointer

    def evaluate(step, checkpoint, corrects):
        def work(_src, dst, _run):
            lines = [json.dumps(item(str(i), correct)) + "\n" for i, correct in enumerate(corrects)]
            (dst / "items.jsonl").write_text("".join(lines))
            passed_on = dataclasses.asdict(checkpoint)
            verdict = {"decision": "gate off", "reason": ""}
            return {"scores": scores(9, 0.5, 1), "checkpoint": passed_on, "accepted": passed_on, "verdict": verdict}

        execute(Call(step, experiment), checkpoint, {}, work)

    dense, final = model("import-model", b"dense"), model("prune-1", b"final")
    evaluate("evaluate-0", dense, [1, 1])
    evaluate("evaluate-1", final, [1, 0])

    def step(model=final, **form):
        settings = {name: CONFIG[name] for name in ("calibration", "evaluate", "gate", "seed")}
        settings |= {"iterations": 1, "export": FORM | form}
        outputs = {name: Output(tmp_path / name) for name in ("out", "metrics")}
        name = export_step(Export(**FORM | form))
        export(Call(name, experiment, settings, {"model": model, "dense": dense}, outputs))
        record = store.committed(f"file://{tmp_path}/artifacts/ptl", tracking.pipeline_run(), name)
        return record.metadata, store.fetch(Pointer.load((tmp_path / "out").read_text()), tmp_path / "fetched")

    step.dense = dense
    return step


class Written(list):
    """Data of checkpoints, and that of the one whose form is refused."""


@pytest.fixture
def writes(monkeypatch):
    """The data of the checkpoints whose forms were written, one after the other; the second attempt is killed."""
    written = Written()

    def write(src, dst, *_):
        # As llmcompressor's output is moved to its place.
        assert list(dst.iterdir()) == []
        data = (src / "model.safetensors").read_bytes()
        written.append(data.decode())
        (dst / "model.safetensors").write_bytes(data)
        (dst / "tokenizer.json").write_text("{}")
        if written == ["dense", "final"] and not written.refused:
            raise KeyboardInterrupt
        return ["a note on the " + data.decode()]

    def nothing(*_):
        return {"reason": "a mock"}

    def check(src, _type):
        if (src / "model.safetensors").read_bytes() == written.refused:
            raise InputError("a width of 80", field="export")

    written.refused = None
    module = SimpleNamespace(check=check, write=write, language_model=nothing, speed=nothing)
    monkeypatch.setattr(formats, "module_of", lambda _: module)
    outcomes = [item("0", 1), item("1", 0)]

    def score(_lm, settings, _seed):
        return (SCORE,), outcomes[: settings.tasks[0].limit]

    monkeypatch.setattr("ptl.evaluation.evaluate.score_tasks", score)
    return written


def test_after_an_attempt_that_was_killed_the_forms_of_both_models_are_written_again(run, writes):
    with pytest.raises(KeyboardInterrupt):
        run()
    metadata, folder = run()
    assert writes == ["dense", "final"] * 2
    assert (folder / "model.safetensors").read_bytes() == b"final"
    assert metadata["notes"] == ["a note on the final"]
    assert metadata["scored"] == {"dense": "evaluate-0", "final": "evaluate-1"}
    differences = {name: pair["difference"] for name, pair in metadata["pairs"]["t"].items()}
    assert differences == {"dense": -0.5, "final": 0.0, "dense_export": 0.0}
    run()
    assert len(writes) == 4  # done before


def test_both_models_are_checked_before_the_first_form_is_written(run, writes):
    writes.refused = b"final"
    with pytest.raises(InputError, match="a width of 80"):
        run()
    assert writes == []


def test_a_run_that_ends_with_the_dense_model_has_one_form(run, writes):
    metadata, _ = run(run.dense)
    assert writes == ["dense"] and list(metadata["models"]) == ["final"]
    assert metadata["scored"] == {"dense": "evaluate-0", "final": "evaluate-0"}
    assert list(metadata["pairs"]["t"]) == ["dense", "final"]


def test_with_a_limit_the_first_items_are_compared_with_the_same_of_the_loop(run, writes):
    metadata, _ = run(run.dense, limit=1)
    items = {name: (pair["items"], pair["candidate"]) for name, pair in metadata["pairs"]["t"].items()}
    assert items == {"dense": (1, 1.0), "final": (1, 1.0)}


@pytest.mark.parametrize(("own", "limit", "expected"), [(None, 5, 5), (3, 5, 3), (7, 5, 5), (7, None, 7)])
def test_a_limit_takes_no_item_that_the_run_does_not_score(own, limit, expected):
    evaluate = check(Evaluate, {"tasks": [{"name": "gsm8k", "limit": own}]}, "evaluate")
    (task,) = formats.limited(evaluate, limit).tasks
    assert task.limit == expected


def test_a_form_that_is_not_timed_says_so(run, writes):
    assert run(run.dense)[0]["speed"] == {"reason": "a mock"}


def test_the_bytes_of_a_form_are_those_of_its_weights(run, writes):
    metadata, _ = run(run.dense)
    assert metadata["bytes"] == len(b"dense") == metadata["models"]["final"]["bytes"]
