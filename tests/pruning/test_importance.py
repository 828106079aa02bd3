"""Scores against hand-computed values and against the whole model with hooks."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import VARIANTS, batches, build, save
from torch import nn

from ptl.model.families import FAMILIES, Family
from ptl.pruning.importance import (
    CRITERIA,
    _max,
    _mean,
    keep_highest,
    layer_scores,
    neuron_scores,
)
from ptl.pruning.layerwise import LayerwiseModel

PADDED = batches()


def stream_of(variant, folder, model=None):
    source = save(model or build(variant), folder, tokenizer=False)
    return LayerwiseModel(source, FAMILIES[VARIANTS[variant][0]], PADDED)


class ByHand:
    """Two layers with three neurons on hidden states of size 2, small enough for a pencil; mocks a LayerwiseModel.

    Layer i computes h + down_i(relu(h)[.., [0, 1, 1]]): neuron activations are (h0, h1, h1).
    """

    family, device = Family("by_hand", up_projections=("rows",), down_projection="down"), torch.device("cpu")
    num_sequences = 2
    downs = (torch.tensor([[3.0, 0.0, 0.5], [4.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.1]]))
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def __init__(self):
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer, weight in zip(self.layers, self.downs, strict=True):
            layer.down, layer.rows = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
            layer.down.weight.data, layer.rows.weight.data = weight, self.rows
            layer.down.in_features = 3

    def embed(self):
        # two sequences; the second has one token, its padding would win every maximum if it counted
        return [torch.tensor([[[1.0, 2.0], [2.0, 0.0]], [[0.0, 3.0], [99.0, 99.0]]])]

    def tokens(self, _batch):
        return torch.tensor([2, 1])

    def layer(self, i):
        return nullcontext(self.layers[i])

    def run(self, i, _batch, hidden):
        return hidden + self.layers[i].down(hidden.relu()[..., [0, 1, 1]])


# column norms: layer 0 (5, 1, .5), layer 1 (2, 1, .1)
# h after layer 0: token (1,2) -> (1+3+1, 2+4+2) = (5, 8); (2,0) -> (8, 8); (0,3) -> (1.5, 6)
BY_HAND = {
    "max": [[2 * 5, 3 * 1, 3 * 0.5], [8 * 2, 8 * 1, 8 * 0.1]],
    "mean": [[5 * (1.5 + 0) / 2, (1 + 3) / 2, (1 + 3) / 4], [2 * (6.5 + 1.5) / 2, (8 + 6) / 2, 0.1 * (8 + 6) / 2]],
    "weight": [[26**0.5, 2**0.5, 1.25**0.5], [5**0.5, 2**0.5, 1.01**0.5]],
}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_scores_computed_by_hand(criterion):
    scores = neuron_scores(ByHand(), criterion, seed=0)
    for found, expected in zip(scores, BY_HAND[criterion], strict=True):
        assert found.tolist() == pytest.approx(expected)


def test_layer_scores_computed_by_hand():
    # layer 0 moves (1,2) by (4,6), (2,0) by (6,8) and (0,3) by (1.5,3); layer 1 adds (h1, 2 h0 + .1 h1)
    first = [((4**2 + 6**2) ** 0.5 + 10) / 2, (1.5**2 + 3**2) ** 0.5]
    second = [((8**2 + 10.8**2) ** 0.5 + (8**2 + 16.8**2) ** 0.5) / 2, (6**2 + 3.6**2) ** 0.5]
    assert layer_scores(ByHand()).tolist() == pytest.approx([max(first), max(second)])


def test_formulas_on_single_sequences():
    activations, norms = torch.tensor([[1.0, -4.0], [-3.0, 2.0]]), torch.tensor([2.0, 0.5])
    assert _max(activations, norms).tolist() == [6.0, 2.0]  # strongly negative activations count
    assert _mean(activations, norms).tolist() == [4.0, 1.5]


def changes_by_removal(variant, stream):
    """Largest change of each layer's output, over all tokens, when one neuron is removed: float32 [layers, F]."""
    found = torch.zeros(4, 40)
    states = stream.embed()
    with torch.no_grad():
        for i in range(4):
            with stream.layer(i) as layer:
                down = layer.get_submodule(stream.family.down_projection)
                for b, hidden in enumerate(states):
                    states[b] = stream.run(i, b, hidden)
                    kept = stream.batches[b]["attention_mask"].bool()
                    for j in range(40):
                        column = down.weight[:, j].clone()
                        down.weight[:, j] = 0
                        change = (stream.run(i, b, hidden) - states[b]).norm(dim=-1)[kept].max()
                        found[i, j] = torch.maximum(found[i, j], change)
                        down.weight[:, j] = column
    return found


