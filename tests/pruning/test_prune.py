"""One checkpoint in, one smaller checkpoint out: widths, criteria, calibration on answers."""

import dataclasses
import json

import pytest
import torch
from bodies import body
from recovering import prune_to
from tiny_models import batches, build, load, logits, save

from ptl.config.chat import NO_CHAT
from ptl.config.data import DataSource
from ptl.config.run import Calibration
from ptl.errors import InputError
from ptl.model import checkpoint, dimensions
from ptl.model.dimensions import layers_for, model_dimensions, width_for
from ptl.model.families import FAMILIES
from ptl.pruning import importance
from ptl.pruning.prune import _batches, _has_loss

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA = FAMILIES["llama"]


@pytest.fixture
def source(tmp_path):
    return save(build("llama"), tmp_path / "source")


def prune(source, calibration, folder, *, goal=None, **settings):
    goal = goal or int(model_dimensions(source, LLAMA).params * 0.8)
    return prune_to(goal, source, folder, calibration, **settings)


# ---- how much stays


def test_automatic_multiples():
    """The largest of 128, 64 and 8 that divides the width, and of which at least eight remain."""
    for width, remaining, multiple in (
        *((width, width, 128) for width in (14336, 18944, 11008, 1536, 8960)),
        *(
            (1152, remaining, multiple)
            for remaining, multiple in ((1024, 128), (1023, 64), (512, 64), (511, 8))
        ),
        *((64, 64, 8), (64, 63, 1), (192, 192, 8), (13336, 13336, 8), (40, 40, 1)),
    ):
        assert dimensions.resolve_multiple(width, remaining, "auto") == multiple, (width, remaining)


def test_widths_and_layers_by_hand_and_that_a_loop_ends_with_the_width_of_one_shot_pruning():
    model = body(params=1000, layers=2, width=16, params_per_neuron=10, params_per_layer=300)
    goals = (1001, 1000, 999, 961, 960, 959)
    assert [width_for(model, goal, 1) for goal in goals] == [16, 16, 15, 12, 12, 11]
    assert [width_for(model, goal, 4) for goal in goals] == [16, 16, 12, 12, 12, 8]
    assert width_for(model, 880, 4) == 4 and width_for(model, 920, 8) == 8
    for goal, multiple in ((879, 4), (919, 8), (999, 16)):
        with pytest.raises(InputError, match=f"prune.width_multiple={multiple} needs at least"):
            width_for(model, goal, multiple)
    odd = dataclasses.replace(model, width=10)  # an odd width stays when nothing goes
    assert [width_for(odd, goal, 8) for goal in (odd.params, odd.params - 1)] == [10, 8]
    # Also where the width is small at the end: one-shot pruning rounded it by the large width it began with.
    model = body(params=100_000, layers=4, width=64, params_per_neuron=400, params_per_layer=24_000)
    for goal in range(75_500, 99_000, 1_300):
        width = width_for(model, (goal + model.params) // 2, "auto")
        halfway = dataclasses.replace(model, width=width)
        assert width_for(halfway, goal, "auto") == width_for(model, goal, "auto")
    model = body(params=1000, layers=4, width=16, params_per_neuron=12, params_per_layer=200)
    assert [layers_for(model, goal) for goal in (1001, 1000, 999, 800, 799, 400)] == [
        0,
        0,
        1,
        1,
        2,
        3,
    ]
    with pytest.raises(InputError, match="would remove 4 of 4 layers"):
        layers_for(model, 399)
    assert dimensions.smallest_cuts(model, 8) == {"layers": 200, "neurons": 96, "width": 96}
    # The last one stays.
    assert dimensions.smallest_cuts(dataclasses.replace(model, layers=1), 8) == {
        "neurons": 24,
        "width": 24,
    }


@pytest.mark.parametrize("unit", ["neurons", "layers"])
def test_a_target_beyond_reach_is_refused_before_any_text_is_read(source, tmp_path, unit):
    calibration = Calibration(data=DataSource(source="missing.jsonl", format="text"))
    with pytest.raises(InputError, match=r"schedule\.target: 1 parameters"):
        prune(source, calibration, tmp_path / "out", unit=unit, goal=1)


# ---- one step


@pytest.mark.parametrize("criterion", importance.CRITERIA)
def test_every_criterion_reaches_the_goal(source, calibration, tmp_path, criterion):
    report = prune(source, calibration, tmp_path / "pruned", criterion=criterion)
    assert (report.unit, report.criterion, report.sequences) == ("neurons", criterion, 8)
    assert (
        report.params
        <= report.goal
        < report.params + model_dimensions(source, LLAMA).params_per_neuron
    )
    assert report.widths == (report.widths[0],) * 4 and report.removed_layers == ()
    assert load(tmp_path / "pruned").num_parameters() == report.params < report.params_before
    assert json.loads(json.dumps(dataclasses.asdict(report)))["experts"] is None  # plain data


@pytest.mark.parametrize("criterion", ["max", "taylor"])
def test_dead_neurons_are_pruned_without_any_change_of_the_logits(calibration, tmp_path, criterion):
    model = build("llama")
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, i : i + 16] = 0
    source = save(model.bfloat16(), tmp_path / "source", "8KB")
    goal = model.num_parameters() - 16 * 4 * 3 * 32
    report = prune(source, calibration, tmp_path / "pruned", criterion=criterion, goal=goal)
    assert report.widths == (24,) * 4
    assert {entry.dtype for entry in checkpoint.contents(tmp_path / "pruned").values()} == {"BF16"}
    before, after = (
        load(source, dtype=torch.float32),
        load(tmp_path / "pruned", dtype=torch.float32),
    )
    torch.testing.assert_close(
        logits(after, batches()[0]), logits(before, batches()[0]), rtol=1e-4, atol=2e-4
    )


