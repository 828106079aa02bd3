"""A target becomes a number of parameters and a plan, or an error that says what the model has now."""

from dataclasses import replace

import pytest
from checkout import DENSE, TINY
from tiny_models import with_reasoners_tokenizer
from typer.testing import CliRunner

from ptl.cli import app
from ptl.config.schedule import MemoryGoal, Prune, Schedule
from ptl.errors import InputError
from ptl.model import dimensions
from ptl.preflight import target
from ptl.preflight.forecast_model import shape_of
from ptl.preflight.preflight import check_model

PARAMS = 213_568  # of the tiny reasoner, which has 4 layers and reads 256 tokens
NEURON = 4 * 3 * 64  # parameters
CACHE = 2 * 4 * 2 * 2 * 16  # bytes of a token: in each layer two keys and two values of 16 numbers


def resolved(goal, **prune):
    schedule = Schedule(target=goal, recovery_tokens=1000)
    return target.resolved(schedule, Prune(**prune), DENSE).target


def test_memory_holds_the_weights_and_the_cache():
    params = PARAMS - 100 * NEURON
    enough = 2 * params + 10 * CACHE
    assert resolved(MemoryGoal(memory=f"{enough / 1000}kB", tokens=10)) == params
    assert resolved(MemoryGoal(memory=f"{(enough - 2) / 1000}kB", tokens=10)) == params - 1  # prune rounds down
    assert resolved(MemoryGoal(memory=f"{(enough + 10 * CACHE) / 1000}kB", tokens=10, sequences=2)) == params
    # The dense model just does not fit, or just does.
    dense = 2 * PARAMS + 10 * CACHE
    assert resolved(MemoryGoal(memory=f"{(dense - 2) / 1000}kB", tokens=10)) == PARAMS - 1
    with pytest.raises(InputError, match=r"reaches .* already"):
        resolved(MemoryGoal(memory=f"{dense / 1000}kB", tokens=10))
    recorded = target.record(MemoryGoal(memory="300kB", tokens=10), DENSE)
    assert (recorded["bytes"], recorded["dense"], recorded["cached_numbers_per_layer"]) == (300_000, dense, 64)


def test_without_tokens_a_cache_is_as_long_as_the_model_reads():
    goals = [MemoryGoal(memory="500kB", tokens=tokens) for tokens in (256, None)]
    assert resolved(goals[0]) == resolved(goals[1]) < PARAMS
    with pytest.raises(InputError, match=r"^schedule\.target\.tokens: 257 is more than the model's context of 256"):
        resolved(MemoryGoal(memory="500kB", tokens=257))
    # A layer takes its cache with it, a quarter: fewer go than by the weights alone.
    model = shape_of(str(DENSE)).dimensions
    goal = MemoryGoal(memory="300kB", sequences=2)
    assert resolved(goal, target="layers") == model.params - 3 * model.params_per_layer
    for name in ("plan", "validate"):
        assert "134,464" in ptl(name, TINY, "--set", "schedule.target.memory=400kB")  # a width of 25 neurons


def test_the_sizes_of_what_cannot_be_are_refused():
    for goal, said in (
        (MemoryGoal(memory="100kB", sequences=2), "target.memory: 100kB cannot be reached: .* the KV cache"),
        (MemoryGoal(memory="300kB", sequences=2), "target: .* cannot be reached by neurons"),
    ):
        with pytest.raises(InputError, match=rf"^schedule\.{said}"):
            check_model(DENSE, Schedule(target=goal, recovery_tokens=1000), Prune(target="neurons"))


def ptl(*arguments):
    result = CliRunner().invoke(app.app, [*map(str, arguments)], env={"COLUMNS": "200"})
    error = str(result.exception) if isinstance(result.exception, InputError) else ""
    return " ".join((result.output + error).split())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture with the tiny reasoner's tokenizer."""
    return with_reasoners_tokenizer("olmoe", tmp_path_factory.mktemp("mixture") / "model", num_experts=12)


def with_model(folder, **changes):
    settings = {"model.path": folder, "prune.target": "experts", "schedule.target": 0.3} | changes
    return [part for field, value in settings.items() for part in ("--set", f"{field}={value}")]


def test_experts_reach_a_goal_the_plan_says_how_many_remain_and_what_cannot_be_is_refused(mixture):
    shape = shape_of(str(mixture))
    least = replace(shape.dimensions, experts=shape.dimensions.fewest_experts + 1).params
    goal = MemoryGoal(memory=f"{2 * (least + 10 * shape.cached_numbers) / 1000}kB", tokens=10)
    assert target.params(goal, Prune(target="experts"), mixture) == least
    said = ptl("plan", TINY, *with_model(mixture, **{"schedule.iterations": 2}))
    assert all(part in said for part in ("Active", "215,392", "77,152", "8 of 12 experts", "7 of 12 experts"))
    said = ptl("plan", TINY, *with_model(mixture, **{"schedule.iterations": 2, "prune.target": "neurons"}))
    # 77,152 less 16 neurons of 3 x 32 weights in 3 experts of 4 layers
    assert all(part in said for part in ("Active", "24 of 40 neurons", "58,720"))
    for changes, said in (
        ({"model.path": DENSE}, "a dense model has no experts"),
        ({"schedule.target": 0.9}, "cannot be reached by experts: each token needs 3 of them"),
    ):
        assert said in ptl("validate", TINY, *with_model(mixture, **changes))


def test_prune_by_hand_removes_experts_where_the_config_does(mixture, tmp_path):
    settings = with_model(mixture, **{"schedule.target": 0.2, "calibration.num_sequences": 4})
    assert '"experts": 9' in ptl("prune", mixture, tmp_path / "one", "--config", TINY, *settings)
    settings = ["--set", "prune.target=experts", "--set", "calibration.num_sequences=4", "--target", 0.2]
    assert '"criterion": "reap"' in ptl("prune", mixture, tmp_path / "two", "--config", TINY, *settings)
    assert dimensions.static_cost(tmp_path / "one").params == dimensions.static_cost(tmp_path / "two").params
