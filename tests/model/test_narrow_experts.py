"""Neurons inside experts, removed right: the same statements on a tiny mixture of each family, in both layouts."""

import copy
import json

import pytest
import torch
from tiny_models import MOE_VARIANTS, NARROW_VARIANTS, SIZES, batches, build, logits, save
from transformers import AutoModelForCausalLM

from ptl.errors import InputError
from ptl.model import checkpoint, dimensions
from ptl.model.dimensions import (
    check_unit,
    model_dimensions,
    resolve_multiple,
    smallest_cuts,
    width_for,
    with_experts,
    with_width,
)
from ptl.model.families import FAMILIES, family_of
from ptl.pruning.surgery import Selection, write_pruned

pytestmark = pytest.mark.usefixtures("one_thread")
SUMMATION = {"rtol": 1e-4, "atol": 2e-4}  # as in test_experts.py
ALL = tuple(range(4))
NARROW = 16


@pytest.fixture(params=NARROW_VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def model(variant):
    return build(variant)


@pytest.fixture(params=["separate", "fused"])
def source(request, model, tmp_path):
    return save(model, tmp_path / "source", fused=request.param == "fused")


def family_at(folder):
    return family_of(checkpoint.read_config(folder))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def width_of(variant):
    return MOE_VARIANTS[variant][1].get("moe_intermediate_size", SIZES["intermediate_size"])


def some_neurons(variant, layers=ALL):
    """Other neurons in every expert of every layer: int64 [experts, NARROW]."""
    generator = torch.Generator().manual_seed(7)
    orders = torch.rand(len(layers), 6, width_of(variant), generator=generator).argsort(dim=-1)
    return dict(zip(layers, orders[..., :NARROW].sort(dim=-1).values, strict=True))


def masked(model, neurons):
    """The original model whose neurons outside `neurons` give nothing: the reference."""
    for i, kept in neurons.items():
        down = model.get_decoder().layers[i].mlp.experts.down_proj  # [E, H, F]
        keep = torch.zeros(len(down), down.shape[-1]).scatter(1, kept, 1.0)  # [E, F]
        with torch.no_grad():
            down *= keep[:, None]
    return model


def test_a_narrow_model_equals_the_whole_one_with_masked_neurons(variant, model, source, tmp_path):
    family, neurons = family_at(source), some_neurons(variant)
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, neurons))
    cut, whole = load(tmp_path / "cut"), logits(model, batches()[0])
    reference = masked(model, neurons)
    for batch in batches():
        torch.testing.assert_close(logits(cut, batch), logits(reference, batch), **SUMMATION)
    assert not torch.allclose(whole, logits(reference, batches()[0]), **SUMMATION)  # the reference is another model
    assert cut.num_parameters() == model_dimensions(tmp_path / "cut", family).params < model.num_parameters()
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "cut"))
    assert after == before | {family.experts.width: NARROW}


def test_keeping_all_neurons_changes_no_logit_and_no_config(variant, source, tmp_path):
    everything = torch.arange(width_of(variant)).expand(6, -1)
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(ALL, dict.fromkeys(ALL, everything)))
    cut, reference = load(tmp_path / "cut"), load(source)
    for batch in batches():
        assert torch.equal(logits(cut, batch), logits(reference, batch))
    assert json.loads((tmp_path / "cut/config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_shards_and_bfloat16_are_narrowed_as_a_single_file_is(variant, fused, tmp_path):
    model, neurons = build(variant).bfloat16(), some_neurons(variant)
    for name, size in (("single", "5GB"), ("sharded", "16KB")):
        source = save(model, tmp_path / name, size, fused=fused)
        write_pruned(source, tmp_path / f"{name}-cut", FAMILIES[variant], Selection(ALL, neurons))
    assert len(checkpoint.shards(tmp_path / "sharded-cut")) > 3
    single, sharded = (load(tmp_path / f"{name}-cut", dtype="auto") for name in ("single", "sharded"))
    assert sharded.dtype == torch.bfloat16
    for (name, one), (_, other) in zip(single.named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    # No tensor is computed anew: the bits are those of the original, gate and up cut alike.
    width = width_of(variant)
    for i, kept in neurons.items():
        before, after = (part.get_decoder().layers[i].mlp.experts for part in (model, sharded))
        for expert, its_neurons in enumerate(kept):
            rows = torch.cat([its_neurons, its_neurons + width])
            assert torch.equal(after.gate_up_proj[expert], before.gate_up_proj[expert][rows])
            assert torch.equal(after.down_proj[expert], before.down_proj[expert][:, its_neurons])
    reference, exact = (load(tmp_path / name, dtype=torch.float32) for name in ("single", "sharded-cut"))
    masked(reference, neurons)
    for batch in batches():
        torch.testing.assert_close(logits(exact, batch), logits(reference, batch), **SUMMATION)


def test_neurons_and_layers_go_together(variant, model, source, tmp_path):
    neurons = some_neurons(variant, (0, 3))
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((0, 3), neurons))
    reference = masked(model, neurons)
    for i in (1, 2):
        reference.get_decoder().layers[i].forward = lambda hidden, *_args, **_kwargs: hidden
    for batch in batches():
        torch.testing.assert_close(logits(load(tmp_path / "cut"), batch), logits(reference, batch), **SUMMATION)


def test_generation_with_the_cache_of_a_narrow_model_equals_generation_without(variant, source, tmp_path):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(ALL, some_neurons(variant)))
    cut, prompt = load(tmp_path / "cut"), batches(((9, 9),))[0]["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, plain = (cut.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.shape == (2, 21) and torch.equal(cached, plain)


def test_a_narrow_model_saved_again_by_transformers_is_the_same(variant, source, tmp_path):
    family = family_at(source)
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, some_neurons(variant)))
    load(tmp_path / "cut").save_pretrained(tmp_path / "again")
    assert model_dimensions(tmp_path / "again", family) == model_dimensions(tmp_path / "cut", family)
    batch = batches()[0]
    torch.testing.assert_close(logits(load(tmp_path / "again"), batch), logits(load(tmp_path / "cut"), batch))


