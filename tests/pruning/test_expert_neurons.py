"""Neurons inside experts: scores by hand and against the whole model, then one checkpoint in and a narrower one out."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import MOE_VARIANTS, NARROW_VARIANTS, SIZES, batches, build, logits, save, word_calibration
from torch import nn
from transformers import AutoModelForCausalLM

from ptl.config.schedule import NEURON_CRITERIA, Prune
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions, with_width
from ptl.model.families import FAMILIES
from ptl.pruning import importance
from ptl.pruning.experts import CRITERIA_OF_NEURONS
from ptl.pruning.importance import keep_highest, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.prune import prune_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = tuple(range(4))


@pytest.fixture(params=NARROW_VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def calibration(tmp_path):
    return word_calibration(tmp_path)


def width_of(variant):
    return MOE_VARIANTS[variant][1].get("moe_intermediate_size", SIZES["intermediate_size"])


def stream_of(variant, folder, model=None):
    return LayerwiseModel(save(model or build(variant), folder, tokenizer=False), FAMILIES[variant], batches())


# ---- scores


class Experts(nn.Module):
    """Two experts with two neurons each on hidden states of size 2; a neuron's activation is gate times up."""

    has_bias = is_transposed = False

    def _apply_gate(self, projected):
        gate, up = projected.chunk(2, dim=-1)
        return gate * up

    def __init__(self):
        super().__init__()
        gate, up = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        self.gate_up_proj = nn.Parameter(torch.stack([torch.cat([gate, up]), torch.cat([up, gate])]))
        self.down_proj = nn.Parameter(torch.tensor([[[3.0, 1.0], [4.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]))


class Layer(nn.Module):
    """Token t is sent to the experts of `chosen`, and what they give is added."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts()

    def forward(self, hidden, chosen, weights):
        flat = hidden.reshape(-1, 2)
        return hidden + self.mlp.experts(flat, chosen, weights).view_as(hidden)


class ByHand:
    """One layer, two sequences, the second with one token and one of padding; mocks a LayerwiseModel."""

    family, device, num_sequences = FAMILIES["mixtral"], torch.device("cpu"), 2
    chosen, weights = torch.tensor([[0], [1], [0], [1]]), torch.tensor([[0.5], [0.25], [1.0], [1.0]])

    def __init__(self):
        self.layers = nn.ModuleList([Layer()])
        self.batches = [{"attention_mask": torch.tensor([[1, 1], [1, 0]])}]

    def embed(self):
        return [torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[3.0, 1.0], [99.0, 99.0]]])]

    def tokens(self, _batch):
        return torch.tensor([2, 1])

    def layer(self, i):
        return nullcontext(self.layers[i])

    def run(self, i, _batch, hidden):
        return self.layers[i](hidden, self.chosen, self.weights)


# Activations gate x up: expert 0 at (1, 2): (1 x 3, 2 x 4) = (3, 8), at (3, 1): (3 x 4, 1 x 2) = (12, 2);
# expert 1 at (2, 1): (3 x 2, 2 x 1) = (6, 2). Norms of the columns of down: (5, 1) and (1, 2).
BY_HAND = {
    "max": [[12 * 1.0 * 5, 8 * 0.5 * 1], [6 * 0.25 * 1, 2 * 0.25 * 2]],
    # The first sequence has two tokens, the second one.
    "mean": [
        [5 * (3 * 0.5 / 2 + 12) / 2, (8 * 0.5 / 2 + 2) / 2],
        [6 * 0.25 / 2 / 2, 2 * 2 * 0.25 / 2 / 2],
    ],
    "weight": [[(1 + 2 + 25) ** 0.5, (1 + 4 + 1) ** 0.5], [(1 + 2 + 1) ** 0.5, (1 + 4 + 4) ** 0.5]],
}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_scores_of_experts_neurons_computed_by_hand(criterion):
    (scores,) = neuron_scores(ByHand(), criterion, seed=0)
    torch.testing.assert_close(scores, torch.tensor(BY_HAND[criterion]))


def changes_by_removal(stream, width):
    """Largest and mean change of each layer's output when one neuron of an expert goes: float32 [layers, 6, width]."""
    largest, mean = torch.zeros(2, 4, 6, width)
    states = stream.embed()
    with torch.no_grad():
        for i in ALL:
            with stream.layer(i) as layer:
                for b, hidden in enumerate(states):
                    states[b] = stream.run(i, b, hidden)
                    mask = stream.batches[b]["attention_mask"]
                    for expert, down in enumerate(layer.mlp.experts.down_proj):
                        for j in range(width):
                            column = down[:, j].clone()
                            down[:, j] = 0
                            change = (stream.run(i, b, hidden) - states[b]).norm(dim=-1) * mask
                            down[:, j] = column
                            largest[i, expert, j] = torch.maximum(largest[i, expert, j], change.max())
                            mean[i, expert, j] += (change.sum(dim=1) / mask.sum(dim=1)).sum() / 5
    return {"max": largest, "mean": mean}


def test_scores_are_the_change_of_the_layers_output_when_the_neuron_is_removed(variant, tmp_path):
    stream = stream_of(variant, tmp_path)
    for criterion, expected in changes_by_removal(stream, width_of(variant)).items():
        scores = torch.stack(neuron_scores(stream, criterion, seed=0))
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


def test_taylor_is_the_gradient_by_a_factor_of_each_neuron_in_the_whole_model(variant, tmp_path):
    """Sum over the tokens of activation times gradient = gradient by a factor of the neuron's column, at factor 1."""
    model, width = build(variant), width_of(variant)
    found = torch.stack(neuron_scores(stream_of(variant, tmp_path, model), "taylor", seed=0))
    downs = [layer.mlp.experts.down_proj for layer in model.get_decoder().layers]
    expected = torch.zeros(4, 6, width)
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[None, : mask.sum()]
            loss = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            for i, gradient in enumerate(torch.autograd.grad(loss, downs)):
                expected[i] += (gradient * downs[i]).sum(dim=1).abs().detach() / 5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", NEURON_CRITERIA)
def test_zeroed_neurons_of_experts_go_first(variant, criterion, tmp_path):
    model, width = build(variant), width_of(variant)
    dead = torch.tensor([[e, 7 + e, 20] for e in range(6)])  # others in each expert
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for expert, neurons in enumerate(dead):
                layer.mlp.experts.down_proj[expert][:, neurons] = 0
                layer.mlp.experts.gate_up_proj[expert][torch.cat([neurons, neurons + width])] = 0
    for scores in neuron_scores(stream_of(variant, tmp_path, model), criterion, seed=0):
        kept = keep_highest(scores, width - 3)
        for expert in range(6):
            assert set(range(width)) - set(kept[expert].tolist()) == set(dead[expert].tolist())


@pytest.mark.parametrize("criterion", ["max", "mean", "taylor"])
def test_an_expert_without_tokens_keeps_its_largest_weights(variant, criterion, tmp_path):
    source = save(build(variant), tmp_path, tokenizer=False)
    stream = LayerwiseModel(source, FAMILIES[variant], batches(((3,),)))  # three tokens do not reach all experts
    scores, weights = (torch.stack(neuron_scores(stream, name, seed=0)) for name in (criterion, "weight"))
    silent = scores.amax(dim=-1) < 1e-20  # [layers, experts]
    assert silent.any() and not silent.all()
    assert torch.equal(keep_highest(scores[silent], 12), keep_highest(weights[silent], 12))
    assert (scores[silent] > 0).all()


def test_random_scores_of_experts_neurons_follow_the_seed(variant, tmp_path):
    stream = stream_of(variant, tmp_path)
    one, again, other = (torch.stack(neuron_scores(stream, "random", seed)) for seed in (1, 1, 2))
    assert one.shape == (4, 6, width_of(variant))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_both_layouts_and_bfloat16_have_the_same_scores(variant, tmp_path):
    model = build(variant).bfloat16()
    folders = [save(model, tmp_path / f"{fused}", tokenizer=False, fused=fused) for fused in (False, True)]
    for criterion in CRITERIA_OF_NEURONS:
        one, other = (neuron_scores(LayerwiseModel(at, FAMILIES[variant], batches()), criterion, 0) for at in folders)
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(one, other, strict=True))


def test_experts_have_the_criteria_that_dense_layers_have():
    assert CRITERIA_OF_NEURONS.keys() == importance.CRITERIA.keys() == {*NEURON_CRITERIA, "random"}


# ---- one step


def cut(source, calibration, folder, width=16, unit="neurons", **settings):
    family = FAMILIES[checkpoint.read_config(source)["model_type"]]
    goal = with_width(model_dimensions(source, family), width).params
    return prune_checkpoint(source, folder, Prune(**settings), calibration, unit=unit, goal=goal, seed=0)


@pytest.mark.parametrize("criterion", CRITERIA_OF_NEURONS)
def test_every_criterion_narrows_the_experts_to_the_goal(variant, calibration, tmp_path, criterion):
    source = save(build(variant), tmp_path / "source")
    report = cut(source, calibration, tmp_path / "cut", criterion=criterion)
    assert (report.unit, report.criterion, report.experts, report.widths) == ("neurons", criterion, 6, (16,) * 4)
    assert report.params == report.goal == model_dimensions(tmp_path / "cut", FAMILIES[variant]).params
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").num_parameters() == report.params


def test_dead_neurons_are_pruned_without_any_change_of_the_logits(variant, calibration, tmp_path):
    model, width = build(variant), width_of(variant)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for expert in range(6):
                layer.mlp.experts.down_proj[expert][:, expert : expert + width - 16] = 0
    source = save(model, tmp_path / "source", "16KB")
    cut(source, calibration, tmp_path / "cut")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    for batch in batches():
        torch.testing.assert_close(logits(after, batch), logits(model, batch), rtol=1e-4, atol=2e-4)


def test_widths_of_experts_are_rounded_as_those_of_layers(variant, calibration, tmp_path):
    source = save(build(variant), tmp_path / "source")
    assert cut(source, calibration, tmp_path / "eight", width=19, width_multiple=8).widths[0] == 16
    report = cut(source, calibration, tmp_path / "one", width=19, width_multiple=1)
    assert report.widths[0] == 16  # torch multiplies no other widths in groups


def test_a_narrow_mixture_is_pruned_again_by_neurons_and_by_experts(variant, calibration, tmp_path):
    cut(save(build(variant), tmp_path / "source"), calibration, tmp_path / "once", width=16)
    assert cut(tmp_path / "once", calibration, tmp_path / "twice", width=8).widths == (8,) * 4
    body = model_dimensions(tmp_path / "once", FAMILIES[variant])
    goal, settings = body.params - body.params_per_expert, Prune(target="experts")
    report = prune_checkpoint(
        tmp_path / "once", tmp_path / "fewer", settings, calibration, unit="experts", goal=goal, seed=0
    )
    assert (report.experts, report.widths, report.params) == (5, (16,) * 4, goal)
