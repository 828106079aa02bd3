from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ptl.config.run import Evaluate, Speed, Task
from ptl.evaluation import speed
from ptl.evaluation.scoring import TaskScore

ROOT = Path(__file__).resolve().parents[2]
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"
YAML = str(ROOT / "examples/tiny_reasoner/tiny_reasoner.yaml")

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """A mock model that only notes when it is called, and with what."""

    def __init__(self, name, calls):
        import torch

        self.name, self.calls, self.device = name, calls, torch.device("cpu")
        self.config = type("Config", (), {"vocab_size": 11})

    def forward(self, input_ids, cache=None, **kwargs):
        raise AssertionError("only its signature is read")

    def __call__(self, input_ids, cache=None, **kwargs):
        import torch

        self.calls.append((self.name, tuple(input_ids.shape), cache))
        past = "past"
        return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 11), "past_key_values": past})


def measured(models, **settings):
    timers = {model.name: partial(speed._time_once, model, 0) for model in models}
    return speed.measure_in_turns(timers, Speed(**settings))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(Speed, "prompt_tokens", 5)
    monkeypatch.setattr(Speed, "new_tokens", 3)


def test_models_take_turns_and_the_cache_is_used(monkeypatch):
    monkeypatch.setattr(speed, "PREFILL_SECONDS", 0)
    calls = []
    models = [Recorder(name, calls) for name in ("dense", "compact")]
    rows = measured(models, batch_sizes=(1, 2), repeats=2)
    one = [((5,), None), ((1,), "past"), ((1,), "past"), ((1,), "past")]
    expected = [
        (model.name, (batch, *shape), cache)
        for batch in (1, 2)
        for _ in range(3)  # one to warm up
        for model in models
        for shape, cache in one
    ]
    assert calls == expected
    assert [row["batch"] for row in rows["dense"]] == [1, 2]


def test_a_short_prompt_is_read_several_times():
    calls = []
    measured([Recorder("m", calls)], batch_sizes=(1,), repeats=1)
    prefills = [cache for _, shape, cache in calls if shape == (1, 5)]
    assert 3 <= len(prefills) <= 1 + speed.PREFILL_PASSES  # one to warm up
    assert set(prefills) == {None}


def test_no_repeats_measure_nothing():
    calls = []
    assert measured([Recorder("m", calls)], repeats=0) == {"m": []}
    assert calls == []


def test_speed_is_the_median_of_the_repeats():
    taken = iter([(9.0, 9.0), (1.0, 4.0), (3.0, 2.0), (2.0, 6.0)])
    (row,) = speed.measure_in_turns({"m": lambda *_: next(taken)}, Speed(batch_sizes=(4,), repeats=3))["m"]
    assert row["prefill_tokens_per_s"] == 4 * Speed.prompt_tokens / 2
    assert row["decode_tokens_per_s"] == 4 * Speed.new_tokens / 4


def test_dense_and_compact_side_by_side(monkeypatch):
    settings = Evaluate(
        tasks=[Task(name=YAML, limit=8)],
        speed=Speed(batch_sizes=(2,), repeats=2),
    )
    turns = []
    real = speed.score_task
    monkeypatch.setattr(speed, "score_task", lambda lm, *given, **more: turns.append(lm) or real(lm, *given, **more))
    metadata = speed.side_by_side({"dense": REASONER, "same": REASONER}, settings, seed=0)
    assert [lm is turns[i % 2] for i, lm in enumerate(turns)] == [True] * 4 and turns[0] is not turns[1]
    assert (metadata["task"], metadata["items"], metadata["repeats"], metadata["batch_size"]) == (
        "tiny_reasoner",
        8,
        2,
        64,
    )
    assert list(metadata["models"]) == ["dense", "same"]
    dense, same = metadata["models"].values()
    assert dense["solved"] == same["solved"] >= 5
    assert dense["answer_tokens"] == same["answer_tokens"] > 5
    for model in (dense, same):
        assert model["params"] == 213_568
        assert model["seconds_per_solved"] > 0 and model["speed"][0]["prefill_tokens_per_s"] > 0


def test_seconds_per_solved_are_the_median_of_the_repeats(monkeypatch):
    settings = Evaluate(tasks=[Task(name=YAML)], speed=Speed(batch_sizes=(), repeats=3))
    taken = iter([8.0, 1.0, 2.0, 5.0, 4.0, 1.0])
    score = TaskScore("t", "1", "exact_match,none", 0.5, 0.1, 0.9, 4, 0, 0.0, True, 0, 0.0, 0.0, 0.0)
    monkeypatch.setattr(speed, "score_task", lambda *_, **__: (replace(score, seconds=next(taken)), []))
    models = speed.side_by_side({"a": REASONER, "b": REASONER}, settings, seed=0)["models"]
    assert [models[name]["seconds_per_solved"] for name in "ab"] == [4.0 / 2, 1.0 / 2]


def test_a_task_without_an_accuracy_has_no_seconds_per_solved(monkeypatch):
    task = Task(name=str(ROOT / "examples/smollm2/gsm8k_perplexity.yaml"), metric="word_perplexity")
    settings = Evaluate(tasks=[task], speed=Speed(batch_sizes=(1,), repeats=1))
    metadata = speed.side_by_side({"dense": REASONER}, settings, seed=0)
    model = metadata["models"]["dense"]
    assert (metadata["task"], metadata["items"], model["seconds_per_solved"]) == ("", 0, None)
    assert model["speed"][0]["decode_tokens_per_s"] > 0