def test_optimizer_state_is_narrowed_with_the_weights(variant, model, source, tmp_path):
    moments = {f"exp_avg.{name}": parameter.detach() * 3 for name, parameter in model.named_parameters()}
    checkpoint.write_shard(source / checkpoint.STATE, moments)
    write_pruned(source, tmp_path / "cut", FAMILIES[variant], Selection((0, 2), some_neurons(variant, (0, 2))))
    stored = dict(checkpoint.tensors(tmp_path / "cut" / checkpoint.STATE))
    cut = load(tmp_path / "cut")
    assert stored.keys() == {f"exp_avg.{name}" for name, _ in cut.named_parameters()}
    for name, parameter in cut.named_parameters():
        assert torch.equal(stored[f"exp_avg.{name}"], parameter * 3), name


# ---- sizes


def test_sizes_after_narrowing_are_those_that_were_planned(variant, source, tmp_path):
    family = family_at(source)
    planned = with_width(model_dimensions(source, family), NARROW)
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, some_neurons(variant)))
    assert model_dimensions(tmp_path / "cut", family) == planned


@pytest.mark.parametrize("other", [name for name in MOE_VARIANTS if name not in NARROW_VARIANTS])
def test_neurons_of_other_mixtures_are_refused(other, tmp_path):
    body = model_dimensions(save(build(other), tmp_path), FAMILIES[MOE_VARIANTS[other][0]])
    assert not body.narrowable and "neurons" not in smallest_cuts(body, "auto")
    for unit in ("neurons", "auto", "neurons_then_layers"):
        with pytest.raises(InputError, match=rf"prune\.target: '{unit}' would prune neurons inside of experts"):
            check_unit(body.experts, body.narrowable, unit)
    check_unit(body.experts, body.narrowable, "layers")


def test_experts_and_neurons_are_planned_in_any_order(source):
    body = model_dimensions(source, family_at(source))
    assert with_experts(with_width(body, 16), 4) == with_width(with_experts(body, 4), 16)


def test_as_many_neurons_stay_in_each_expert_as_the_goal_allows(variant, source):
    body = model_dimensions(source, family_at(source))
    one = body.params_per_neuron
    assert one == 4 * 6 * 3 * SIZES["hidden_size"]
    width = width_of(variant)
    assert width_for(body, body.params - 1, 8) == width_for(body, body.params - 8 * one, 8) == width - 8
    assert width_for(body, body.params - 8 * one - 1, 8) == width - 16
    assert smallest_cuts(body, 8)["neurons"] == 8 * one
    with pytest.raises(InputError, match=r"cannot be reached by neurons: .*prune.width_multiple=8 needs at least"):
        width_for(body, body.params - (width - 7) * one, 8)


def test_widths_of_experts_are_always_ones_that_torch_multiplies_in_groups(variant, source):
    """With rows that are not whole 16 bytes torch's grouped_mm fails, which transformers uses by default."""
    body = model_dimensions(source, family_at(source))
    for multiple in (1, 2, 8, "auto"):
        assert width_for(body, body.params - 1, multiple) == width_of(variant) - 8
    assert resolve_multiple(48, 40, 12, body.least_multiple) == 24
    assert resolve_multiple(768, 600, "auto", body.least_multiple) == 64
    assert resolve_multiple(20, 16, "auto", body.least_multiple) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_of_the_least_width_are_multiplied_in_groups(variant, dtype, tmp_path):
    narrow = {i: kept[:, :8] for i, kept in some_neurons(variant).items()}
    source = save(build(variant).to(dtype), tmp_path / "source")
    write_pruned(source, tmp_path / "cut", FAMILIES[variant], Selection(ALL, narrow))
    model = copy.deepcopy(load(tmp_path / "cut", dtype=dtype))  # not mapped from its file, which transformers avoids
    assert torch.isfinite(logits(model, batches()[0])).all()


def test_the_costs_of_a_narrow_model_are_those_of_the_plan(variant, source, tmp_path):
    family, width = family_at(source), width_of(variant)
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, some_neurons(variant)))
    before, after = dimensions.static_cost(source), dimensions.static_cost(tmp_path / "cut")
    # Of a neuron each token meets three weights in each of its experts.
    met = 4 * 3 * SIZES["hidden_size"] * checkpoint.read_config(source)["num_experts_per_tok"] * (width - NARROW)
    assert before.flops_per_token - after.flops_per_token == 2 * met
    assert before.active_params - after.active_params == met
    assert (after.widths, after.experts, after.kv_bytes_per_token) == ([NARROW] * 4, 6, before.kv_bytes_per_token)