def test_the_layer_that_does_least_is_removed(calibration, tmp_path):
    model, batch = build("llama"), batches()[0]
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    report = prune(
        save(model, tmp_path / "source"), calibration, tmp_path / "pruned", unit="layers"
    )
    assert (report.unit, report.criterion, report.layers, report.widths) == (
        "layers",
        "max",
        3,
        (40,) * 3,
    )
    assert report.removed_layers == (2,) and report.params <= report.goal
    torch.testing.assert_close(logits(load(tmp_path / "pruned"), batch), logits(model, batch))


def test_the_seed_chooses_the_rows_and_the_same_seed_gives_the_same_bytes(
    source, calibration, tmp_path
):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        prune(source, calibration, tmp_path / name, criterion="random", seed=seed)
    one, same, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same != other
    batches = (_batches(source, calibration, NO_CHAT, seed, by_loss=False) for seed in (0, 1))
    rows, other_rows = (
        sorted(row for batch in of_seed for row in batch["input_ids"].tolist())
        for of_seed in batches
    )
    assert rows != other_rows


def test_a_goal_that_is_met_changes_nothing_and_scores_nothing(source, calibration, tmp_path):
    report = prune(
        source, calibration, tmp_path / "pruned", goal=model_dimensions(source, LLAMA).params
    )
    assert (report.unit, report.sequences, report.params) == ("nothing", 0, report.params_before)
    before, after = (
        dict(checkpoint.tensors(path / checkpoint.WEIGHTS))
        for path in (source, tmp_path / "pruned")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )


def test_what_measures_loss_needs_a_token_of_an_answer(source, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"prompt": "w5 w6 w7 w8", "completion": "w9"}) + "\n")
    asked = Calibration(data=DataSource(source=str(path)), max_length=4)
    with pytest.raises(
        InputError, match=r"calibration\.max_length: 4 tokens hold the prompts and nothing of an"
    ):
        prune(source, asked, tmp_path / "out", criterion="taylor")
    # the first token is predicted from nothing
    assert not _has_loss({"labels": torch.tensor([[5, -100, -100]])})
    assert _has_loss({"labels": torch.tensor([[-100, -100, -100], [-100, -100, 5]])})
    longer = asked.model_copy(update={"max_length": 5})
    for calibration, unit, criterion in (
        (asked, "layers", "taylor"),  # layers need no answer,
        (asked, "neurons", "max"),  # nor do activations
        (longer, "neurons", "taylor"),
    ):
        report = prune(
            source, calibration, tmp_path / f"{unit}-{criterion}", unit=unit, criterion=criterion
        )
        assert report.unit == unit
