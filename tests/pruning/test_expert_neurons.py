"""Neurons inside experts: scores against the whole model, then one checkpoint in and a narrower one out."""

from dataclasses import replace

import pytest
import torch
from recovering import prune_to
from tiny_models import (
    NARROW_VARIANTS,
    batches,
    build,
    changes_by_removal,
    family_at,
    load,
    logits,
    save,
    width_of,
)

from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.pruning.experts import CRITERIA_OF_NEURONS
from ptl.pruning.importance import keep_highest, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- scores


@pytest.mark.parametrize("variant", NARROW_VARIANTS)
def test_scores_are_the_change_of_the_layers_output_when_the_neuron_is_removed(variant, tmp_path):
    model, some = build(variant), range(0, width_of(variant), 6)
    stream = LayerwiseModel(save(model, tmp_path, tokenizer=False), FAMILIES[variant], batches())
    scores = torch.stack(neuron_scores(stream, "max", seed=0))
    torch.testing.assert_close(
        scores[..., some], changes_by_removal(stream, some), rtol=1e-3, atol=1e-4
    )
    for scores, layer in zip(
        neuron_scores(stream, "weight", seed=0), model.get_decoder().layers, strict=True
    ):
        experts = layer.mlp.experts  # a neuron has a row of gate, one of up and a column of down
        parts = (*experts.gate_up_proj.chunk(2, dim=1), experts.down_proj.mT)
        torch.testing.assert_close(scores, torch.cat(parts, dim=2).norm(dim=2).detach())


def test_an_expert_without_tokens_keeps_its_largest_weights(tmp_path):
    source = save(build("qwen3_moe"), tmp_path, tokenizer=False)
    # three tokens do not reach all experts
    stream = LayerwiseModel(source, FAMILIES["qwen3_moe"], batches(((3,),)))
    weights = torch.stack(neuron_scores(stream, "weight", seed=0))
    for criterion in ("max", "taylor"):
        scores = torch.stack(neuron_scores(stream, criterion, seed=0))
        silent = scores.amax(dim=-1) < 1e-20  # [layers, experts]
        assert silent.any() and not silent.all() and (scores[silent] > 0).all(), criterion
        assert torch.equal(keep_highest(scores[silent], 12), keep_highest(weights[silent], 12)), (
            criterion
        )


@pytest.mark.parametrize("variant", ["qwen2_moe", "mixtral"])
def test_both_layouts_and_bfloat16_have_the_same_scores(variant, tmp_path):
    model = build(variant).bfloat16()
    folders = [
        save(model, tmp_path / f"{fused}", tokenizer=False, fused=fused) for fused in (False, True)
    ]
    for criterion in CRITERIA_OF_NEURONS:
        one, other = (
            neuron_scores(LayerwiseModel(at, FAMILIES[variant], batches()), criterion, 0)
            for at in folders
        )
        assert all(
            torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(one, other, strict=True)
        ), criterion


# ---- one step


def prune(source, calibration, folder, width=16, **settings):
    goal = replace(model_dimensions(source, family_at(source)), width=width).params
    return prune_to(goal, source, folder, calibration, **settings)


@pytest.mark.parametrize(
    ("variant", "criterion"),
    [("qwen3_moe", "max"), ("qwen2_moe", "taylor"), ("olmoe", "taylor"), ("mixtral", "max")],
)
def test_dead_neurons_are_pruned_without_any_change_of_the_logits(
    variant, criterion, calibration, tmp_path
):
    model, width = build(variant), width_of(variant)
    model.config.output_router_logits = True  # as a training with the routers' loss leaves it
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for expert in range(6):
                layer.mlp.experts.down_proj[expert][:, expert : expert + width - 16] = 0
    source = save(model, tmp_path / "source", "16KB")
    report = prune(source, calibration, tmp_path / "pruned", criterion=criterion)
    assert (report.unit, report.criterion, report.experts, report.widths) == (
        "neurons",
        criterion,
        6,
        (16,) * 4,
    )
    assert (
        report.params
        == report.goal
        == model_dimensions(tmp_path / "pruned", FAMILIES[variant]).params
    )
    for batch in batches():
        expected = logits(model, batch)
        torch.testing.assert_close(
            logits(load(tmp_path / "pruned"), batch), expected, rtol=1e-4, atol=2e-4
        )
    rounded = prune(source, calibration, tmp_path / "rounded", width=19, width_multiple=1)
    assert rounded.widths == (16,) * 4  # torch multiplies no other widths in groups


def test_a_narrow_mixture_is_pruned_again_by_neurons_and_by_experts(calibration, tmp_path):
    prune(save(build("qwen2_moe"), tmp_path / "source"), calibration, once := tmp_path / "once")
    assert prune(once, calibration, tmp_path / "twice", width=8).widths == (8,) * 4
    body, fewer = model_dimensions(once, FAMILIES["qwen2_moe"]), tmp_path / "fewer"
    goal = body.params - body.params_per_expert
    report = prune_to(goal, once, fewer, calibration, unit="experts", target="experts")
    assert (report.experts, report.widths, report.params) == (5, (16,) * 4, goal)
