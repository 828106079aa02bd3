"""A target becomes a number of parameters and a plan, also of width, or an error that says what the model has now."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from bodies import PUBLISHED
from checkout import DENSE, TINY
from tiny_models import build, save, with_reasoners_tokenizer
from typer.testing import CliRunner

from ptl.cli import app
from ptl.config.run import load_config
from ptl.config.schedule import MemoryGoal, Prune, Schedule
from ptl.errors import InputError
from ptl.model import widths
from ptl.model.dimensions import static_cost
from ptl.preflight import remedies, starter, target
from ptl.preflight.forecast import forecast
from ptl.preflight.forecast_model import forward_flops, shape_of

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
    # prune rounds down
    assert resolved(MemoryGoal(memory=f"{(enough - 2) / 1000}kB", tokens=10)) == params - 1
    assert (
        resolved(MemoryGoal(memory=f"{(enough + 10 * CACHE) / 1000}kB", tokens=10, sequences=2))
        == params
    )
    # The dense model just does not fit, or just does.
    dense = 2 * PARAMS + 10 * CACHE
    assert resolved(MemoryGoal(memory=f"{(dense - 2) / 1000}kB", tokens=10)) == PARAMS - 1
    with pytest.raises(InputError, match=r"reaches .* already"):
        resolved(MemoryGoal(memory=f"{dense / 1000}kB", tokens=10))


def test_without_tokens_a_cache_is_as_long_as_the_model_reads():
    goals = [MemoryGoal(memory="500kB", tokens=tokens) for tokens in (256, None)]
    assert resolved(goals[0]) == resolved(goals[1]) < PARAMS
    # A layer takes its cache with it, a quarter: fewer go than by the weights alone.
    model = shape_of(str(DENSE)).dimensions
    goal = MemoryGoal(memory="300kB", sequences=2)
    assert resolved(goal, target="layers") == model.params - 3 * model.params_per_layer
    for name in ("plan", "validate"):
        # a width of 25 neurons
        assert "134,464" in ptl(name, TINY, "--set", "schedule.target.memory=400kB")


def test_compile_makes_a_memory_a_number_before_the_pipeline(tmp_path):
    path = tmp_path / "p.yaml"
    memory = ("--set", "schedule.target={memory: 300kB, tokens: 10}")
    said = ptl("compile", TINY, "-o", path, *memory)
    assert "at most 147,440 parameters" in said
    assert (
        next(yaml.safe_load_all(path.read_text()))["root"]["inputDefinitions"]["parameters"][
            "target"
        ]["defaultValue"]
        == 147_440
    )


def test_a_memory_needs_the_model_s_config(tmp_path, monkeypatch):
    memory = ("--set", "schedule.target.memory=300kB")
    refused = ("schedule.target.memory: 300kB becomes", "give the number of parameters to end with")
    arguments = ("compile", TINY, "-o", tmp_path / "p.yaml", *memory)
    said = ptl(*arguments, "--set", f"model.path={tmp_path / 'nowhere'}")
    assert all(part in said for part in (*refused, "nowhere")), said
    monkeypatch.setattr(target.pretrained, "can_build", lambda: False)
    said = ptl(*arguments)
    assert all(part in said for part in (*refused, "pip install")), said


def ptl(*arguments):
    result = CliRunner().invoke(app.app, [*map(str, arguments)], env={"COLUMNS": "200"})
    error = str(result.exception) if isinstance(result.exception, InputError) else ""
    return " ".join((result.output + error).split())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture with the tiny reasoner's tokenizer."""
    return with_reasoners_tokenizer(
        "olmoe", tmp_path_factory.mktemp("mixture") / "model", num_experts=12
    )


def with_model(folder, **changes):
    settings = {"model.path": folder, "prune.target": "experts", "schedule.target": 0.3} | changes
    return [part for field, value in settings.items() for part in ("--set", f"{field}={value}")]


