"""Distillation: the loss against a hand-computed one, its two ends, and teachers that do not fit."""

import json
import math
import shutil

import pytest
import torch
from recovering import DENSE, cut, losses, recover, weights

from ptl.errors import InputError
from ptl.recovery.distillation import ce_and_kl

DISTIL = {"method": "distil"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return cut(DENSE, tmp_path_factory.mktemp("cut"), 130_000)


def test_the_loss_is_the_hand_computed_one():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    ce, kl = ce_and_kl(student, teacher, torch.tensor([1]), 1.0)
    assert ce.item() == pytest.approx(math.log(2))
    assert kl.item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    _, warm = ce_and_kl(student, teacher, torch.tensor([1]), 2.0)
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    assert warm.item() == pytest.approx(4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), rel=1e-5)
    assert ce_and_kl(teacher, teacher, torch.tensor([0]), 3.0)[1].item() == pytest.approx(0, abs=1e-6)


def test_padded_vocabularies_are_compared_where_both_have_tokens():
    wide = torch.tensor([[1.0, 2.0, 50.0]])
    assert ce_and_kl(wide[:, :2], wide, torch.tensor([0]), 1.0)[1].item() == pytest.approx(0, abs=1e-6)


def test_with_the_whole_mix_on_the_next_token_it_is_cpt(small, tmp_path):
    recover(small, tmp_path / "cpt", {"method": "cpt"}, tokens=800)
    report = recover(small, tmp_path / "distil", DISTIL | {"mix": 1.0}, tokens=800, teacher=DENSE)
    mine, theirs = weights(tmp_path / "distil"), weights(tmp_path / "cpt")
    assert report.tokens == 800 and report.method == "distil"
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


def test_a_teacher_that_is_the_student_teaches_nothing(small, tmp_path):
    recover(small, tmp_path / "out", DISTIL | {"mix": 0.0, "teacher": str(small)}, tokens=400, log=(log := []))
    assert losses(log)[0][1] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_it_approaches_the_teacher(tmp_path):
    small = cut(DENSE, tmp_path / "cut", 85_000)
    report = recover(small, tmp_path / "out", DISTIL | {"mix": 0.0}, tokens=12_000, teacher=DENSE, log=(log := []))
    curve = [loss for _, loss in losses(log)]
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5]) and report.tokens == 12_000


def test_accumulation_and_lora_go_with_it(small, tmp_path):
    stage = DISTIL | {"accumulation": 2, "lora": {"rank": 2}}
    report = recover(small, tmp_path / "out", stage, tokens=600, teacher=DENSE)
    assert report.tokens == 600 and weights(tmp_path / "out").keys() == weights(small).keys()


def test_teachers_that_do_not_fit(small, tmp_path):
    with pytest.raises(InputError, match="no original model"):
        recover(small, tmp_path / "out", DISTIL)
    other = tmp_path / "other"
    shutil.copytree(DENSE, other)
    told = json.loads((other / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="another vocabulary"):
        recover(small, tmp_path / "out", DISTIL, teacher=other)
