"""Mixtures of experts, in both layouts that files have; what pruned ones compute is in tests/pruning/test_width.py."""

import copy
from dataclasses import replace

import pytest
import tiny_models
import torch
from tiny_models import MOE_VARIANTS, batches, build, change_config, family_at, load, logits, save
from torch.utils.flop_counter import FlopCounterMode

from ptl.errors import InputError
from ptl.model import checkpoint, dimensions, shapes
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.pruning.surgery import Selection, write_pruned

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = tuple(range(4))


@pytest.fixture
def source(variant, tmp_path):
    """A checkpoint in one of the layouts, the one or the other in turn."""
    return save(build(variant), tmp_path / "source", fused=[*MOE_VARIANTS].index(variant) % 2 == 1)


def expert_layers(model):
    return [
        i for i, layer in enumerate(model.get_decoder().layers) if hasattr(layer.mlp, "experts")
    ]


def test_experts_of_the_least_width_are_multiplied_in_groups(tmp_path):
    source = save(build("mixtral").bfloat16(), tmp_path / "source")
    neurons = dict.fromkeys(ALL, torch.arange(8).expand(6, -1))
    write_pruned(source, tmp_path / "pruned", FAMILIES["mixtral"], Selection(ALL, neurons))
    # not mapped: transformers avoids these
    model = copy.deepcopy(load(tmp_path / "pruned", dtype="auto"))
    assert torch.isfinite(logits(model, batches()[0])).all()


# ---- sizes


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_sizes_and_costs_are_those_of_the_real_model(variant, source):
    model, family, config = build(variant), family_at(source), checkpoint.read_config(source)
    body, static = model_dimensions(source, family), dimensions.static_cost(source)
    assert body == dimensions.dimensions_of(shapes.of_config(config, family, "config.json"))
    layers = expert_layers(model)
    layer = model.get_decoder().layers[layers[0]]
    assert body.params == tiny_models.num_parameters(model) == static.params
    assert body.params_per_layer == sum(tensor.numel() for tensor in layer.state_dict().values())
    parts = (layer.mlp.experts, tiny_models.router(layer))
    in_experts, in_router = (
        sum(tensor[0].numel() for tensor in part.state_dict().values()) for part in parts
    )
    assert body.params_per_expert == len(layers) * (in_experts + in_router)
    assert (
        body.active_params == body.params - len(layers) * (6 - body.experts_per_token) * in_experts
    )
    assert body.dense_layers == tuple(sorted({*ALL} - {*layers})) and static.experts == 6
    assert body.narrowable == (variant in tiny_models.NARROW_VARIANTS)
    assert body.narrowable == ("neurons" in dimensions.smallest_cuts(body, "auto"))

    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    # A layer with a window has 4 tokens.
    numbers = sum(
        (part.keys.numel() + part.values.numel()) // part.keys.shape[-2] for part in cache.layers
    )
    assert static.kv_bytes_per_token == 4 * numbers
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=False)
    assert counter.get_total_flops() == 7 * (
        static.flops_per_token + 14 * shapes.of_checkpoint(source, family).attention_width
    )


@pytest.mark.parametrize("variant", ["qwen3_moe", "olmoe", "glm4_moe"])
def test_as_many_experts_stay_as_the_goal_allows(source):
    body = model_dimensions(source, family_at(source))
    one = body.params_per_expert
    least = replace(body, experts=body.experts_per_token)
    for goal in (
        body.params,
        body.params + 1,
        body.params - 1,
        body.params - one,
        body.params - one - 1,
        least.params,
    ):
        exact = (goal - least.params) // one + body.experts_per_token
        assert dimensions.experts_for(body, goal) == min(6, exact), goal
    for size, too_small in ((dimensions.experts_for, least.params - 1), (dimensions.layers_for, 1)):
        with pytest.raises(InputError, match=r"^schedule\.target: "):
            size(body, too_small)
    neurons = (
        dict.fromkeys(("neurons", "width"), 8 * body.params_per_neuron) if body.narrowable else {}
    )
    cuts = {"layers": body.params_per_layer, "experts": one, "width": one} | neurons
    assert dimensions.smallest_cuts(body, "auto") == cuts
    assert dimensions.smallest_cuts(least, "auto").keys() == {"layers", *neurons}


def test_layers_without_experts_are_not_removed_nor_neurons_of_other_mixtures(tmp_path):
    body = model_dimensions(
        save(build("qwen3_moe-dense"), tmp_path / "source"), FAMILIES["qwen3_moe"]
    )
    assert (
        body.dense_layers == (2,)
        and dimensions.layers_for(body, body.params - 2 * body.params_per_layer) == 2
    )
    with pytest.raises(InputError, match="would remove 3 of 3 layers"):
        dimensions.layers_for(body, body.params - 2 * body.params_per_layer - 1)
    for unit in ("neurons", "auto", "neurons_then_layers"):
        with pytest.raises(
            InputError, match=rf"prune\.target: '{unit}' would prune neurons inside of experts"
        ):
            dimensions.check_unit(experts=6, narrowable=False, unit=unit, repair=0)
    for unit in ("layers", "experts", "width"):
        dimensions.check_unit(experts=6, narrowable=False, unit=unit, repair=0)


