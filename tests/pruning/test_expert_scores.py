"""Experts: scores against the whole model, one token at a time; then one checkpoint in, one with fewer experts out."""

from typing import get_args

import pytest
import torch
from tiny_models import MOE_VARIANTS, batches, build, logits, save, word_calibration
from transformers import AutoModelForCausalLM

from ptl.config.schedule import EXPERT_CRITERIA, Prune
from ptl.errors import InputError
from ptl.model import dimensions
from ptl.model.dimensions import model_dimensions, with_experts
from ptl.model.families import FAMILIES
from ptl.pruning.experts import CRITERIA, expert_scores
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.prune import prune_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MOE_VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(params=["separate", "fused"])
def source(request, variant, tmp_path):
    return save(build(variant), tmp_path / "source", fused=request.param == "fused")


@pytest.fixture
def calibration(tmp_path):
    return word_calibration(tmp_path)


def one_by_one(model):
    """Tokens, norms and router-weighted norms of every expert [layers, E], from the whole model, token by token."""
    tokens, norms, weighted = torch.zeros(3, 4, 6)
    layers = model.get_decoder().layers
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen = {}  # what the experts of each layer get: hidden states, chosen experts and their weights
            hooks = [
                layer.mlp.experts.register_forward_pre_hook(lambda _, given, i=i, seen=seen: seen.update({i: given}))
                for i, layer in enumerate(layers)
                if hasattr(layer.mlp, "experts")
            ]
            with torch.no_grad():
                model(input_ids=ids[None, : mask.sum()], use_cache=False)
            for hook in hooks:
                hook.remove()
            for i, given in seen.items():
                experts = layers[i].mlp.experts
                for hidden, chosen, weights in zip(*given, strict=True):
                    for expert, weight in zip(chosen.tolist(), weights, strict=True):
                        with torch.no_grad():
                            norm = experts(hidden[None], torch.tensor([[expert]]), torch.ones(1, 1)).norm()
                        tokens[i, expert] += 1
                        norms[i, expert] += norm
                        weighted[i, expert] += weight * norm
    return tokens, norms, weighted


def test_scores_are_those_of_each_token_of_the_whole_model(variant, source):
    tokens, norms, weighted = one_by_one(build(variant))
    expected = {"frequency": tokens, "norm": norms / tokens.clamp(min=1), "reap": weighted / tokens.clamp(min=1)}
    stream = LayerwiseModel(source, FAMILIES[MOE_VARIANTS[variant][0]], batches())
    for criterion in CRITERIA:
        for i, scores in expert_scores(stream, criterion, seed=0).items():
            torch.testing.assert_close(scores, expected[criterion][i], rtol=1e-4, atol=1e-5)
    body = model_dimensions(source, FAMILIES[MOE_VARIANTS[variant][0]])
    # Padding is not counted, and a layer without experts has no scores.
    per_layer = [0 if i in body.dense_layers else 45 * body.experts_per_token for i in range(4)]
    assert tokens.sum(dim=1).tolist() == per_layer
    assert [*expert_scores(stream, "reap", seed=0)] == [i for i in range(4) if i not in body.dense_layers]


def test_random_scores_follow_the_seed(variant, source):
    stream = LayerwiseModel(source, FAMILIES[MOE_VARIANTS[variant][0]], batches())
    one, again, other = (torch.stack([*expert_scores(stream, "random", seed).values()]) for seed in (1, 1, 2))
    assert one.shape[1] == 6 and torch.equal(one, again) and not torch.equal(one, other)


def cut(source, variant, calibration, folder, experts=4, **settings):
    goal = with_experts(model_dimensions(source, FAMILIES[MOE_VARIANTS[variant][0]]), experts).params
    return prune_checkpoint(
        source, folder, Prune(target="experts", **settings), calibration, unit="experts", goal=goal, seed=0
    )


