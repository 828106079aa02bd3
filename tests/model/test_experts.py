"""Mixtures of experts, cut right: the same statements on a tiny random model of each family, in both layouts."""

import json
from unittest import mock

import pytest
import torch
from tiny_models import MOE_VARIANTS, batches, build, logits, save
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ptl.errors import InputError
from ptl.model import checkpoint, dimensions, shapes
from ptl.model.dimensions import (
    dimensions_of,
    experts_for,
    layers_for,
    model_dimensions,
    smallest_cuts,
    with_experts,
)
from ptl.model.families import FAMILIES, family_of
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.surgery import Selection, write_pruned

pytestmark = pytest.mark.usefixtures("one_thread")
# Experts add up in another order: logits of size ~10 may differ by a few units in the last place.
SUMMATION = {"rtol": 1e-4, "atol": 2e-4}
ALL = tuple(range(4))
KEPT = {0: [0, 2, 5, 3], 1: [1, 2, 3, 4], 2: [0, 1, 4, 5], 3: [0, 3, 4, 5]}


@pytest.fixture(params=MOE_VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def model(variant):
    return build(variant)


@pytest.fixture(params=["separate", "fused"])
def source(request, model, tmp_path):
    return save(model, tmp_path / "source", fused=request.param == "fused")


def router(layer):
    return layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate


def expert_layers(model):
    """The numbers of the layers that have experts."""
    return [i for i, layer in enumerate(model.get_decoder().layers) if hasattr(layer.mlp, "experts")]


def four_experts(model):
    """Four of the six experts of each layer that has them."""
    return {i: torch.tensor(KEPT[i]).sort().values for i in expert_layers(model)}


def num_parameters(model):
    """Parameters, and the routers' corrections, which transformers counts as buffers."""
    corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return model.num_parameters() + sum(map(torch.numel, corrections))


def family_at(folder):
    return family_of(checkpoint.read_config(folder))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def masked(model, experts):
    """The original model whose routers give the experts outside `experts` a logit of minus infinity: the reference."""
    for i, kept in experts.items():
        gate = router(model.get_decoder().layers[i])
        pruned = torch.ones(len(gate.weight), dtype=torch.bool)
        pruned[kept] = False
        if hasattr(gate, "e_score_correction_bias"):  # the scores that choose have it added
            gate.e_score_correction_bias[pruned] = -torch.inf
            continue

        def forward(hidden, gate=gate, pruned=pruned):
            plain = torch.nn.functional.linear
            with mock.patch("torch.nn.functional.linear", lambda *given: plain(*given).masked_fill(pruned, -torch.inf)):
                return type(gate).forward(gate, hidden)

        gate.forward = forward
    return model


def test_a_cut_equals_the_model_whose_routers_avoid_the_experts(model, source, tmp_path):
    family = family_at(source)
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, {}, four_experts(model)))
    cut, whole = load(tmp_path / "cut"), logits(model, batches()[0])
    reference = masked(model, four_experts(model))
    for batch in batches():
        torch.testing.assert_close(logits(cut, batch), logits(reference, batch), **SUMMATION)
    assert not torch.allclose(whole, logits(reference, batches()[0]), **SUMMATION)  # the reference is another model
    assert num_parameters(cut) == model_dimensions(tmp_path / "cut", family).params < num_parameters(model)
    assert {len(router(cut.get_decoder().layers[i]).weight) for i in expert_layers(cut)} == {4}


