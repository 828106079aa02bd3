"""A goal in memory becomes a number of parameters, or an error that says what the model has now."""

import json
from pathlib import Path

import pytest
from tiny_models import build, save
from typer.testing import CliRunner

from ptl.cli import app
from ptl.config.schedule import MemoryGoal, Prune, Schedule
from ptl.errors import InputError
from ptl.model.dimensions import with_experts
from ptl.preflight import target
from ptl.preflight.forecast_model import shape_of
from ptl.preflight.preflight import check_model

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"  # 4 layers, 213,568 parameters, 256 positions


def resolved(goal, **prune):
    schedule = Schedule(target=goal, recovery_tokens=1000)
    return target.resolved(schedule, Prune(**prune), REASONER).target


def test_memory_holds_the_weights_and_the_cache():
    """A neuron is 3 x 64 numbers in each of 4 layers; a token has 2 x 4 layers x 64 keys and values of 2 bytes."""
    cache = 2 * shape_of(str(REASONER)).cached_numbers
    neuron = 4 * 3 * 64
    params = 213_568 - 100 * neuron
    enough = 2 * params + 10 * cache
    assert resolved(MemoryGoal(memory=f"{enough / 1000}kB", tokens=10)) == params
    assert resolved(MemoryGoal(memory=f"{(enough - 2) / 1000}kB", tokens=10)) == params - 1  # prune rounds down
    assert resolved(MemoryGoal(memory=f"{(enough + 10 * cache) / 1000}kB", tokens=10, sequences=2)) == params


def test_a_large_model_needs_its_config_only(tmp_path):
    """Llama 3 8B: 8 x 4096 tokens of 128 KiB are 4 GiB of cache, so that 12 GiB are left for 2 bytes a parameter."""
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    llama |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    goal = MemoryGoal(memory="16GiB", sequences=8, tokens=4096)
    params = target.params(goal, Prune(), tmp_path)
    assert params == (12 << 30) // 2


def test_without_tokens_a_cache_is_as_long_as_the_model_reads():
    goals = [MemoryGoal(memory="500kB", tokens=tokens) for tokens in (256, None)]
    assert resolved(goals[0]) == resolved(goals[1]) < 213_568
    with pytest.raises(InputError, match=r"^schedule\.target\.tokens: 257 is more than the model's context of 256"):
        resolved(MemoryGoal(memory="500kB", tokens=257))


def test_layers_take_their_cache_with_them():
    """A layer is a quarter of the cache, and its own parameters: fewer go than by the weights alone."""
    model = shape_of(str(REASONER)).dimensions
    goal = MemoryGoal(memory="300kB", sequences=2)
    assert resolved(goal, target="layers") == model.params - 3 * model.params_per_layer


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"memory": "1MB"}, "memory: the dense model reaches 1MB already: it needs 0.56 MB"),
        ({"memory": "100kB", "sequences": 2}, "memory: 100kB cannot be reached: .* the KV cache"),
    ],
)
def test_what_cannot_be_is_refused_with_what_the_model_has(goal, said):
    with pytest.raises(InputError, match=rf"^schedule\.target\.{said}"):
        resolved(MemoryGoal(**goal))


def test_a_goal_that_neurons_cannot_reach_is_refused_by_the_check_of_the_model():
    schedule = Schedule(target=MemoryGoal(memory="300kB", sequences=2), recovery_tokens=1000)
    with pytest.raises(InputError, match=r"cannot be reached by neurons: .* let schedule\.target remove less"):
        check_model(REASONER, schedule, Prune())


def test_experts_reach_a_goal(tmp_path):
    folder = save(build("olmoe"), tmp_path / "olmoe", tokenizer=False)
    shape = shape_of(str(folder))
    least = with_experts(shape.dimensions, shape.dimensions.fewest_experts + 1).params
    goal = MemoryGoal(memory=f"{2 * (least + 10 * shape.cached_numbers) / 1000}kB", tokens=10)
    assert target.params(goal, Prune(target="experts"), folder) == least


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_the_commands_count_with_the_goal(command):
    def run(goal):
        return CliRunner().invoke(app.app, [command, str(TINY), "--set", f"schedule.target.memory={goal}"])

    done = run("400kB")
    assert done.exit_code == 0, done.output
    assert "134,464" in done.stdout  # parameters at the end, a width of 25 neurons
    if command == "validate":
        assert "400kB for weights and a KV cache for 1 sequence of 256 tokens in bfloat16: at most 134," in done.stdout
    refused = run("1kB")
    assert isinstance(refused.exception, InputError) and "cannot be reached" in str(refused.exception)
