"""Mixtures of experts before a run: what the plan says of them, what they cost, and what is refused."""

import json
from dataclasses import replace

import pytest
from recovering import DENSE, ROOT
from tiny_models import build, save
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ptl.cli.app import app
from ptl.config.goal import MemoryGoal, SpeedGoal
from ptl.config.run import load_config
from ptl.config.schedule import Prune
from ptl.errors import InputError
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions, with_experts
from ptl.model.families import FAMILIES
from ptl.model.goals import dense_model
from ptl.preflight import target
from ptl.preflight.forecast import forecast
from ptl.preflight.forecast_model import decode_seconds, forward_flops, shape_of
from ptl.preflight.gpus import GPUS

TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
# Qwen3-30B-A3B, as its config.json says it
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def large(tmp_path):
    """Only the config of a 30B model: there are no weights to read."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A mixture with the tiny reasoner's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build("olmoe", vocab_size=len(tokenizer), max_position_embeddings=256, num_experts=12, **ids)
    folder = save(model, tmp_path_factory.mktemp("mixture") / "model", tokenizer=False)
    tokenizer.save_pretrained(folder)
    return folder


def ptl(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    error = str(result.exception) if isinstance(result.exception, InputError) else ""
    return result.output + error


def with_model(folder, **changes):
    settings = {"model.path": str(folder), "prune.target": "experts"} | changes
    if "schedule.target.speed" not in changes:
        settings.setdefault("schedule.target", 0.3)
    return [part for field, value in settings.items() for part in ("--set", f"{field}={value}")]


def test_the_published_sizes_of_qwen3_30b_a3b(large):
    """30.5 billion parameters, 3.3 billion of them active, say its authors."""
    shape = shape_of(str(large))
    assert shape.params == 30_532_122_624
    assert shape.params - shape.inactive == 3_353_032_704
    assert shape.kv_bytes == 48 * 2 * 4 * 128 * 2


def test_flops_and_decoding_follow_the_experts_in_use(large):
    shape = shape_of(str(large))
    half = shape.scaled(shape.params - shape.inactive // 2, "experts")
    assert forward_flops(half, 1, 0) == pytest.approx(forward_flops(shape, 1, 0), rel=0.01)
    assert forward_flops(shape, 1, 0) < 2 * 3.4e9
    one, many = (decode_seconds(shape, rows, 2, 0, GPUS["h100"]) for rows in (1, 256))
    assert many == pytest.approx(one * shape.params / (shape.params - shape.inactive), rel=0.01)


def test_the_forecast_needs_the_config_only(large):
    config = load_config(TINY, {"model.path": str(large), "prune.target": "experts", "schedule.target": 0.3})
    steps = {step.step: step for step in forecast(config, "h200").steps}
    assert steps["prune-4"].params == pytest.approx(0.7 * 30_532_122_624, rel=1e-6)
    assert steps["prune-1"].host_memory == 0  # reap needs one pass, and keeps no states of every layer


def test_the_plan_says_how_many_experts_remain(small):
    said = ptl("validate", TINY, *with_model(small, **{"schedule.iterations": 2}))
    assert "215,392 parameters (77,152 active)" in said
    assert "Active" in said and "8 of 12" in said and "7 of 12" in said


def test_the_plan_says_how_many_neurons_of_each_expert_remain(small):
    said = ptl("validate", TINY, *with_model(small, **{"schedule.iterations": 2, "prune.target": "neurons"}))
    assert "Active" in said and "Neurons" in said and "24 of 40" in said
    assert "58,720" in said  # 77,152 less 16 neurons of 3 x 32 weights in 3 experts of 4 layers


def test_a_dense_model_has_no_column_for_experts():
    said = ptl("validate", TINY)
    assert "Experts" not in said and "active" not in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.path": str(DENSE)}, "a dense model has no experts"),
        ({"schedule.target": 0.9}, "cannot be reached by experts: each token is sent to 3 of them"),
        (
            {"schedule.target.speed": "1.5x"},
            "remove neurons or layers (prune.target=neurons): whole experts take no FLOPs with them but the router's",
        ),
        ({"prune.target": "neurons", "schedule.target": 0.9}, "cannot be reached by neurons: all but the FFNs are"),
    ],
)
def test_what_cannot_be_is_refused(small, changes, said):
    assert said in " ".join(ptl("validate", TINY, *with_model(small, **changes)).split())


def test_the_forecast_refuses_what_cannot_be_too(small):
    assert "at most 139,392 can be removed" in ptl("plan", TINY, *with_model(small, **{"schedule.target": 0.9}))
    assert "a dense model has no experts" in ptl("plan", TINY, "--set", "prune.target=experts")


def test_neurons_take_flops_with_them_and_experts_do_not(large):
    shape = shape_of(str(large))
    goal = shape.params - 48 * 128 * 3 * 2048 * 256  # a third of the 768 neurons of each expert
    narrow, fewer = shape.scaled(goal, "neurons"), shape.scaled(goal, "experts")
    assert narrow.matrices == shape.matrices - 48 * 8 * 3 * 2048 * 256
    assert (narrow.routed * 3, narrow.inactive * 3) == (shape.routed * 2, shape.inactive * 2)
    assert forward_flops(narrow, 1, 0) < 0.81 * forward_flops(fewer, 1, 0)


def test_the_forecast_counts_each_iterations_unit(large):
    settings = {"model.path": str(large), "prune.target": "neurons_then_layers", "schedule.target": 0.3}
    steps = forecast(load_config(TINY, settings), "h200").steps
    recovered = {step.step: step for step in steps if step.step.startswith("recover")}
    per_token = [recovered[f"recover-{i}"].flops / recovered[f"recover-{i}"].tokens for i in (2, 3, 4)]
    # The last iteration removes a fifth of the third one's parameters, and by layers, which are attention too.
    assert per_token[0] > per_token[1] > per_token[2]
    only = forecast(load_config(TINY, settings | {"prune.target": "neurons"}), "h200").steps
    last = next(step for step in only if step.step == "recover-4")
    assert last.params == recovered["recover-4"].params
    assert recovered["recover-4"].flops < last.flops


def test_the_forecast_refuses_more_than_the_experts_hold(large):
    config = load_config(TINY, {"model.path": str(large), "prune.target": "neurons", "schedule.target": 0.97})
    with pytest.raises(InputError, match="at most 28,991,029,247 can be removed"):
        forecast(config, "h200")


@pytest.mark.parametrize("times", [1.1, 1.4])
def test_a_goal_in_speed_is_reached_by_neurons_of_experts(small, times):
    dense = dense_model(small)
    params = target.params(SpeedGoal(speed=times), Prune(), small)
    (removed,) = [n for n in range(40) if dense.needs(n, "neurons").params == params]
    flops = [dense.needs(n, "neurons").flops_per_token for n in (0, removed - 1, removed)]
    assert flops[0] / flops[2] >= times > flops[0] / flops[1]


@pytest.mark.parametrize("mixed", ["neurons_then_layers"])
def test_neurons_and_layers_of_a_mixture_reach_the_speed_whatever_is_removed(small, mixed):
    dense = dense_model(small)
    params = target.params(SpeedGoal(speed=1.4), Prune(target=mixed), small)
    assert params == target.params(SpeedGoal(speed=1.4), Prune(), small)
    for layers in range(1, 5):
        shallow = replace(dense, sizes=replace(dense.sizes, num_hidden_layers=layers))
        reached = shallow.largest("neurons", lambda needs: needs.params <= params)
        assert reached is None or dense.needs().flops_per_token >= 1.4 * reached.flops_per_token


@pytest.mark.parametrize("mixed", ["neurons", "neurons_then_layers"])
def test_a_speed_that_neurons_of_experts_cannot_reach_is_refused_with_layers_as_the_remedy(large, mixed):
    with pytest.raises(InputError, match=r"with no FFN neuron left .* remove layers alone \(prune.target=layers\)"):
        target.params(SpeedGoal(speed=3), Prune(target=mixed), large)


def test_a_goal_in_memory_is_reached_by_experts(small):
    body = model_dimensions(small, FAMILIES["olmoe"])
    per_token = 2 * 4 * 2 * 8  # keys and values of 4 layers, 2 heads of 8
    least = with_experts(body, 5).params
    goal = MemoryGoal(memory=f"{2 * (least + 10 * per_token) / 1000}kB", tokens=10)
    assert target.params(goal, Prune(target="experts"), small) == least
    with pytest.raises(InputError, match="with the 3 experts that each token is sent to it is"):
        target.params(SpeedGoal(speed="2x"), Prune(target="experts"), small)


def test_prune_by_hand_removes_experts_where_the_config_does(small, tmp_path):
    settings = with_model(small, **{"schedule.target": 0.2, "calibration.num_sequences": 4})
    assert '"experts": 9' in ptl("prune", small, tmp_path / "one", "--config", TINY, *settings)
    by_option = ptl("prune", small, tmp_path / "two", "--config", TINY, "--unit", "experts", "--target", 0.2)
    assert '"criterion": "reap"' in by_option
    assert checkpoint.num_params(tmp_path / "one") == checkpoint.num_params(tmp_path / "two")