def test_experts_reach_a_goal_the_plan_says_how_many_remain_and_what_cannot_be_is_refused(mixture):
    shape = shape_of(str(mixture))
    least = replace(shape.dimensions, experts=shape.dimensions.fewest_experts + 1).params
    goal = MemoryGoal(memory=f"{2 * (least + 10 * shape.cached_numbers) / 1000}kB", tokens=10)
    assert target.params_that_fit(goal, Prune(target="experts"), shape) == least
    said = ptl("plan", TINY, *with_model(mixture, **{"schedule.iterations": 2}))
    assert all(
        part in said
        for part in ("Active", "215,392", "77,152", "8 of 12 experts", "7 of 12 experts")
    )
    said = ptl(
        "plan", TINY, *with_model(mixture, **{"schedule.iterations": 2, "prune.target": "neurons"})
    )
    # 77,152 less 16 neurons of 3 x 32 weights in 3 experts of 4 layers
    assert all(part in said for part in ("Active", "24 of 40 neurons", "58,720"))
    said = ptl("validate", TINY, *with_model(mixture, **{"schedule.target": 0.9}))
    assert "cannot be reached by experts: each token needs 3 of them" in said


def test_prune_by_hand_removes_experts_where_the_config_does(mixture, tmp_path):
    settings = with_model(mixture, **{"schedule.target": 0.2, "calibration.num_sequences": 4})
    assert '"experts": 9' in ptl("prune", mixture, tmp_path / "one", "--config", TINY, *settings)
    settings = [
        "--set",
        "prune.target=experts",
        "--set",
        "calibration.num_sequences=4",
        "--target",
        0.2,
    ]
    assert '"criterion": "reap"' in ptl(
        "prune", mixture, tmp_path / "two", "--config", TINY, *settings
    )
    assert static_cost(tmp_path / "one").params == static_cost(tmp_path / "two").params


# ---- hidden size, FFN and KV heads together


WIDTH = {"prune.target": "width", "schedule.target": 0.65}
FIXED = {"prune.width": {"hidden": 48, "kv": 1}}  # of which nothing is chosen