def test_keeping_everything_changes_no_logit_and_no_config(model, source, tmp_path):
    everything = {i: torch.arange(6) for i in expert_layers(model)}
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(ALL, {}, everything))
    cut, reference = load(tmp_path / "cut"), load(source)
    for batch in batches():
        assert torch.equal(logits(cut, batch), logits(reference, batch))
    assert json.loads((tmp_path / "cut/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_layer_cut_equals_the_model_that_skips_the_layers(model, source, tmp_path):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((0, 3), {}))
    cut = load(tmp_path / "cut")
    for i in (1, 2):
        model.get_decoder().layers[i].forward = lambda hidden, *_args, **_kwargs: hidden
    for batch in batches():
        torch.testing.assert_close(logits(cut, batch), logits(model, batch), **SUMMATION)


@pytest.mark.parametrize("fused", [False, True])
def test_shards_and_bfloat16_are_cut_as_a_single_file_is(variant, fused, tmp_path):
    model = build(variant).bfloat16()
    experts = four_experts(model)
    family, cut = FAMILIES[MOE_VARIANTS[variant][0]], Selection(ALL, {}, experts)
    for name, size in (("single", "5GB"), ("sharded", "16KB")):
        write_pruned(save(model, tmp_path / name, size, fused=fused), tmp_path / f"{name}-cut", family, cut)
    assert len(checkpoint.shards(tmp_path / "sharded-cut")) > 3
    single, sharded = (load(tmp_path / f"{name}-cut", dtype="auto") for name in ("single", "sharded"))
    assert sharded.dtype == torch.bfloat16 and sharded.num_parameters() == single.num_parameters()
    for (name, one), (_, other) in zip(single.named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    # No tensor is computed anew: the bits are those of the original.
    for i, kept in experts.items():
        before, after = (part.get_decoder().layers[i] for part in (model, sharded))
        assert torch.equal(after.mlp.experts.gate_up_proj, before.mlp.experts.gate_up_proj[kept])
        assert torch.equal(after.mlp.experts.down_proj, before.mlp.experts.down_proj[kept])
        assert torch.equal(router(after).weight, router(before).weight[kept])
    # In float32: in bfloat16 two experts may have equal logits, and rounding decides between them.
    reference = masked(load(tmp_path / "single", dtype=torch.float32), experts)
    exact = load(tmp_path / "sharded-cut", dtype=torch.float32)
    for batch in batches():
        torch.testing.assert_close(logits(exact, batch), logits(reference, batch), **SUMMATION)


def test_generation_with_the_cache_equals_generation_without(model, source, tmp_path):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((1, 2, 3), {}, four_experts(model)))
    cut, prompt = load(tmp_path / "cut"), batches(((9, 9),))[0]["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, plain = (cut.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.shape == (2, 21) and torch.equal(cached, plain)


def test_saved_again_by_transformers_it_is_the_same(model, source, tmp_path):
    family = family_at(source)
    write_pruned(source, tmp_path / "cut", family, Selection((0, 2, 3), {}, four_experts(model)))
    load(tmp_path / "cut").save_pretrained(tmp_path / "again")
    assert model_dimensions(tmp_path / "again", family) == model_dimensions(tmp_path / "cut", family)
    batch = batches()[0]
    torch.testing.assert_close(logits(load(tmp_path / "again"), batch), logits(load(tmp_path / "cut"), batch))


def test_optimizer_state_is_cut_with_the_weights(variant, model, tmp_path):
    source = save(model, tmp_path / "source")
    moments = {f"exp_avg.{name}": parameter.detach() * 3 for name, parameter in model.named_parameters()}
    checkpoint.write_shard(source / checkpoint.STATE, moments)
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((1, 3), {}, four_experts(model)))
    stored = dict(checkpoint.tensors(tmp_path / "cut" / checkpoint.STATE))
    cut = load(tmp_path / "cut")
    assert stored.keys() == {f"exp_avg.{name}" for name, _ in cut.named_parameters()}
    for name, parameter in cut.named_parameters():
        assert torch.equal(stored[f"exp_avg.{name}"], parameter * 3), name


def test_a_stream_computes_what_the_whole_model_does(model, source):
    stream = LayerwiseModel(source, family_at(source), batches())
    states = stream.embed()
    with torch.no_grad():
        for i in ALL:
            with stream.layer(i):
                states = [stream.run(i, b, hidden) for b, hidden in enumerate(states)]
        with stream.head():
            loss = stream.loss(0, 0, states[0][:1])
    batch = batches()[0]
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1]).logits
    expected = torch.nn.functional.cross_entropy(whole[0, :-1], batch["labels"][0, 1:], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.device.type == "meta" for parameter in stream.causal_lm.parameters())


def test_sizes_are_those_of_the_real_model(variant, model, source):
    family, config = family_at(source), checkpoint.read_config(source)
    body = model_dimensions(source, family)
    assert body == dimensions_of(shapes.of_config(config, family, "config.json"))
    layer = model.get_decoder().layers[expert_layers(model)[0]]
    assert body.params == num_parameters(model) == dimensions.static_cost(source).params
    assert body.params_per_layer == sum(tensor.numel() for tensor in layer.state_dict().values())
    in_experts, in_router = (
        sum(tensor[0].numel() for tensor in part.state_dict().values()) for part in (layer.mlp.experts, router(layer))
    )
    layers = len(expert_layers(model))
    assert body.params_per_expert == layers * (in_experts + in_router)
    unused = 6 - body.experts_per_token
    assert body.active_params == body.params - layers * unused * in_experts
    assert body.dense_layers == tuple(sorted({*ALL} - {*expert_layers(model)}))


def test_sizes_after_a_cut_are_those_that_were_planned(model, source, tmp_path):
    family = family_at(source)
    planned = with_experts(model_dimensions(source, family), 4)
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, {}, four_experts(model)))
    assert model_dimensions(tmp_path / "cut", family) == planned


def test_flops_are_those_of_the_experts_in_use(model, source):
    static = dimensions.static_cost(source)
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    for length in (1, 7):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
        assert counter.get_total_flops() == length * (static.flops_per_token + length * static.attention_flops)
    assert static.experts == 6