@pytest.mark.parametrize(
    "variant",
    ["llama-biases", "mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "granite", "glm4", "cohere2", "exaone4"],
)
def test_max_is_the_change_of_the_layers_output_when_the_neuron_is_removed(variant, tmp_path):
    """Each neuron is taken away by itself, and the layer run again; a norm may follow down_proj."""
    stream = stream_of(variant, tmp_path)
    scores = torch.stack(neuron_scores(stream, "max", seed=0))
    changes = changes_by_removal(variant, stream)
    torch.testing.assert_close(scores, changes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "phi3"])
def test_taylor_is_activation_times_gradient_of_the_whole_model(variant, tmp_path):
    model = build(variant)
    found = neuron_scores(stream_of(variant, tmp_path, model), "taylor", seed=0)
    expected = [torch.zeros(40) for _ in range(4)]
    for batch in PADDED:
        for row in range(len(batch["input_ids"])):
            caught = []
            ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
            hooks = [
                layer.mlp.down_proj.register_forward_pre_hook(
                    lambda _module, inputs, seen=caught: seen.append(inputs[0])
                )
                for layer in model.get_decoder().layers
            ]
            loss = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            for i, (values, slopes) in enumerate(zip(caught, torch.autograd.grad(loss, caught), strict=True)):
                expected[i] += (values * slopes)[0].sum(dim=0).abs().detach() / 5
            for hook in hooks:
                hook.remove()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", ["max", "mean", "weight", "taylor"])
@pytest.mark.parametrize("variant", ["llama", "phi3", "olmo2"])
def test_zeroed_neurons_go_first(criterion, variant, tmp_path):
    model = build(variant)
    dead = [3, 17, 39]
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.mlp.down_proj.weight[:, dead] = 0
            if criterion == "weight":
                rows = layer.mlp.gate_up_proj if variant == "phi3" else layer.mlp.gate_proj
                rows.weight[dead] = 0
                (rows.weight[40:] if variant == "phi3" else layer.mlp.up_proj.weight)[dead] = 0
    for scores in neuron_scores(stream_of(variant, tmp_path, model), criterion, seed=0):
        kept = keep_highest(scores, 37).tolist()
        assert set(range(40)) - set(kept) == set(dead)
        assert scores[dead].tolist() == [0, 0, 0]


def test_batches_and_padding_play_no_part(tmp_path):
    source = save(build("llama"), tmp_path, tokenizer=False)
    single = [
        {name: tensor[row : row + 1, : int(batch["attention_mask"][row].sum())] for name, tensor in batch.items()}
        for batch in PADDED
        for row in range(len(batch["input_ids"]))
    ]
    for criterion in ("max", "mean", "taylor"):
        one, other = (
            neuron_scores(LayerwiseModel(source, FAMILIES["llama"], data), criterion, 0) for data in (PADDED, single)
        )
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_random_is_the_seeds(tmp_path):
    stream = stream_of("llama", tmp_path)
    one, same, other = (neuron_scores(stream, "random", seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True)) and not torch.equal(one[0], other[0])


def test_a_layer_that_does_nothing_scores_zero(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    stream = stream_of("llama", tmp_path, model)
    scores = layer_scores(stream)
    assert scores[2].item() == pytest.approx(0, abs=1e-6) and scores.argmin() == 2
    assert keep_highest(scores, 3).tolist() == [0, 1, 3]


def test_highest_are_kept_and_ties_go_to_the_lower_index():
    assert keep_highest(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert keep_highest(torch.zeros(6), 4).tolist() == [0, 1, 2, 3]
    scores = torch.tensor([2.0, 1.0]).repeat(500)
    assert keep_highest(scores, 500).tolist() == list(range(0, 1000, 2))


def test_the_same_numbers_every_time(tmp_path):
    stream = stream_of("gemma2", tmp_path)
    for criterion in CRITERIA:
        one, other = (neuron_scores(stream, criterion, 0) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_bfloat16_is_scored_in_its_own_dtype(tmp_path):
    scores = neuron_scores(stream_of("qwen2", tmp_path, build("qwen2").bfloat16()), "max", 0)
    assert scores[0].dtype == torch.float32 and bool((scores[0] > 0).all())
    assert scores[0].shape == (40,)
