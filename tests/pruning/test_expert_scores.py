"""Experts: scores against the whole model, one token at a time; then one checkpoint in, one with fewer experts out."""

from dataclasses import replace

import pytest
import torch
from recovering import prune_to
from tiny_models import (
    MOE_VARIANTS,
    avoiding,
    batches,
    build,
    family_at,
    load,
    logits,
    router,
    save,
    skipping,
)

from ptl.errors import InputError
from ptl.model import dimensions
from ptl.model.dimensions import experts_for, model_dimensions
from ptl.pruning.experts import expert_scores
from ptl.pruning.layerwise import LayerwiseModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(variant, tmp_path):
    """A checkpoint in one of the two layouts, the one or the other in turn."""
    return save(build(variant), tmp_path / "source", fused=[*MOE_VARIANTS].index(variant) % 2 == 1)


@torch.no_grad()
def one_by_one(model):
    """Tokens and router-weighted norms of every expert [layers, E], from the whole model, token by token."""
    tokens, weighted = torch.zeros(2, 4, 6)
    layers = model.get_decoder().layers
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            # what the experts of each layer get: hidden states, chosen experts and their weights
            seen = {}
            hooks = [
                layer.mlp.experts.register_forward_pre_hook(
                    lambda _, inputs, i=i, seen=seen: seen.update({i: inputs})
                )
                for i, layer in enumerate(layers)
                if hasattr(layer.mlp, "experts")
            ]
            model(input_ids=ids[None, : mask.sum()], use_cache=False)
            for hook in hooks:
                hook.remove()
            for i, inputs in seen.items():
                for hidden, chosen, weights in zip(*inputs, strict=True):
                    for expert, weight in zip(chosen.tolist(), weights, strict=True):
                        alone = hidden[None], torch.tensor([[expert]]), torch.ones(1, 1)
                        tokens[i, expert] += 1
                        weighted[i, expert] += weight * layers[i].mlp.experts(*alone).norm()
    return tokens, weighted


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_scores_are_those_of_each_token_of_the_whole_model(variant, source):
    tokens, weighted = one_by_one(build(variant))
    model, body = (
        LayerwiseModel(source, family_at(source), batches()),
        model_dimensions(source, family_at(source)),
    )
    # the other layers have no scores
    mixtures = [i for i in range(4) if i not in body.dense_layers]
    scores = expert_scores(model, "reap", seed=0)
    assert [*scores] == mixtures
    for i in mixtures:
        torch.testing.assert_close(
            scores[i], weighted[i] / tokens[i].clamp(min=1), rtol=1e-4, atol=1e-5
        )
    # Padding is not counted.
    assert tokens.sum(dim=1).tolist() == [
        45 * body.experts_per_token if i in mixtures else 0 for i in range(4)
    ]


def prune(source, calibration, folder, experts=4, goal=None, unit="experts", **settings):
    goal = goal or replace(model_dimensions(source, family_at(source)), experts=experts).params
    return prune_to(goal, source, folder, calibration, unit=unit, target=unit, **settings)


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "glm4_moe"])
def test_experts_that_give_nothing_go_first(variant, calibration, tmp_path):
    model, stay = build(variant), [0, 2, 3, 5]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.down_proj" in name:
                parameter[[1, 4]] = 0
    source = save(model, tmp_path / "source")
    report = prune(source, calibration, tmp_path / "pruned")
    assert (report.unit, report.criterion, report.experts, report.sequences) == (
        "experts",
        "reap",
        4,
        8,
    )
    assert (
        report.params
        == report.goal
        == model_dimensions(tmp_path / "pruned", family_at(source)).params
    )
    after = load(tmp_path / "pruned")
    for old, new in zip(model.get_decoder().layers, after.get_decoder().layers, strict=True):
        if hasattr(old.mlp, "experts"):
            assert torch.equal(new.mlp.experts.down_proj, old.mlp.experts.down_proj[stay])
            assert torch.equal(router(new).weight, router(old).weight[stay])


def test_as_many_experts_go_from_each_group_of_the_router(calibration, tmp_path):
    """Those that score least in their group; here the third of each."""
    # 6 are needed
    model = build(
        "deepseek_v3", n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=4
    )
    layers = model.get_decoder().layers[1:]  # the first has no experts
    with torch.no_grad():
        for layer in layers:
            layer.mlp.experts.down_proj[[2, 6, 10]] = 0
    source = save(model, tmp_path / "source")
    body = model_dimensions(source, family_at(source))
    assert [
        experts_for(body, replace(body, experts=number).params) for number in (12, 11, 9, 8)
    ] == [12, 9, 9, 6]
    assert dimensions.smallest_cuts(body, "auto")["experts"] == 3 * body.params_per_expert
    with pytest.raises(InputError, match="each token needs 6 of them in each layer"):
        experts_for(body, replace(body, experts=6).params - 1)
    assert prune(source, calibration, tmp_path / "pruned", experts=10).experts == 9
    pruned, batch = load(tmp_path / "pruned"), batches()[0]
    for old, new in zip(layers, pruned.get_decoder().layers[1:], strict=True):
        rows = [
            (old.mlp.gate.weight == kept).all(dim=1).nonzero().item()
            for kept in new.mlp.gate.weight
        ]
        assert rows == [0, 1, 3, 4, 5, 7, 8, 9, 11]
    reference = avoiding(model, dict.fromkeys((1, 2, 3), torch.tensor(rows)))
    torch.testing.assert_close(
        logits(pruned, batch), logits(reference, batch), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("variant", ["qwen3_moe-dense", "glm4_moe", "gpt_oss"])
def test_layers_with_experts_are_removed_as_of_a_dense_model(
    variant, source, calibration, tmp_path
):
    body = model_dimensions(source, family_at(source))
    goal = body.params - body.params_per_layer
    report = prune(source, calibration, tmp_path / "pruned", goal=goal, unit="layers")
    assert (report.unit, report.layers, report.experts, report.params) == ("layers", 3, 6, goal)
    (removed,) = report.removed_layers
    assert removed not in body.dense_layers
    skips, batch = skipping(build(variant), {*range(4)} - {removed}), batches()[0]
    torch.testing.assert_close(
        logits(load(tmp_path / "pruned"), batch), logits(skips, batch), rtol=1e-4, atol=2e-4
    )
