"""Scores against hand-computed values and against the whole model."""

import math
from contextlib import nullcontext

import pytest
import torch
from tiny_models import VARIANTS, batches, build, changes_by_removal, save
from torch import nn

from ptl.errors import WorkError
from ptl.model.families import FAMILIES, Family
from ptl.pruning.importance import changes_after_norm, keep_highest, layer_scores, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel

pytestmark = pytest.mark.usefixtures("one_thread")


def stream_of(variant, folder, model):
    return LayerwiseModel(
        save(model, folder, tokenizer=False), FAMILIES[VARIANTS[variant][0]], batches()
    )


class ByHand:
    """Two layers with three neurons on hidden states of size 2, small enough for a pencil; mocks a LayerwiseModel.

    Layer i computes h + down_i(relu(h)[.., [0, 1, 1]]): neuron activations are (h0, h1, h1).
    """

    family, device = (
        Family("by_hand", up_projections=("rows",), down_projection="down"),
        torch.device("cpu"),
    )
    residual_scale = 1.0
    downs = (
        torch.tensor([[3.0, 0.0, 0.5], [4.0, 1.0, 0.0]]),
        torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.1]]),
    )
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def __init__(self):
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer, weight in zip(self.layers, self.downs, strict=True):
            layer.down, layer.rows = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
            layer.down.weight.data, layer.rows.weight.data = weight, self.rows

    def embed(self):
        # two sequences; the second has one token, its padding would win every maximum if it counted
        return [torch.tensor([[[1.0, 2.0], [2.0, 0.0]], [[0.0, 3.0], [99.0, 99.0]]])]

    def tokens(self, _batch):
        return torch.tensor([2, 1])

    def layer(self, i):
        return nullcontext(self.layers[i])

    def run(self, i, _batch, hidden):
        return hidden + self.layers[i].down(hidden.relu()[..., [0, 1, 1]])


class Negated(ByHand):
    """The same with negative activations."""

    def run(self, i, _batch, hidden):
        return hidden + self.layers[i].down(-hidden.relu()[..., [0, 1, 1]])


# column norms: layer 0 (5, 1, .5), layer 1 (2, 1, .1)
# h after layer 0: token (1,2) -> (1+3+1, 2+4+2) = (5, 8); (2,0) -> (8, 8); (0,3) -> (1.5, 6)
BY_HAND = {
    "max": [[2 * 5, 3 * 1, 3 * 0.5], [8 * 2, 8 * 1, 8 * 0.1]],
    "weight": [[26**0.5, 2**0.5, 1.25**0.5], [5**0.5, 2**0.5, 1.01**0.5]],
}


def test_scores_computed_by_hand_of_which_the_highest_are_kept_and_the_lower_index_of_ties():
    for criterion, expected in BY_HAND.items():
        scores = torch.stack(neuron_scores(ByHand(), criterion, seed=0))
        torch.testing.assert_close(scores, torch.tensor(expected), msg=criterion)
    assert (
        neuron_scores(Negated(), "max", seed=0)[0].tolist() == BY_HAND["max"][0]
    )  # strongly negative activations count
    # layer 0 moves (1,2) by (4,6), (2,0) by (6,8) and (0,3) by (1.5,3); layer 1 adds (h1, 2 h0 + .1 h1)
    first = [((4**2 + 6**2) ** 0.5 + 10) / 2, (1.5**2 + 3**2) ** 0.5]
    second = [((8**2 + 10.8**2) ** 0.5 + (8**2 + 16.8**2) ** 0.5) / 2, (6**2 + 3.6**2) ** 0.5]
    assert layer_scores(ByHand()).tolist() == pytest.approx([max(first), max(second)])
    assert keep_highest(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]
    # so many that a sort that is not stable mixes them
    scores = torch.tensor([2.0, 1.0]).repeat(500)
    assert keep_highest(scores, 500).tolist() == list(range(0, 1000, 2))
    assert keep_highest(torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 1.0]]), 2).tolist() == [
        [1, 2],
        [0, 1],
    ]
    with pytest.raises(
        WorkError, match=r"scores are NaN: .*; set `dtype` in its config\.json to bfloat16"
    ):
        keep_highest(torch.tensor([1.0, math.nan]), 1)


NIGHTLY = [
    pytest.param(variant, marks=pytest.mark.nightly)
    for variant in ("gemma3_text", "exaone4", "cohere2")
]


@pytest.mark.parametrize(
    "variant", ["llama-biases", "phi3", "gemma2", "olmo2", "granite", "glm4", *NIGHTLY]
)
def test_max_is_the_change_of_the_layers_output_when_the_neuron_is_removed(variant, tmp_path):
    """Each neuron is taken away by itself, and the layer run again; a norm may follow down_proj."""
    stream = stream_of(variant, tmp_path, build(variant, rms_norm_eps=0.05))  # which then counts
    scores = torch.stack(neuron_scores(stream, "max", seed=0))
    torch.testing.assert_close(
        scores, changes_by_removal(stream, range(40))[:, 0], rtol=1e-4, atol=1e-4
    )


def test_the_change_after_a_norm_is_a_number_where_nothing_else_is_left():
    """The differences of squares are then all rounding."""
    layer, family = nn.Module(), Family("one_neuron", down_projection="down", post_norm="norm")
    layer.down, layer.norm = nn.Linear(1, 3, bias=False), nn.RMSNorm(3)
    activations = torch.linspace(1, 1000, 300)[:, None]  # [T, 1]
    with torch.no_grad():
        changes = changes_after_norm(layer, family, epsilon=1e-6)(
            activations, layer.down(activations)
        )
    assert (
        changes.shape == (300, 1) and bool(changes.isfinite().all()) and bool((changes >= 0).all())
    )


def test_weight_is_the_norm_of_all_weights_and_random_follows_seed_and_layer(tmp_path):
    model = build("phi3")
    scores = neuron_scores(stream_of("phi3", tmp_path / "phi3", model), "weight", seed=0)
    for found, layer in zip(scores, model.model.layers, strict=True):
        parts = (*layer.mlp.gate_up_proj.weight.chunk(2), layer.mlp.down_proj.weight.t())
        torch.testing.assert_close(found, torch.cat(parts, dim=1).norm(dim=1).detach())
    stream = stream_of("llama", tmp_path / "llama", build("llama"))
    one, same, other = (torch.stack(neuron_scores(stream, "random", seed)) for seed in (1, 1, 2))
    assert (
        torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[0], one[1])
    )