def test_kv_bytes_are_those_of_a_real_cache(model, source):
    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    # A layer with a window has 4 tokens.
    numbers = sum((layer.keys.numel() + layer.values.numel()) // layer.keys.shape[-2] for layer in cache.layers)
    assert dimensions.static_cost(source).kv_bytes_per_token == 4 * numbers


def test_as_many_experts_stay_as_the_goal_allows(source):
    body = model_dimensions(source, family_at(source))
    one = body.params_per_expert
    assert experts_for(body, body.params) == 6
    assert experts_for(body, body.params - 1) == experts_for(body, body.params - one) == 5
    assert experts_for(body, body.params - one - 1) == 4
    least = with_experts(body, body.experts_per_token)
    assert experts_for(body, least.params) == body.experts_per_token
    with pytest.raises(InputError, match=r"cannot be reached by experts: each token needs \d of them in each layer"):
        experts_for(body, least.params - 1)
    for too_far in (experts_for, layers_for):
        with pytest.raises(InputError, match=r"or set another prune\.target"):
            too_far(body, 1)
    neurons = {"neurons": 8 * body.params_per_neuron} if body.narrowable else {}
    assert smallest_cuts(body, "auto") == {"layers": body.params_per_layer, "experts": one} | neurons
    assert smallest_cuts(least, "auto").keys() == {"layers", *neurons}


def test_layers_without_experts_are_not_removed(tmp_path):
    body = model_dimensions(save(build("qwen3_moe-dense"), tmp_path / "source"), FAMILIES["qwen3_moe"])
    assert body.dense_layers == (2,) and layers_for(body, body.params - 2 * body.params_per_layer) == 2
    with pytest.raises(InputError, match="would remove 3 of 3 layers"):
        layers_for(body, body.params - 3 * body.params_per_layer)


def test_as_many_experts_stay_in_each_group_that_a_router_chooses(tmp_path):
    model = build("deepseek_v3", n_routed_experts=12, n_group=3, topk_group=2)
    source = save(model, tmp_path / "source")
    body = model_dimensions(source, family_at(source))
    one = body.params_per_expert
    assert experts_for(body, body.params - one) == experts_for(body, body.params - 3 * one) == 9
    assert smallest_cuts(body, "auto")["experts"] == 3 * one
    # A group is chosen by its two best experts.
    assert experts_for(body, body.params - 6 * one) == 6
    with pytest.raises(InputError, match="each token needs 6 of them in each layer"):
        experts_for(body, body.params - 6 * one - 1)
    kept = dict.fromkeys(expert_layers(model), torch.tensor([0, 2, 3, 4, 5, 7, 9, 10, 11]))
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(ALL, {}, kept))
    cut, reference = load(tmp_path / "cut"), masked(model, kept)
    for batch in batches():
        torch.testing.assert_close(logits(cut, batch), logits(reference, batch), **SUMMATION)


def test_layers_that_guess_further_tokens_are_left_behind(tmp_path):
    model = build("glm4_moe")
    source, family = save(model, tmp_path / "source"), FAMILIES["glm4_moe"]
    plain = model_dimensions(source, family)
    extra = {
        "model.layers.4.eh_proj.weight": torch.ones(32, 64),
        "model.layers.4.mlp.experts.0.up_proj.weight": torch.ones(24, 32),
    }
    weights = dict(checkpoint.tensors(source / checkpoint.WEIGHTS))
    checkpoint.write_shard(source / checkpoint.WEIGHTS, weights | extra)
    changed(source, num_nextn_predict_layers=1)
    assert model_dimensions(source, family) == plain and dimensions.static_cost(source).params == plain.params
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, {}))
    assert checkpoint.contents(tmp_path / "cut").keys() == weights.keys()
    assert checkpoint.read_config(tmp_path / "cut")["num_nextn_predict_layers"] == 0
    assert torch.equal(logits(load(tmp_path / "cut"), batches()[0]), logits(model, batches()[0]))


def test_a_router_may_have_float32_beside_weights_in_bfloat16(tmp_path):
    model = build("glm4_moe").bfloat16()
    for i in expert_layers(model):
        model.get_decoder().layers[i].mlp.gate.float()
    source, family = save(model, tmp_path / "source"), FAMILIES["glm4_moe"]
    assert {entry.dtype for entry in checkpoint.contents(source).values()} == {"BF16", "F32"}
    experts = four_experts(model)
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, {}, experts))
    gate = load(tmp_path / "cut", dtype="auto").get_decoder().layers[3].mlp.gate
    assert torch.equal(gate.weight, model.get_decoder().layers[3].mlp.gate.weight[experts[3]])
    weights = dict(checkpoint.tensors(source / checkpoint.WEIGHTS))
    checkpoint.write_shard(source / checkpoint.WEIGHTS, weights | {"model.norm.weight": torch.ones(32).int()})
    with pytest.raises(InputError, match=r"model\.norm\.weight .* is I32"):
        model_dimensions(source, family)