@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral"])
def test_as_many_neurons_stay_in_each_expert_as_the_goal_allows(variant, source):
    """With rows that are not whole 16 bytes torch's grouped_mm fails, which transformers uses by default."""
    body = model_dimensions(source, family_at(source))
    one, width = body.params_per_neuron, tiny_models.width_of(variant)
    assert one == 4 * 6 * 3 * tiny_models.SIZES["hidden_size"]
    assert dimensions.smallest_cuts(body, 8)["neurons"] == 8 * one
    for removed, multiples, expected in (
        (1, (1, 2, 8, "auto"), 8),
        (8 * one, (8,), 8),
        (8 * one + 1, (8,), 16),
    ):
        for multiple in multiples:
            assert (
                dimensions.width_for(body, body.params - removed, multiple) == width - expected
            ), (removed, multiple)
    with pytest.raises(
        InputError, match=r"cannot be reached by neurons: .*prune.width_multiple=8 needs at least"
    ):
        dimensions.width_for(body, body.params - (width - 7) * one, 8)
    assert dimensions.resolve_multiple(48, 40, 12, body.least_multiple) == 24
    assert dimensions.resolve_multiple(768, 600, "auto", body.least_multiple) == 64
    assert dimensions.resolve_multiple(20, 16, "auto", body.least_multiple) == 8


def test_the_sizes_of_published_models_are_those_that_their_authors_name():
    """Billions of parameters, and of those that a token meets, of the models that transformers' defaults describe."""
    for name, params, active in (
        ("qwen2_moe", 14.3, 2.7),  # Qwen1.5-MoE-A2.7B
        ("deepseek_v3", 671, 37),
        ("gpt_oss", 117, 5.7),  # gpt-oss-120b; 5.1 without the embeddings, as its authors count
        ("mixtral", 46.7, 12.9),  # Mixtral 8x7B
    ):
        body = dimensions.dimensions_of(
            shapes.of_config({"model_type": name}, FAMILIES[name], "config.json")
        )
        assert body.params / 1e9 == pytest.approx(params, rel=0.01), name
        assert body.active_params / 1e9 == pytest.approx(active, rel=0.05), name


# ---- files


def test_layers_that_guess_further_tokens_are_left_behind(tmp_path):
    model = build("glm4_moe")
    source, family = save(model, tmp_path / "source"), FAMILIES["glm4_moe"]
    plain = model_dimensions(source, family)
    extra = {"model.layers.4.eh_proj.weight": torch.ones(32, 64)}
    weights = dict(checkpoint.tensors(source / checkpoint.WEIGHTS))
    checkpoint.write_shard(source / checkpoint.WEIGHTS, weights | extra)
    change_config(source, num_nextn_predict_layers=1)
    assert (
        model_dimensions(source, family) == plain
        and dimensions.static_cost(source).params == plain.params
    )
    write_pruned(source, tmp_path / "pruned", family, Selection(ALL, {}))
    assert checkpoint.contents(tmp_path / "pruned").keys() == weights.keys()
    assert checkpoint.read_config(tmp_path / "pruned")["num_nextn_predict_layers"] == 0
    assert torch.equal(logits(load(tmp_path / "pruned"), batches()[0]), logits(model, batches()[0]))


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_each_name_of_the_number_of_experts_is_read_and_written(variant, source, tmp_path):
    names = family_at(source).experts.counts
    experts = dict.fromkeys(expert_layers(build(variant)), torch.tensor([0, 2, 3, 5]))
    for present in filter(None, (names[:1], names[1:2], names[2:], names)):
        change_config(source, **dict.fromkeys(names, ...) | dict.fromkeys(present, 6))
        folder = tmp_path / "-".join(present)
        write_pruned(source, folder, family_at(source), Selection(ALL, {}, experts))
        after = checkpoint.read_config(folder)
        assert {name: after[name] for name in names if name in after} == dict.fromkeys(present, 4)
        assert model_dimensions(folder, family_at(source)).experts == 4


def test_a_config_that_does_not_fit_the_experts_is_named(tmp_path):
    for variant, changes, said in (
        ("olmoe", {"num_experts": 5}, "num_experts=5"),
        ("olmoe", {"num_experts_per_tok": 7}, "of which num_experts_per_tok=7 cannot be chosen"),
        (
            "mixtral",
            {"num_local_experts": 7},
            "lacks tensor model.layers.0.block_sparse_moe.experts.6.w1.weight",
        ),
        ("qwen3_moe", {"moe_intermediate_size": 48}, "moe_intermediate_size=48"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "lacks tensor model.layers.0.mlp.down_proj.weight"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "has no layer with experts"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "Mxfp4Config(dequantize=True)",
        ),
        ("deepseek_v3", {"kv_lora_rank": 12}, "kv_lora_rank=12"),
        (
            "deepseek_v3",
            {"n_group": 4},
            "num_experts_per_tok=2 cannot be chosen (n_group=4, topk_group=1)",
        ),
        (
            "deepseek_v3",
            {"n_routed_experts": 7, "n_group": 3, "topk_group": 3},
            "7 experts in each layer, of which",
        ),
    ):
        source = change_config(
            save(build(variant), tmp_path / "source", fused=variant == "olmoe"), **changes
        )
        with pytest.raises(InputError) as refused:
            model_dimensions(source, family_at(source))
        assert said in str(refused.value)
