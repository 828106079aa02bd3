"""A goal in memory or speed becomes a number of parameters, or an error that says what the model has now."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import build, save
from typer.testing import CliRunner

from ptl.cli import app
from ptl.config.goal import MemoryGoal, SpeedGoal
from ptl.config.run import load_config
from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.model.goals import dense_model
from ptl.preflight import target
from ptl.preflight.preflight import check_model

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"  # 4 layers, 213,568 parameters, 256 positions


def resolved(goal, **prune):
    schedule = Schedule(target=goal, recovery_tokens=1000)
    return target.resolved(schedule, Prune(**prune), REASONER).target


def test_memory_holds_the_weights_and_the_cache():
    """A neuron is 3 x 64 numbers in each of 4 layers; a token has 2 x 4 layers x 64 keys and values of 2 bytes."""
    cache = 2 * dense_model(REASONER).needs().cached_numbers
    neuron = 4 * 3 * 64
    params = 213_568 - 100 * neuron
    enough = 2 * params + 10 * cache
    assert resolved(MemoryGoal(memory=f"{enough / 1000}kB", tokens=10)) == params
    assert resolved(MemoryGoal(memory=f"{(enough - 2) / 1000}kB", tokens=10)) == params - neuron
    assert resolved(MemoryGoal(memory=f"{(enough + 10 * cache) / 1000}kB", tokens=10, sequences=2)) == params


def test_a_large_model_needs_its_config_only(tmp_path):
    """Llama 3 8B: 8 x 4096 tokens of 128 KiB are 4 GiB of cache, so that 12 GiB are left for 2 bytes a parameter."""
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    llama |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    goal = MemoryGoal(memory="16GiB", sequences=8, tokens=4096)
    params = target.params(goal, Prune(), tmp_path)
    neuron = 32 * 3 * 4096
    assert (12 << 30) // 2 - neuron < params <= (12 << 30) // 2


def test_without_tokens_a_cache_is_as_long_as_the_model_reads():
    goals = [MemoryGoal(memory="500kB", tokens=tokens) for tokens in (256, None)]
    assert resolved(goals[0]) == resolved(goals[1]) < 213_568
    with pytest.raises(InputError, match=r"^schedule\.target\.tokens: 257 is more than the model's context of 256"):
        resolved(MemoryGoal(memory="500kB", tokens=257))


@pytest.mark.parametrize("times", [1.2, 1.7, 3])
def test_speed_is_the_ratio_of_the_flops(times):
    dense = dense_model(REASONER)
    (needs,) = [
        needs
        for n in range(dense.sizes.intermediate_size)
        if (needs := dense.needs(n)).params == resolved(SpeedGoal(speed=times))
    ]
    assert dense.needs().flops_per_token / needs.flops_per_token >= times
    removed = (213_568 - needs.params) // (4 * 3 * 64)
    assert dense.needs().flops_per_token / dense.needs(removed - 1).flops_per_token < times


def test_layers_are_counted_as_such():
    dense = dense_model(REASONER)
    assert resolved(SpeedGoal(speed=1.5), target="layers") == dense.needs(2, "layers").params


@pytest.mark.parametrize("target", ["neurons_then_layers"])
@pytest.mark.parametrize(
    "goal",
    [*(SpeedGoal(speed=times) for times in (1.2, 1.5, 3, 3.2)), MemoryGoal(memory="400kB")],
    ids=lambda goal: goal.field + str(getattr(goal, "speed", "")),
)
def test_a_mixed_removal_reaches_the_goal_whatever_it_removes(goal, target):
    dense = dense_model(REASONER)
    params = resolved(goal, target=target)
    sizes = dense.sizes
    for layers in range(1, sizes.num_hidden_layers + 1):
        shallow = replace(dense, sizes=replace(sizes, num_hidden_layers=layers))
        mixed = shallow.largest("neurons", lambda needs: needs.params <= params)
        if mixed is None:  # neurons would not be enough with so many layers
            continue
        if isinstance(goal, SpeedGoal):
            assert dense.needs().flops_per_token / mixed.flops_per_token >= goal.speed
        else:
            assert mixed.memory(1, 256, 2) <= goal.bytes
    # No smaller than that takes: the layers' norms.
    assert resolved(goal, target="neurons") - params < 4 * 3 * 64


@pytest.mark.parametrize("target", ["neurons", "neurons_then_layers"])
def test_memory_that_only_layers_can_free_is_refused_with_them_as_the_remedy(target):
    """A mixed removal could get down to the parameters by neurons, which leave the KV cache as it is."""
    goal = MemoryGoal(memory="300kB", sequences=2)
    with pytest.raises(InputError, match=r"cannot be reached: .*\(prune\.target=layers\)$"):
        resolved(goal, target=target)
    assert resolved(goal, target="layers") == dense_model(REASONER).needs(3, "layers").params
    with pytest.raises(InputError, match=r"lower sequences or tokens$"):
        resolved(MemoryGoal(memory="100kB", sequences=2), target=target)


def test_neurons_of_a_mixture_that_cannot_be_pruned_are_no_remedy(tmp_path):
    folders = {variant: save(build(variant), tmp_path / variant, tokenizer=False) for variant in ("gpt_oss", "olmoe")}
    for variant, offered in (("gpt_oss", False), ("olmoe", True)):
        with pytest.raises(InputError, match=r"remove .*layers \(prune\.target=") as error:
            target.params(SpeedGoal(speed=1.2), Prune(target="experts"), folders[variant])
        assert ("neurons" in error.value.remedy) == offered


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (
            MemoryGoal(memory="1MB"),
            "memory: the dense model reaches 1MB for weights and a KV cache for 1 sequence of 256 ",
        ),
        (
            MemoryGoal(memory="300kB"),
            "memory: 300kB for weights .* cannot be reached: with no FFN neuron left it is 263",
        ),
        (SpeedGoal(speed=9), r"speed: 9 times the speed cannot be reached: .* is 3\.25 times .* and now 1\.00 times"),
    ],
)
def test_what_cannot_be_is_refused_with_what_the_model_has(goal, said):
    if goal.field.endswith("memory") and goal.memory == "300kB":
        goal = goal.model_copy(update={"sequences": 2})
        said = said.replace("263", "394")
    with pytest.raises(InputError, match=rf"^schedule\.target\.{said}"):
        resolved(goal)


def test_a_goal_that_no_width_multiple_reaches_is_refused_by_the_check_of_the_model():
    schedule = Schedule(target=SpeedGoal(speed=3.2), recovery_tokens=1000)
    assert check_model(REASONER, schedule, Prune(width_multiple=1)).params == 213_568
    with pytest.raises(InputError, match=r"needs at least .* let schedule\.target remove less"):
        check_model(REASONER, schedule, Prune(width_multiple=64))


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_the_commands_count_with_the_goal(command):
    def run(goal):
        return CliRunner().invoke(app.app, [command, str(TINY), "--set", f"schedule.target.{goal}"])

    done = run("speed=1.7x")
    assert done.exit_code == 0, done.output
    assert "125,248" in done.stdout  # parameters at the end
    if command == "validate":
        assert "1.7 times the speed: at most 125,248 parameters" in done.stdout
    refused = run("speed=9x")
    assert isinstance(refused.exception, InputError) and "cannot be reached" in str(refused.exception)


def test_too_few_iterations_for_a_deep_goal_are_warned_of():
    config = load_config(TINY, {"schedule.target": {"speed": 3}, "schedule.iterations": "auto"})
    assert target.with_number(config).schedule.num_iterations == 4
    done = CliRunner().invoke(
        app.app, ["plan", str(TINY), "--set", "schedule.target.speed=3", "--set", "schedule.iterations=auto"]
    )
    assert "set schedule.iterations=8" in done.stdout
