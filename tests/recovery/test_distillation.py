"""Distillation: the loss against a hand-computed one, its two ends, and teachers that do not fit."""

import math

import pytest
import torch
from recovering import DENSE, cut, losses, recover, weights
from transformers import LlamaForCausalLM

from ptl.errors import InputError
from ptl.recovery.distillation import ce_and_kl

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("distillation")]
DISTIL = {"method": "distil"}


def test_the_loss_is_the_hand_computed_one():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    of_one = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    sums = ce_and_kl(student.repeat(3, 1), teacher.repeat(3, 1), torch.tensor([0, 1, 1]), 1.0)
    assert [each.item() for each in sums] == pytest.approx([3 * math.log(2), 3 * of_one])
    _, warm = ce_and_kl(student, teacher, torch.tensor([1]), 2.0)
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    assert warm.item() == pytest.approx(
        4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), rel=1e-5
    )
    # padded vocabularies are compared where both have tokens
    wide = torch.tensor([[1.0, 2.0, 50.0]])
    for one, other in ((wide[:, :2], wide), (wide, wide[:, :2]), (teacher, teacher)):
        assert ce_and_kl(one, other, torch.tensor([0]), 3.0)[1].item() == pytest.approx(0, abs=1e-6)


def test_with_the_whole_mix_on_the_next_token_it_is_cpt(small, tmp_path, monkeypatch):
    """Without the logits of what all prompts begin with."""
    recover(small, tmp_path / "cpt", {"method": "cpt"}, tokens=500)
    stage, forward, passes = DISTIL | {"mix": 1.0, "accumulation": 2}, LlamaForCausalLM.forward, []

    def noted(model, **given):
        passes.append((given["logits_to_keep"], given["input_ids"].shape[1]))
        return forward(model, **given)

    monkeypatch.setattr(LlamaForCausalLM, "forward", noted)
    report = recover(small, tmp_path / "distil", stage, tokens=500, teacher=DENSE)
    mine, theirs = weights(tmp_path / "distil"), weights(tmp_path / "cpt")
    assert report.tokens == 500 and report.method == "distil"
    assert all(kept < length for kept, length in passes)
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


def test_it_approaches_its_teacher(small, tmp_path):
    stage = DISTIL | {"mix": 0.0, "accumulation": 2, "lora": {"rank": 16}, "learning_rate": 3e-3}
    recover(
        cut(DENSE, tmp_path / "cut", 85_000),
        tmp_path / "out",
        stage,
        tokens=6_000,
        teacher=DENSE,
        log=(log := []),
    )
    curve = [loss for _, loss in losses(log)]
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    own = DISTIL | {"mix": 0.0, "teacher": str(small)}  # teaches nothing
    recover(small, tmp_path / "own", own, tokens=150, log=(log := []))
    assert losses(log)[0][1] == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="no original model"):
        recover(small, tmp_path / "none", DISTIL)