def output(command, *arguments, **settings):
    """What a command on tiny.yaml says."""
    sets = [
        part
        for field, value in settings.items()
        for part in ("--set", f"{field}={json.dumps(value)}")
    ]
    done = CliRunner().invoke(
        app.app, [command, *map(str, arguments), *sets], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    return done.stdout if "--json" in arguments else done.output


def columns(said):
    """The table of widths: its rows without borders."""
    rows = [
        re.findall(r"[^\s│┃]+", line) for line in said.partition("Hidden size/")[2].splitlines()
    ]
    return {
        row[0]: row[1:]
        for row in rows
        if len(row) > 1 and (row[0] in ("Iteration", "dense") or row[0].isdigit())
    }


def test_plan_and_validate_print_one_json_document():
    plan = json.loads(output("plan", TINY, "--json"))
    ends = json.loads(output("validate", TINY, "--json"))["ends"]
    assert plan["steps"][0]["step"] == "evaluate-0" and plan["steps"][0]["params"] == plan["params"]
    assert ends == [min(step["params"] for step in plan["steps"] if "control" not in step["step"])]


def test_the_plan_shows_the_widths_of_each_iteration_for_all_that_the_loss_chooses_from():
    said = output("plan", TINY, **WIDTH)
    table = columns(said)
    assert list(table) == ["Iteration", "dense", "1", "2", "3", "4"] and table["Iteration"] == [
        "A",
        "B",
    ]
    model = shape_of(str(DENSE)).dimensions
    ends = widths.candidates(model, model.params - int(0.65 * model.params), 1, {})
    assert table["4"] == [f"{end.hidden}/{end.width}/{end.kv_heads}" for end in ends]
    assert "counts with column A" in said and f"about {table['2'][0]} of 64/192/2" in said
    # The forecast is of these sizes.
    assert f"{ends[0].params:,}" in said
    assert f"become at most {max(end.params for end in ends):,}" in output(
        "validate", TINY, **WIDTH
    )
    # All sizes are set: nothing is compared.
    one = columns(output("plan", TINY, **WIDTH | FIXED))
    assert [one["4"], one["Iteration"]] == [["48/75/1"], ["A"]]
    # The FFN alone: the notes of the steps are enough.
    for changes in ({}, {"prune.target": "width"}, {"prune.target": "neurons"}):
        said = output("plan", TINY, **changes)
        assert columns(said) == {} and "80 of 192 neurons" in said, changes


# Dense and pruned sizes as two configs have them
LLAMA, DEEPSEEK = PUBLISHED["llama3_8b"] | {"head_dim": 128}, PUBLISHED["deepseek"]
LLAMA_NARROW = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
DEEPSEEK_NARROW = {"hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize(("dense", "narrow"), [(LLAMA, LLAMA_NARROW), (DEEPSEEK, DEEPSEEK_NARROW)])
def test_costs_are_those_of_a_model_with_the_pruned_sizes(dense, narrow, tmp_path):
    shapes = []
    for name, sizes in (("dense", {}), ("narrow", narrow)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dense | sizes))
        shapes.append(shape_of(str(tmp_path / name)))
    planned, own = shapes[0].of(shapes[1].dimensions), shapes[1]
    assert planned == own
    assert forward_flops(shapes[0], own.dimensions, 10, 100) == forward_flops(
        own, own.dimensions, 10, 100
    )
    # A cache that keys and values are computed from has no heads.
    assert (own.cached_numbers == shapes[0].cached_numbers) == (dense is DEEPSEEK)


def first_prune(**changes):
    return forecast(load_config(TINY, WIDTH | changes)).of("prune")[0]


def test_scoring_takes_a_forward_pass_through_each_candidate_as_well():
    run = forecast(load_config(TINY, WIDTH))
    dense, tokens = run.shape.dimensions, 128 * 256
    ends = [path[-1][1] for path in run.paths["loop"]]
    flops = [forward_flops(run.shape, model, tokens, 256) for model in (dense, *ends)]
    hours = (3 * flops[0] + sum(flops[1:])) / (0.35 * 67e12) / 3600
    assert len(ends) == 2 and first_prune().hours == pytest.approx(hours)
    assert first_prune(**FIXED).hours == pytest.approx(3 * flops[0] / (0.35 * 67e12) / 3600)
    # Later ones read a narrower model.
    prunes = [step for step in run.of("prune") if not step.step.startswith("control")]
    assert prunes[0].memory > prunes[3].memory and remedies.largest(run, "prune") == dense


def test_a_goal_in_memory_holds_whatever_becomes_of_the_cache():
    goal, shape = MemoryGoal(memory="250kB"), shape_of(str(DENSE))
    schedule = Schedule(target=goal, recovery_tokens=1000)
    params = target.params_that_fit(goal, Prune(target="width"), shape)
    assert params == target.params_that_fit(goal, Prune(), shape)  # with all KV heads
    schedule = target.resolved(schedule, Prune(), DENSE)
    for path in target.possible_paths(shape.dimensions, schedule, Prune(target="width")):
        cache = 256 * shape.of(path[-1][1]).cached_numbers
        assert path[-1][1].params <= params and 2 * (path[-1][1].params + cache) <= goal.bytes


def test_experts_close_the_gap_where_their_neurons_stay(tmp_path):
    folder = save(build("glm4_moe"), tmp_path / "mixture")
    said = output("plan", TINY, **WIDTH | {"model.path": str(folder), "schedule.target": 0.3})
    assert "Hidden size/experts/KV heads" in said and columns(said)["dense"][0] == "32/6/2"


def test_by_default_more_goes_of_width_than_of_neurons_alone_where_the_hidden_size_can_go():
    model = shape_of(str(DENSE)).dimensions
    few = replace(model, outside={(1, 0, 0): 2000})  # most of it embeddings
    assert [starter.default_target(few, None, unit) for unit in ("neurons", "width")] == [0.2, 0.3]
    fixed = replace(few, fixed={"hidden": "its norms subtract a mean"})
    assert starter.default_target(fixed, None, "width") == 0.2
    assert starter.default_target(few, 10, "width") == 0.05  # which the rows recover


def test_prune_by_hand_reaches_the_sizes_that_are_set(tmp_path):
    settings = {"prune.target": "width", "calibration.num_sequences": 4} | FIXED
    said = output("prune", DENSE, tmp_path / "out", "-c", TINY, "--target", 0.6, **settings)
    report = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    assert (report["hidden"], report["kv_heads"], report["candidates"]) == (48, 1, [])
    assert report["params"] == static_cost(tmp_path / "out").params <= report["goal"]