# Of models on the hub, as their config.json says it: fields, billions of parameters, billions that a token meets
PUBLISHED = {
    "Qwen1.5-MoE-A2.7B": (
        {
            **{"model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
            **{"num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408},
            **{"shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4},
            **{"vocab_size": 151936, "decoder_sparse_step": 1},
        },
        *(14.3, 2.7),
    ),
    "GLM-4.5-Air": (
        {
            **{"model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96},
            **{"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408},
            **{"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1},
            **{"topk_group": 1, "first_k_dense_replace": 1, "attention_bias": True, "vocab_size": 151552},
            **{"num_nextn_predict_layers": 1},
        },
        *(106, 13.4),  # 12 without embeddings and output layer
    ),
    "DeepSeek-V3": (
        {
            **{"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128},
            **{"num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048},
            **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8},
            **{"topk_group": 4, "first_k_dense_replace": 3, "vocab_size": 129280, "q_lora_rank": 1536},
            **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
        },
        *(671, 37),
    ),
    "gpt-oss-20b": (
        {
            **{"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64},
            **{"num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32},
            **{"num_experts_per_tok": 4, "vocab_size": 201088},
        },
        *(20.9, 4.2),  # 3.6 without the embeddings, as its authors count
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_of_published_models_are_those_that_their_authors_name(name):
    config, params, active = PUBLISHED[name]
    body = dimensions_of(shapes.of_config(config, family_of(config), "config.json"))
    assert body.params / 1e9 == pytest.approx(params, rel=0.01)
    assert body.active_params / 1e9 == pytest.approx(active, rel=0.05)


def changed(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize("chosen", [slice(1), slice(1, 2), slice(2)], ids=["first", "second", "both"])
def test_each_name_of_the_number_of_experts_is_read_and_written(variant, tmp_path, chosen):
    model = build(variant)
    names = FAMILIES[MOE_VARIANTS[variant][0]].experts.counts
    present = names[chosen] or names
    source = changed(save(model, tmp_path / "source"), **dict.fromkeys(names, ...) | dict.fromkeys(present, 6))
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(ALL, {}, four_experts(model)))
    after = json.loads((tmp_path / "cut/config.json").read_text())
    assert {name: after[name] for name in names if name in after} == dict.fromkeys(present, 4)
    assert len(router(load(tmp_path / "cut").get_decoder().layers[expert_layers(model)[0]]).weight) == 4


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("olmoe", {"num_experts": 5}, "num_experts=5"),
        ("mixtral", {"num_local_experts": 7}, "lacks tensor model.layers.0.block_sparse_moe.experts.6.w1.weight"),
        ("mixtral", {"intermediate_size": 48}, "intermediate_size=48"),
        ("qwen3_moe", {"moe_intermediate_size": 48}, "moe_intermediate_size=48"),
        (
            "olmoe",
            {"num_experts_per_tok": 7},
            "6 experts in each layer, of which num_experts_per_tok=7 cannot be chosen",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "lacks tensor model.layers.0.mlp.down_proj.weight"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "lacks tensor model.layers.0.mlp.down_proj.weight"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "transformers cannot read config.json in "),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "has no layer with experts"),
        ("qwen3_moe-dense", {"intermediate_size": 48}, " intermediate_size=48,"),
        ("glm4_moe", {"n_shared_experts": 2}, "n_shared_experts=2"),
        ("glm4_moe", {"first_k_dense_replace": 1}, "lacks tensor model.layers.1.mlp.experts.0.down_proj.weight"),
        ("deepseek_v3", {"kv_lora_rank": 12}, "kv_lora_rank=12"),
        ("deepseek_v3", {"qk_rope_head_dim": 3}, "qk_rope_head_dim=3"),
        ("deepseek_v3", {"q_lora_rank": None}, "lacks tensor model.layers.0.self_attn.q_proj.weight"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "Mxfp4Config(dequantize=True)"),
        ("gpt_oss", {"num_local_experts": 5}, "num_local_experts=5"),
        ("deepseek_v3", {"n_group": 4}, "num_experts_per_tok=2 cannot be chosen (n_group=4, topk_group=1)"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 48}, "shared_expert_intermediate_size=48"),
    ],
)
def test_a_config_that_does_not_fit_the_experts_is_named(tmp_path, variant, changes, said):
    source = changed(save(build(variant), tmp_path / "source", fused=variant == "olmoe"), **changes)
    with pytest.raises(InputError) as refused:
        model_dimensions(source, family_at(source))
    assert said in str(refused.value)


def test_every_mixture_of_experts_is_tested():
    assert {model_type for model_type, _ in MOE_VARIANTS.values()} == {
        name for name, family in FAMILIES.items() if family.experts
    }