@pytest.mark.parametrize("criterion", ["reap", "norm"])
def test_experts_that_give_nothing_go_first(variant, calibration, tmp_path, criterion):
    model = build(variant)
    for layer in model.get_decoder().layers:
        if hasattr(layer.mlp, "experts"):
            with torch.no_grad():
                for name, parameter in layer.mlp.experts.named_parameters():
                    if name.startswith("down_proj"):
                        parameter[[1, 4]] = 0
    source = save(model, tmp_path / "source")
    report = cut(source, variant, calibration, tmp_path / "cut", criterion=criterion)
    assert (report.unit, report.criterion, report.experts, report.sequences) == ("experts", criterion, 4, 8)
    assert report.params == report.goal == model_dimensions(tmp_path / "cut", FAMILIES[MOE_VARIANTS[variant][0]]).params
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for old, new in zip(model.get_decoder().layers, after.get_decoder().layers, strict=True):
        if not hasattr(old.mlp, "experts"):
            continue
        assert torch.equal(new.mlp.experts.down_proj, old.mlp.experts.down_proj[[0, 2, 3, 5]])
        old_router, new_router = (getattr(layer.mlp, "router", None) or layer.mlp.gate for layer in (old, new))
        assert torch.equal(new_router.weight, old_router.weight[[0, 2, 3, 5]])


def test_as_many_experts_go_from_each_group_of_the_router(calibration, tmp_path):
    model = build("deepseek_v3", n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=4)
    source = save(model, tmp_path / "source")
    assert cut(source, "deepseek_v3", calibration, tmp_path / "cut", experts=10).experts == 9
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for old, new in zip(model.get_decoder().layers[1:], after.get_decoder().layers[1:], strict=True):
        rows = [(old.mlp.gate.weight == kept).all(dim=1).nonzero().item() for kept in new.mlp.gate.weight]
        assert [row // 4 for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_goal_between_two_numbers_of_experts_is_not_exceeded(variant, source, calibration, tmp_path):
    family = FAMILIES[MOE_VARIANTS[variant][0]]
    body = model_dimensions(source, family)
    goal = with_experts(body, 4).params + 1
    settings = Prune(target="experts", criterion="frequency")
    report = prune_checkpoint(source, tmp_path / "cut", settings, calibration, unit="experts", goal=goal, seed=0)
    assert report.experts == 4 and report.params < goal < with_experts(body, 5).params


def test_a_size_below_the_experts_of_a_token_is_refused(variant, source, calibration, tmp_path):
    few = model_dimensions(source, FAMILIES[MOE_VARIANTS[variant][0]]).experts_per_token - 1
    with pytest.raises(InputError, match=r"schedule\.target: .* parameters cannot be reached by experts: each token"):
        cut(source, variant, calibration, tmp_path / "cut", experts=few)
    assert cut(source, variant, calibration, tmp_path / "cut", experts=few + 1).experts == few + 1


def test_a_dense_model_has_no_experts(calibration, tmp_path):
    source = save(build("llama"), tmp_path / "source")
    with pytest.raises(InputError, match=r"a dense model has no experts; set prune\.target=neurons"):
        prune_checkpoint(source, tmp_path / "cut", Prune(target="experts"), calibration, unit="experts", goal=1, seed=0)


def test_layers_are_removed_as_of_a_dense_model(variant, source, calibration, tmp_path):
    body = model_dimensions(source, FAMILIES[MOE_VARIANTS[variant][0]])
    goal = body.params - body.params_per_layer
    settings = Prune(target="layers")
    report = prune_checkpoint(source, tmp_path / "cut", settings, calibration, unit="layers", goal=goal, seed=0)
    assert (report.unit, report.layers, report.experts, report.params) == ("layers", 3, 6, goal)
    model = build(variant)
    (removed,) = report.removed_layers
    assert removed not in body.dense_layers
    model.get_decoder().layers[removed].forward = lambda hidden, *_args, **_kwargs: hidden
    after, batch = AutoModelForCausalLM.from_pretrained(tmp_path / "cut"), batches()[0]
    torch.testing.assert_close(logits(after, batch), logits(model, batch), rtol=1e-4, atol=2e-4)


def test_a_pruned_mixture_is_pruned_again(variant, source, calibration, tmp_path):
    cut(source, variant, calibration, tmp_path / "once", experts=5)
    report = cut(tmp_path / "once", variant, calibration, tmp_path / "twice", experts=4)
    assert report.experts == 4 and dimensions.static_cost(tmp_path / "twice").params == report.params


def test_the_criteria_of_the_config_are_those_of_the_code():
    assert set(EXPERT_CRITERIA) == set(CRITERIA)
    assert set(EXPERT_CRITERIA) < set(get_args(Prune.model_fields["criterion"].annotation))
