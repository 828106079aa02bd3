"""The forecast: sizes from the config alone, the known FLOP rules, and warnings where a run cannot fit."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ptl.config import load_config, plan
from ptl.errors import InputError
from ptl.forecast import GPUS, devices, forecast, forward_flops, shape_of, training_memory

ROOT = Path(__file__).parents[1]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
DENSE = ROOT / "examples/tiny_reasoner/checkpoint"
LLAMA3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


@pytest.fixture
def large(tmp_path):
    """Only the config of an 8B model: there are no weights to read."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3))
    return tmp_path


def config(model, **changes):
    given = {"model.path": str(model), "schedule.recovery_tokens": 100_000_000, "recover": [{"dtype": "bfloat16"}]}
    return load_config(TINY, given | changes)


def test_the_shape_is_that_of_the_model():
    shape = shape_of(str(DENSE))
    model = AutoModelForCausalLM.from_pretrained(DENSE)
    assert shape.params == model.num_parameters()
    assert (shape.layers, shape.hidden, shape.vocabulary) == (4, 64, model.config.vocab_size)


def test_a_large_model_needs_its_config_only(large):
    shape = shape_of(str(large))
    assert shape.params == 8_030_261_248  # of Llama 3 8B
    assert shape.kv_bytes == 2 * 32 * 8 * 128 * 2 and shape.itemsize == 2
    assert forward_flops(shape, 1, 0) == pytest.approx(2 * shape.params, rel=0.07)  # the embedding is no product


def test_steps_and_tokens_are_those_of_the_plan(large):
    settings = config(large)
    told = forecast(settings)
    names = [step.step for step in told.steps]
    assert names[:4] == ["evaluate-0", "prune-1", "recover-1", "evaluate-1"]
    assert names[-3:] == ["control-prune", "control-recover", "control-evaluate"]
    tokens = [step.tokens for step in told.steps if step.step.startswith("recover")]
    assert tokens == [it.tokens for it in plan(settings.schedule, settings.prune)]
    assert told.steps[-1].params == told.steps[-4].params == pytest.approx(0.6 * told.params, abs=2)
    assert told.hours == pytest.approx(sum(step.hours for step in told.steps))
    last = told.steps[-2]
    assert last.flops == pytest.approx(6 * (last.params - 128256 * 4096) * 1e8, rel=0.1)


def test_what_cannot_fit_is_said_with_a_remedy(large):
    told = forecast(config(large), "h100", 1)
    assert len(told.warnings) == 5 and "recover-1: about" in told.warnings[0] and "fsdp" in told.warnings[0]
    roomy = [{"dtype": "bfloat16", "gradient_checkpointing": True, "sharding": "fsdp", "batch_size": 32}]
    assert forecast(config(large, recover=roomy), "h100", 8).warnings == ()
    assert forecast(config(DENSE), "t4").warnings == ()


def test_memory_follows_the_settings(large):
    shape = shape_of(str(large))
    plain, bits = config(large).recover[0], 16 * shape.params

    def memory(count=1, **changes):
        stage = config(large, recover=[{"dtype": "bfloat16"} | changes]).recover[0]
        return training_memory(shape, stage, shape, count)

    assert memory() > bits and devices(plain, 4) == 4
    assert memory(gradient_checkpointing=True) < memory()
    assert memory(lora={"rank": 8}) == pytest.approx(memory() - 12 * shape.params)
    assert memory(4, sharding="zero2") == pytest.approx(memory(4) - 9 * shape.params)
    assert memory(4, sharding="fsdp") == pytest.approx(memory(4) - 12 * shape.params)
    assert memory(method="distil") > memory() + 2 * shape.params
    assert memory(method="grpo", beta=0.01) == pytest.approx(memory(method="grpo", beta=0.0) + 4 * shape.params)


def test_more_gpus_and_faster_ones_take_less_time(large):
    one, four = (forecast(config(large), "a100-80", count) for count in (1, 4))
    recovery = [step.hours for step in one.steps if "recover" in step.step]
    shared = [step.hours for step in four.steps if "recover" in step.step]
    assert shared == pytest.approx([hours / 4 for hours in recovery])
    assert forecast(config(large), "h100", 1).hours < one.hours
    slower = forecast(config(large, recover=[{"dtype": "float32"}]), "a100-80", 1)
    assert slower.hours > one.hours


def test_unknown_sizes_are_told(large):
    task = {"tasks": [{"name": "somebody_elses_task"}]}
    assert "1000 items assumed" in forecast(config(large, evaluate=task)).steps[0].note
    known = {"tasks": [{"name": "gsm8k"}]}
    assert forecast(config(large, evaluate=known)).steps[0].note == ""


def test_errors_name_what_is_wrong(large, tmp_path):
    with pytest.raises(InputError, match="gpu: 'h9000' is not known; it must be one of t4"):
        forecast(config(large), "h9000")
    with pytest.raises(InputError, match="no folder /nowhere"):
        forecast(config("/nowhere"))
    with pytest.raises(InputError, match="would remove"):
        forecast(config(large, **{"schedule.target": 9e9}))


def test_the_gpus_are_in_the_order_of_their_memory_and_in_plausible_units():
    assert list(GPUS) == sorted(GPUS, key=lambda name: GPUS[name].memory)
    for gpu in GPUS.values():
        assert gpu.bf16 >= gpu.fp32 > 1e12 and 1e11 < gpu.bandwidth < 1e13 and 16 << 30 <= gpu.memory < 1 << 40
    assert GPUS["h100"].bf16 / GPUS["a100-80"].bf16 == pytest.approx(3.17, abs=0.01)
