from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkout import DENSE, EXAMPLE, ROOT

from ptl.config.run import Evaluate, Speed, Task
from ptl.evaluation import speed
from ptl.evaluation.scoring import TaskScore

YAML = str(EXAMPLE / "tiny_reasoner.yaml")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("evaluate")]


class Recorder:
    """A mock model that only notes when it is called, and with what."""

    def __init__(self, name, calls):
        self.name, self.calls, self.device = name, calls, torch.device("cpu")
        self.config = SimpleNamespace(vocab_size=11)

    def forward(self, input_ids, cache=None, **kwargs):
        raise AssertionError("only its signature is read")

    def __call__(self, input_ids, cache=None, **kwargs):
        self.calls.append((self.name, tuple(input_ids.shape), cache))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11), past_key_values="past")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(Speed, "prompt_tokens", 5)
    monkeypatch.setattr(Speed, "new_tokens", 3)


def test_models_take_turns_and_the_cache_is_used(monkeypatch):
    monkeypatch.setattr(speed, "PREFILL_SECONDS", 0)
    calls = []
    timers = {
        name: partial(speed._time_once, Recorder(name, calls), 0) for name in ("dense", "compact")
    }
    rows = speed.measure_in_turns(timers, Speed(batch_sizes=(1, 2), repeats=2))
    assert calls == [
        (name, (batch, *shape), cache)
        for batch in (1, 2)
        for _ in range(3)  # one to warm up
        for name in ("dense", "compact")
        for shape, cache in [((5,), None), *[((1,), "past")] * 3]
    ]
    assert [row["batch"] for row in rows["dense"]] == [1, 2]
    assert speed.measure_in_turns(timers, Speed(repeats=0)) == {"dense": [], "compact": []}


def test_a_short_prompt_is_read_several_times():
    for seconds, passes in [(9, 1), (0.1001, 1), (0.1, 2), (0.03, 4), (0.0055, 19), (1e-12, 20)]:
        asked = []
        timer = {
            "m": lambda *given, asked=asked, seconds=seconds: asked.append(given) or (seconds, 1)
        }
        speed.measure_in_turns(timer, Speed(batch_sizes=(2,), repeats=2))
        assert asked == [(2, 1), (2, passes), (2, passes)], seconds


def test_speed_is_the_median_of_the_repeats_and_the_times_of_one_pass_and_of_all_new_tokens(
    monkeypatch,
):
    taken = iter([(9.0, 9.0), (1.0, 4.0), (3.0, 2.0), (2.0, 6.0)])
    (row,) = speed.measure_in_turns(
        {"m": lambda *_: next(taken)}, Speed(batch_sizes=(4,), repeats=3)
    )["m"]
    assert row == {"batch": 4, "prefill_tokens_per_s": 4 * 5 / 2, "decode_tokens_per_s": 4 * 3 / 4}
    calls = []
    # a second for each call
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: len(calls)))
    assert speed._time_once(Recorder("m", calls), 0, 2, 4) == (1, 3)


def test_dense_and_compact_side_by_side(monkeypatch):
    settings = Evaluate(tasks=[Task(name=YAML, limit=8)], speed=Speed(batch_sizes=(2,), repeats=2))
    turns, real = [], speed.score_task
    monkeypatch.setattr(
        speed, "score_task", lambda lm, *given, **more: turns.append(lm) or real(lm, *given, **more)
    )
    metadata = speed.side_by_side({"dense": DENSE, "same": DENSE}, settings, seed=0)
    assert [lm is turns[i % 2] for i, lm in enumerate(turns)] == [True] * 4 and turns[
        0
    ] is not turns[1]
    assert [metadata[name] for name in ("task", "items", "repeats", "batch_size")] == [
        "tiny_reasoner",
        8,
        2,
        64,
    ]
    dense, same = metadata["models"]["dense"], metadata["models"]["same"]
    assert dense["solved"] == same["solved"] >= 5
    assert dense["answer_tokens"] == same["answer_tokens"] > 5
    for model in (dense, same):
        assert model["params"] == 213_568
        assert model["seconds_per_solved"] > 0 and model["speed"][0]["prefill_tokens_per_s"] > 0


def test_seconds_per_solved_are_the_median_of_the_repeats(monkeypatch):
    score = TaskScore(
        "t", "1", "exact_match,none", 0, 0.1, 0.9, 4, 0, 0.0, True, 0, 0.0, 0.0, 0.0, 0.0
    )
    limits = set()
    for accuracy, samples, expected in (
        (0.5, 1, [4 / 2, 1 / 2]),
        (0.5, 2, [4 / 4, 1 / 4]),
        (0, 2, [None, None]),
    ):
        settings = Evaluate(
            tasks=[Task(name=YAML, samples=samples)], speed=Speed(batch_sizes=(1,), repeats=3)
        )
        taken = iter((8, 1, 2, 5, 4, 1))

        def answered(_, task, *__, seed, taken=taken, accuracy=accuracy):
            limits.add((task.limit, task.samples))
            return replace(score, accuracy=accuracy, samples=task.samples, seconds=next(taken)), []

        monkeypatch.setattr(speed, "score_task", answered)
        models = speed.side_by_side({"a": DENSE, "b": DENSE}, settings, seed=0)["models"]
        assert [models[name]["seconds_per_solved"] for name in "ab"] == expected
    assert limits == {(64, 1), (32, 2)}  # as many answers
    perplexity = Task(
        name=str(ROOT / "examples/smollm2/gsm8k_perplexity.yaml"), metric="word_perplexity"
    )
    settings = Evaluate(tasks=[perplexity], speed=Speed(batch_sizes=(1,), repeats=1))
    metadata = speed.side_by_side({"a": DENSE}, settings, seed=0)
    assert (metadata["task"], metadata["models"]["a"]["seconds_per_solved"]) == ("", None)
