import statistics
from pathlib import Path

import pytest

from ptl import cost
from ptl.config import Evaluate, Speed, Task

ROOT = Path(__file__).resolve().parents[1]
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"
YAML = str(ROOT / "examples/tiny_reasoner/tiny_reasoner.yaml")
SHAPES = [
    {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(folder, tie, kind="llama", **shape):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=97, num_hidden_layers=3, tie_word_embeddings=tie, pad_token_id=0, **shape
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_flops_agree_with_torchs_counter(tmp_path, kind, tie, shape):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = saved(tmp_path, tie, kind, **shape)
    static = cost.from_config(tmp_path)
    model.set_attn_implementation("eager")
    for length in (1, 7):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
        assert counter.get_total_flops() == length * (static.flops_per_token + length * static.attention_flops)


@pytest.mark.parametrize("tie", [True, False])
def test_static_costs_by_hand(tmp_path, tie):
    model = saved(tmp_path, tie, **SHAPES[0])
    static = cost.from_config(tmp_path)
    attention = 32 * 32 * 2 + 32 * 16 * 2
    layer = attention + 3 * 32 * 88 + 2 * 32
    assert static.params == 97 * 32 * (1 if tie else 2) + 3 * layer + 32
    assert static.params == sum(p.numel() for p in model.parameters())
    assert static.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert static.flops_per_token == 2 * (3 * (attention + 3 * 32 * 88) + 97 * 32)
    assert static.kv_bytes_per_token == 2 * 3 * 2 * 8 * 4  # keys and values, layers, KV heads, head_dim, float32
    assert static.widths == [88] * 3


def test_kv_bytes_are_those_of_a_real_cache(tmp_path):
    import torch

    model = saved(tmp_path, True, **SHAPES[0])
    with torch.inference_mode():
        out = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert held == 5 * cost.from_config(tmp_path).kv_bytes_per_token


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


def test_models_take_turns_and_the_cache_is_used(monkeypatch):
    monkeypatch.setattr(cost, "PREFILL_SECONDS", 0)
    calls = []
    models = {name: Recorder(name, calls) for name in ("dense", "compact")}
    rows = cost.measure(models, Speed(batch_sizes=(1, 2), prompt_tokens=5, new_tokens=3, repeats=2))
    one = [((5,), None), ((1,), "past"), ((1,), "past"), ((1,), "past")]
    expected = [
        (name, (batch, *shape), cache)
        for batch in (1, 2)
        for _ in range(3)  # one to warm up
        for name in models
        for shape, cache in one
    ]
    assert calls == expected
    assert [row["batch"] for row in rows["dense"]] == [1, 2]


def test_a_short_prompt_is_read_several_times():
    calls = []
    cost.measure({"m": Recorder("m", calls)}, Speed(batch_sizes=(1,), prompt_tokens=5, new_tokens=1, repeats=1))
    prefills = [cache for _, shape, cache in calls if shape == (1, 5)]
    assert 3 <= len(prefills) <= 1 + cost.PREFILL_PASSES  # one to warm up
    assert set(prefills) == {None}


def test_no_repeats_measure_nothing():
    calls = []
    assert cost.measure({"m": Recorder("m", calls)}, Speed(repeats=0)) == {"m": []}
    assert calls == []


def test_speed_is_the_median_of_the_repeats(monkeypatch):
    taken = iter([(9.0, 9.0), (1.0, 4.0), (3.0, 2.0), (2.0, 6.0)])
    monkeypatch.setattr(cost, "_once", lambda *_: next(taken))
    model = Recorder("", [])
    (row,) = cost.measure({"m": model}, Speed(batch_sizes=(4,), prompt_tokens=10, new_tokens=6, repeats=3))["m"]
    assert row["prefill_s"] == statistics.median([1, 3, 2])
    assert row["prefill_tokens_per_s"] == 4 * 10 / 2
    assert row["decode_tokens_per_s"] == 4 * 6 / 4


def test_dense_and_compact_side_by_side(monkeypatch):
    from ptl import evaluate

    settings = Evaluate(
        tasks=[Task(name=YAML, limit=8)],
        speed=Speed(batch_sizes=(2,), prompt_tokens=8, new_tokens=4, repeats=2, items=6),
    )
    turns = []
    real = evaluate.run_task
    monkeypatch.setattr(evaluate, "run_task", lambda lm, *given, **more: turns.append(lm) or real(lm, *given, **more))
    metadata = evaluate.side_by_side({"dense": REASONER, "same": REASONER}, settings, seed=0)
    assert [lm is turns[i % 2] for i, lm in enumerate(turns)] == [True] * 4 and turns[0] is not turns[1]
    assert (metadata["task"], metadata["items"], metadata["repeats"], metadata["batch_size"]) == (
        "tiny_reasoner",
        6,
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
    from dataclasses import replace

    from ptl import evaluate

    settings = Evaluate(tasks=[Task(name=YAML)], speed=Speed(batch_sizes=(), repeats=3, items=4))
    taken = iter([8.0, 1.0, 2.0, 5.0, 4.0, 1.0])
    score = evaluate.TaskScore("t", "1", "exact_match,none", 0.5, 0.1, 0.9, 4, 0, 0.0)
    monkeypatch.setattr(evaluate, "run_task", lambda *_, **__: (replace(score, seconds=next(taken)), []))
    models = evaluate.side_by_side({"a": REASONER, "b": REASONER}, settings, seed=0)["models"]
    assert [models[name]["seconds_per_solved"] for name in "ab"] == [4.0 / 2, 1.0 / 2]


def test_a_task_without_an_accuracy_has_no_seconds_per_solved(monkeypatch):
    from ptl import evaluate

    task = Task(name=str(ROOT / "examples/smollm2/gsm8k_perplexity.yaml"), metric="word_perplexity")
    settings = Evaluate(tasks=[task], speed=Speed(batch_sizes=(1,), prompt_tokens=8, new_tokens=2, repeats=1))
    metadata = evaluate.side_by_side({"dense": REASONER}, settings, seed=0)
    model = metadata["models"]["dense"]
    assert (metadata["task"], metadata["items"], model["seconds_per_solved"]) == ("", 0, None)
    assert model["speed"][0]["decode_tokens_per_s"] > 0
