"""Neurons inside experts: scores by hand and against the whole model, then one checkpoint in and a narrower one out."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import MOE_VARIANTS, NARROW_VARIANTS, SIZES, batches, build, logits, save, word_calibration
from torch import nn
from transformers import AutoModelForCausalLM

from ptl.config.schedule import NEURON_CRITERIA, Prune
from ptl.errors import InputError
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions, with_width
from ptl.model.families import FAMILIES
from ptl.pruning import importance, selection
from ptl.pruning.expert_neurons import CRITERIA
from ptl.pruning.importance import keep_highest, neuron_scores
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.prune import prune_checkpoint
from ptl.pruning.repair import fit, ridge
from ptl.pruning.routing import activations, outputs, running_experts
from ptl.pruning.surgery import Selection, write_pruned
from ptl.pruning.variant_losses import PrunedVariant, losses

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
    for criterion in CRITERIA:
        one, other = (neuron_scores(LayerwiseModel(at, FAMILIES[variant], batches()), criterion, 0) for at in folders)
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(one, other, strict=True))


def test_experts_have_the_criteria_that_dense_layers_have():
    assert CRITERIA.keys() == importance.CRITERIA.keys() == {*NEURON_CRITERIA, "random"}


# ---- one step


def cut(source, calibration, folder, width=16, unit="neurons", **settings):
    family = FAMILIES[checkpoint.read_config(source)["model_type"]]
    goal = with_width(model_dimensions(source, family), width).params
    return prune_checkpoint(source, folder, Prune(**settings), calibration, unit=unit, goal=goal, seed=0)


@pytest.mark.parametrize("criterion", CRITERIA)
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
    report = cut(source, calibration, tmp_path / "eight", width=19, width_multiple=8)
    assert (report.widths[0], report.width_multiple) == (16, 8)
    report = cut(source, calibration, tmp_path / "one", width=19, width_multiple=1)
    assert (report.widths[0], report.width_multiple) == (16, 8)  # torch multiplies no other widths in groups
    with pytest.raises(InputError, match=r"prune.tensor_parallel: 7 does not divide the FFN width"):
        cut(source, calibration, tmp_path / "seven", tensor_parallel=7)


def test_the_expert_with_the_fewest_redundant_neurons_decides_at_a_threshold(variant, calibration, tmp_path):
    model, width = build(variant), width_of(variant)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for expert, down in enumerate(layer.mlp.experts.down_proj):
                down[:, : 8 + expert] = 0
    source = save(model, tmp_path / "source")
    report = cut(source, calibration, tmp_path / "cut", width=8, criterion="max", sigma_neuron=1e-6)
    assert report.widths == (width - 8,) * 4


def test_a_narrow_mixture_is_pruned_again_by_neurons_and_by_experts(variant, calibration, tmp_path):
    cut(save(build(variant), tmp_path / "source"), calibration, tmp_path / "once", width=16)
    assert cut(tmp_path / "once", calibration, tmp_path / "twice", width=8).widths == (8,) * 4
    body = model_dimensions(tmp_path / "once", FAMILIES[variant])
    goal, settings = body.params - body.params_per_expert, Prune(target="experts")
    report = prune_checkpoint(
        tmp_path / "once", tmp_path / "fewer", settings, calibration, unit="experts", goal=goal, seed=0
    )
    assert (report.experts, report.widths, report.params) == (5, (16,) * 4, goal)


# ---- repair


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_ridge_brings_a_narrow_layer_nearer_to_the_whole_one(variant, fused, tmp_path):
    source, family = save(build(variant), tmp_path / "source", fused=fused), FAMILIES[variant]
    stream = LayerwiseModel(source, family, batches(((40,) * 8,)))
    kept = dict(enumerate(keep_highest(scores, 16) for scores in neuron_scores(stream, "max", 0)))
    files = ridge(stream, Selection(ALL, kept), 1e-3, tmp_path / "repair")
    assert len(files) == 4 * (1 if fused else 6)
    write_pruned(source, tmp_path / "repaired", family, Selection(ALL, kept), files)
    write_pruned(source, tmp_path / "plain", family, Selection(ALL, kept))

    def first_layer(name):  # later layers see other inputs
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            return model(stream.batches[0]["input_ids"], output_hidden_states=True).hidden_states[1]

    whole, repaired, plain = map(first_layer, ("source", "repaired", "plain"))
    assert (repaired - whole).norm() < 0.9 * (plain - whole).norm()


def test_each_expert_is_fitted_on_its_own_tokens(variant, tmp_path):
    """Whoever is sent to one expert only plays no part in the others: fitted again from their tokens alone."""
    source, family = save(build(variant), tmp_path / "source", fused=True), FAMILIES[variant]
    stream = LayerwiseModel(source, family, batches())
    kept = torch.arange(16).expand(6, -1)
    entry = ridge(stream, Selection((0,), {0: kept}), 0.1, tmp_path / "repair")["model.layers.0.mlp.experts.down_proj"]
    (fitted,) = dict(checkpoint.tensors(entry.path)).values()  # [E, H, 16]
    rows = {expert: [] for expert in range(6)}  # activations times the router's weight, of tokens

    def record(experts, routed):
        values = activations(experts, routed)
        rows[routed.expert].append(values * routed.weights[:, None])
        return outputs(experts, routed, values)

    single = [
        {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
        for batch in batches()
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist())
    ]
    stream = LayerwiseModel(source, family, single)
    states = stream.embed()
    with torch.no_grad(), stream.layer(0) as layer:
        down = layer.mlp.experts.down_proj.clone()
        with running_experts(layer, record):
            stream.run_batches(0, states)
    for expert, its_rows in rows.items():
        inputs = torch.cat(its_rows) if its_rows else torch.zeros(0, down.shape[-1])
        expected = fit(down[expert], inputs.t() @ inputs, kept[expert], 0.1)
        torch.testing.assert_close(fitted[expert], expected, rtol=1e-3, atol=1e-4)


def test_repair_of_a_mixture_runs_inside_the_step(variant, calibration, tmp_path):
    source = save(build(variant), tmp_path / "source")
    assert cut(source, calibration, tmp_path / "cut", repair="ridge").repaired == 4 * 6
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


# ---- measured loss and the chooser


def test_measured_losses_are_those_of_the_narrow_checkpoints(variant, tmp_path):
    source, family, data = save(build(variant), tmp_path / "source"), FAMILIES[variant], batches()
    kept = {i: torch.stack([torch.arange(e, e + 16) for e in range(6)]) for i in ALL}
    variants = [PrunedVariant(), PrunedVariant(neurons=kept)]
    variants.append(PrunedVariant(frozenset({3}), {i: kept[i] for i in (0, 1, 2)}))
    found = losses(LayerwiseModel(source, family, data), variants)
    for number, one in enumerate(variants):
        folder = tmp_path / str(number)
        write_pruned(source, folder, family, Selection(tuple(i for i in ALL if i not in one.skipped), one.neurons))
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = [
            nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).item()
            for batch in data
            for ids in (row[: int(mask.sum())] for row, mask in zip(*list(batch.values())[:2], strict=True))
        ]
        assert found[number].tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("neuron_cost", "unit", "removed"), [(0.5, "neurons", ()), (2.0, "layers", (1,))], ids=["neurons", "layers"]
)
def test_the_chooser_weighs_neurons_of_experts_against_layers(
    variant, calibration, tmp_path, monkeypatch, neuron_cost, unit, removed
):
    """A layer costs 1 and more, and neurons with as many parameters what is given; what was measured is mocked."""

    def mock_losses(_stream, variants):
        costs = [sum((3.0, 1.0, 4.0, 5.0)[i] for i in one.skipped) for one in variants]
        narrow = [neuron_cost if one.neurons else 0 for one in variants]
        return torch.tensor(costs)[:, None] + torch.tensor(narrow)[:, None]

    monkeypatch.setattr(selection, "losses", mock_losses)
    source = save(build(variant), tmp_path / "source")
    body = model_dimensions(source, FAMILIES[variant])
    goal = body.params - body.params_per_layer
    report = prune_checkpoint(source, tmp_path / "cut", Prune(), calibration, unit="auto", goal=goal, seed=0)
    assert (report.unit, report.removed_layers) == (unit, removed) and report.params <= goal


def test_layers_and_then_neurons_of_experts_reach_a_goal_between(variant, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(
        selection, "losses", lambda _, variants: torch.tensor([[len(v.skipped)] for v in variants]) * 1.0
    )
    monkeypatch.setattr(selection, "_width_like_a_layer", lambda *_: None)
    source = save(build(variant), tmp_path / "source")
    body = model_dimensions(source, FAMILIES[variant])
    goal = body.params - int(1.3 * body.params_per_layer)
    report = prune_checkpoint(source, tmp_path / "cut", Prune(), calibration, unit="auto", goal=goal, seed=0)
    assert (report.unit, report.layers) == ("both", 3)
    assert report.params <= goal < report.params + 8 * body.params_per_neuron * 3 // 4
