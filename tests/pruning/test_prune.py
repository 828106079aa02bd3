"""One checkpoint in, one smaller checkpoint out: widths, criteria, calibration on answers."""

import dataclasses
import json
from typing import get_args

import pytest
import torch
from tiny_models import batches, build, logits, save, word_calibration
from transformers import AutoModelForCausalLM

from ptl.config.recover import DataSource
from ptl.config.run import Calibration
from ptl.config.schedule import EXPERT_CRITERIA, Prune
from ptl.errors import InputError
from ptl.model import checkpoint
from ptl.model.dimensions import ModelDimensions, layers_for, model_dimensions, resolve_multiple, width_for
from ptl.model.families import FAMILIES
from ptl.pruning.importance import CRITERIA
from ptl.pruning.prune import prune_checkpoint

LLAMA = FAMILIES["llama"]
ALL = tuple(range(4))


@pytest.fixture
def source(tmp_path):
    return save(build("llama"), tmp_path / "source")


@pytest.fixture
def calibration(tmp_path):
    return word_calibration(tmp_path)


def cut(source, calibration, folder, *, unit="neurons", share=0.2, **settings):
    body = model_dimensions(source, LLAMA)
    goal = int(body.params * (1 - share))
    return prune_checkpoint(source, folder, Prune(**settings), calibration, unit=unit, goal=goal, seed=0)


def test_what_measures_loss_needs_a_token_of_an_answer(source, calibration, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"prompt": "w5 w6 w7 w8", "completion": "w9"}) + "\n")
    asked = Calibration(data=DataSource(source=str(path)), max_length=4)
    with pytest.raises(InputError, match=r"calibration\.max_length: 4 tokens hold the prompts and nothing of an"):
        cut(source, asked, tmp_path / "out", criterion="taylor")
    (tmp_path / "layers").mkdir()
    assert cut(source, asked, tmp_path / "layers", unit="layers", criterion="taylor").unit == "layers"  # nor do layers
    (tmp_path / "max").mkdir()
    assert cut(source, asked, tmp_path / "max", criterion="max").unit == "neurons"  # activations need no answer
    (tmp_path / "taylor").mkdir()
    longer = asked.model_copy(update={"max_length": 5})
    assert cut(source, longer, tmp_path / "taylor", criterion="taylor").unit == "neurons"


# ---- widths


@pytest.mark.parametrize(
    ("width", "multiple"),
    [(14336, 128), (18944, 128), (11008, 128), (1536, 128), (8960, 128), (192, 8), (40, 1), (64, 8), (13336, 8)],
)
def test_automatic_multiples(width, multiple):
    assert resolve_multiple(width, width, "auto") == multiple
    assert width % multiple == 0


@pytest.mark.parametrize("multiple", [1, 8, 16, 24, 64])
@pytest.mark.parametrize("goal", range(49_000, 100_001, 3_000))
def test_widths_are_rounded_down_and_never_grow(goal, multiple):
    body = ModelDimensions(params=100_000, layers=4, width=192, params_per_neuron=400, params_per_layer=24_000)
    width = width_for(body, goal, multiple)
    assert 0 < width <= 192 and (width % multiple == 0 or width == 192)
    after = body.params - (192 - width) * 400
    assert after <= goal or goal >= body.params
    step = multiple if width + multiple <= 192 else 192 - width
    assert width == 192 or after + step * 400 > goal  # no more than needed


@pytest.mark.parametrize("goal", range(75_500, 99_000, 1_300))
def test_a_loop_and_one_shot_pruning_end_with_the_same_width(goal):
    """Also where the width is small at the end: one-shot pruning rounded it by the large width it began with."""
    body = ModelDimensions(params=100_000, layers=4, width=64, params_per_neuron=400, params_per_layer=24_000)
    direct = width_for(body, goal, "auto")
    in_two_steps = body
    for target in ((goal + body.params) // 2, goal):
        width = width_for(in_two_steps, target, "auto")
        params = in_two_steps.params - (in_two_steps.width - width) * 400
        in_two_steps = dataclasses.replace(in_two_steps, params=params, width=width)
    assert in_two_steps.width == direct


def test_an_odd_width_stays_when_nothing_goes():
    body = ModelDimensions(params=1000, layers=1, width=10, params_per_neuron=10, params_per_layer=500)
    assert width_for(body, 1000, 8) == 10 and width_for(body, 2000, 8) == 10 and width_for(body, 999, 8) == 8


def test_targets_beyond_reach_are_refused():
    body = ModelDimensions(params=1000, layers=2, width=16, params_per_neuron=10, params_per_layer=300)
    with pytest.raises(InputError, match=r"schedule.target: 900 .*prune.width_multiple=16 needs at least 1,000"):
        width_for(body, 900, 16)
    with pytest.raises(InputError, match=r"schedule.target"):
        width_for(body, 830, 8)
    with pytest.raises(InputError, match="would remove 2 of 2 layers"):
        layers_for(body, 500)
    assert layers_for(body, 700) == 1 and layers_for(body, 1000) == 0


@pytest.mark.parametrize("unit", ["neurons", "layers"])
def test_a_target_beyond_reach_is_refused_before_any_text_is_read(source, tmp_path, unit):
    calibration = Calibration(data=DataSource(source=str(tmp_path / "missing.jsonl"), format="text"))
    with pytest.raises(InputError, match=r"schedule\.target: 1 parameters"):
        prune_checkpoint(source, tmp_path / "out", Prune(), calibration, unit=unit, goal=1, seed=0)


# ---- one step


def test_settings_and_criteria_are_the_same_names():
    assert [*CRITERIA, *EXPERT_CRITERIA] == list(get_args(Prune.model_fields["criterion"].annotation))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_reaches_the_goal(source, calibration, tmp_path, criterion):
    report = cut(source, calibration, tmp_path / "cut", criterion=criterion)
    assert (report.unit, report.criterion) == ("neurons", criterion)
    assert report.params <= report.goal < report.params + model_dimensions(source, LLAMA).params_per_neuron
    assert report.widths == (report.widths[0],) * 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").num_parameters() == report.params


def test_layers_reach_the_goal(source, calibration, tmp_path):
    report = cut(source, calibration, tmp_path / "cut", unit="layers")
    assert (report.unit, report.criterion, report.layers) == ("layers", "max", 3)
    assert report.params <= report.goal and len(report.removed_layers) == 1 and report.widths == (40,) * 3


def test_the_same_step_gives_the_same_bytes(source, calibration, tmp_path):
    for name in ("one", "two"):
        cut(source, calibration, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_goal_that_is_met_changes_nothing_and_scores_nothing(source, calibration, tmp_path):
    report = cut(source, calibration, tmp_path / "cut", share=0)
    assert (report.unit, report.sequences, report.params) == ("nothing", 0, report.params_before)
    model, same = build("llama"), AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(logits(same.eval(), batches()[0]), logits(model, batches()[0]))


def test_a_bfloat16_checkpoint_stays_one(calibration, tmp_path):
    source = save(build("llama").bfloat16(), tmp_path / "half", "8KB")
    cut(source, calibration, tmp_path / "cut")
    assert {entry.dtype for entry in checkpoint.contents(tmp_path / "cut").values()} == {"BF16"}


def test_the_report_is_plain_data(source, calibration, tmp_path):
    report = dataclasses.asdict(cut(source, calibration, tmp_path / "cut"))
    assert json.loads(json.dumps(report))["sequences"] == 8
