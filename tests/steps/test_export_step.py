"""The export step with a mock of a format: attempts that were killed, and a run that ends with the dense model."""

import dataclasses
import json
import uuid
from types import SimpleNamespace
from unittest import mock

import pytest
from checkout import TINY
from run_records import scores
from working import execute, run_locally

from ptl.config.dag import export_step
from ptl.config.export import Export
from ptl.config.run import Evaluate, Gate, check, load_config
from ptl.errors import InputError
from ptl.evaluation.scoring import TaskScore
from ptl.export import formats
from ptl.lineage import tracking
from ptl.steps.call import Call, Output
from ptl.steps.export import _pairs, export
from ptl.storage import store
from ptl.storage.store import Pointer

CONFIG = load_config(TINY).model_dump(mode="json")
FORM = {"format": "compressed-tensors", "type": "fp8"}
SCORE = TaskScore(
    task="t", version=1, metric="exact_match", accuracy=0.5, low=0.1, high=0.9, items=2, num_fewshot=0, truncated=0.0,
    code_timeouts=0, cut_prompts=0.0, higher_is_better=True, seconds=1.0, answer_tokens=1.0, answer_tokens_p95=1.0,
)  # fmt: skip


def item(id, correct):
    return {"task": "t", "id": id, "prompt_digest": id, "correct": correct}


@pytest.fixture
def run(tmp_path, mlflow_folder, monkeypatch):
    """A pipeline run whose dense and final model were evaluated; a function that exports the final one."""
    run_locally(monkeypatch, tmp_path, mlflow_folder)
    experiment = f"export-{uuid.uuid4().hex[:8]}"

    def done(step, parent, files, metadata):
        def work(_src, dst, _run):
            for name, text in files.items():
                (dst / name).write_text(text)
            return metadata

        return execute(Call(step, experiment), parent, {}, work).pointer

    def evaluated(name, evaluation, data, corrects):
        model = done(name, None, {"model.safetensors": data, "config.json": "{}"}, {"params": 9})
        lines = [json.dumps(item(str(i), correct)) + "\n" for i, correct in enumerate(corrects)]
        metadata = dict.fromkeys(("checkpoint", "accepted"), dataclasses.asdict(model))
        metadata |= {"scores": scores(9, 0.5, 1), "verdict": {"decision": "gate off", "reason": ""}}
        done(evaluation, model, {"items.jsonl": "".join(lines)}, metadata)
        return model

    dense = evaluated("import-model", "evaluate-0", "dense", [1, 1])
    final = evaluated("prune-1", "evaluate-1", "final", [1, 0])

    def step(model=final, **form):
        settings = {
            name: CONFIG[name] for name in ("calibration", "chat", "evaluate", "gate", "seed")
        }
        settings |= {"iterations": 1, "export": FORM | form}
        outputs = {name: Output(tmp_path / name) for name in ("out", "metrics")}
        name = export_step(Export(**FORM | form))
        export(Call(name, experiment, settings, {"model": model, "dense": dense}, outputs))
        record = store.committed(f"file://{tmp_path}/artifacts/ptl", tracking.pipeline_run(), name)
        return record.metadata, store.fetch(
            Pointer.load((tmp_path / "out").read_text()), tmp_path / "fetched"
        )

    step.dense = dense
    return step


@pytest.fixture
def writes(monkeypatch):
    """The data of the checkpoints whose forms were written, one after the other; the second attempt is killed.

    The checkpoint whose data is `refused` has no form.
    """
    state = SimpleNamespace(written=[], refused=None)

    def write(src, dst, *_):
        assert list(dst.iterdir()) == []  # as llmcompressor's output is moved to its place
        state.written.append((src / "model.safetensors").read_text())
        (dst / "model.safetensors").write_text(state.written[-1])
        (dst / "tokenizer.json").write_text("{}")
        if state.written == ["dense", "final"]:
            raise KeyboardInterrupt
        return [f"a note on the {state.written[-1]}"]

    def check(src, _type):
        if (src / "model.safetensors").read_text() == state.refused:
            raise InputError("a width of 80", field="export")

    nothing = mock.Mock(return_value={"reason": "a mock"})
    module = SimpleNamespace(check=check, write=write, language_model=nothing, speed=nothing)
    monkeypatch.setattr(formats, "module_of", lambda _: module)

    def score(_lm, settings, _seed):
        return (SCORE,), [item("0", 1), item("1", 0)][: settings.tasks[0].limit]

    monkeypatch.setattr("ptl.evaluation.evaluate.score_tasks", score)
    return state


def test_after_an_attempt_that_was_killed_the_forms_of_both_models_are_written_again(run, writes):
    writes.refused = "final"
    with pytest.raises(InputError, match="a width of 80"):
        run()
    assert writes.written == []  # both models are checked before the first form is written
    writes.refused = None
    with pytest.raises(KeyboardInterrupt):
        run()
    metadata, folder = run()
    assert writes.written == ["dense", "final"] * 2
    assert (folder / "model.safetensors").read_bytes() == b"final" and metadata["notes"] == [
        "a note on the final"
    ]
    assert metadata["scored"] == {"dense": "evaluate-0", "final": "evaluate-1"}
    differences = {name: pair["difference"] for name, pair in metadata["pairs"]["t"].items()}
    assert differences == {"dense": -0.5, "final": 0.0, "dense_export": 0.0}
    run()
    assert len(writes.written) == 4  # done before


def test_a_run_that_ends_with_the_dense_model_has_one_form(run, writes):
    metadata, _ = run(run.dense)
    assert writes.written == ["dense"] and list(metadata["models"]) == ["final"]
    assert metadata["scored"] == {"dense": "evaluate-0", "final": "evaluate-0"}
    # of the weights
    assert metadata["bytes"] == len(b"dense") == metadata["models"]["final"]["bytes"]
    assert metadata["speed"] == {"reason": "a mock"}
    assert {name: pair["items"] for name, pair in metadata["pairs"]["t"].items()} == {
        "dense": 2,
        "final": 2,
    }
    # With a limit the first items are compared with the same of the loop.
    metadata, _ = run(run.dense, limit=1)
    items = {
        name: (pair["items"], pair["candidate"]) for name, pair in metadata["pairs"]["t"].items()
    }
    assert items == {"dense": (1, 1.0), "final": (1, 1.0)}


def test_a_limit_takes_no_item_beyond_the_runs_and_benchmarks_share_the_significance_level():
    for own, limit, expected in [(None, 5, 5), (3, 5, 3), (7, 5, 5), (7, None, 7)]:
        evaluate = check(Evaluate, {"tasks": [{"name": "gsm8k", "limit": own}]}, "evaluate")
        assert formats.limited(evaluate, limit).tasks[0].limit == expected, (own, limit)
    outcomes = [item("0", 1), item("1", 0)]
    outcomes += [each | {"task": "u"} for each in outcomes]
    pairs = _pairs(
        {"final": outcomes, "dense": outcomes}, {"dense": outcomes}, Gate(alpha=0.05, margin=0.02)
    )
    assert [list(pairs[task]) for task in ("t", "u")] == [["dense", "dense_export"]] * 2
    assert {pair["alpha"] for task in pairs.values() for pair in task.values()} == {0.025}
