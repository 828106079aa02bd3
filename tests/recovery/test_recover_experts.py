"""A mixture of experts from pruning to its scores: recovery trains experts and routers, evaluation asks the result."""

import json
import math
import shutil

import pytest
import torch
from recovering import DATA, DENSE, losses, recover, weights
from tiny_models import build
from transformers import AutoTokenizer

from ptl.config.run import Calibration, Evaluate
from ptl.config.schedule import Prune
from ptl.evaluation.evaluate import evaluate_checkpoint
from ptl.model import checkpoint, dimensions
from ptl.model.dimensions import model_dimensions, with_experts, with_width
from ptl.model.families import FAMILIES
from ptl.pruning.prune import prune_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
CPT = {"method": "cpt"}
DISTIL = {"method": "distil"}
TASK = DENSE.parent / "tiny_reasoner.yaml"


# Training differs by what a layer has besides plain experts: a shared one and corrections, or biases.
@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def small(request, tmp_path_factory):
    """A mixture with the tiny reasoner's tokenizer, pruned from six experts to four."""
    source = tmp_path_factory.mktemp("mixture")
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    build(request.param, vocab_size=len(tokenizer), max_position_embeddings=256, **ids).save_pretrained(source)
    tokenizer.save_pretrained(source)
    return cut(source, tmp_path_factory.mktemp("cut"), experts=4)


def cut(source, folder, experts):
    family = FAMILIES[checkpoint.read_config(source)["model_type"]]
    goal = with_experts(model_dimensions(source, family), experts).params
    scored = Calibration(data=DATA.sources[0], num_sequences=8, max_length=64)
    prune_checkpoint(source, folder, Prune(target="experts"), scored, unit="experts", goal=goal, seed=0)
    return folder


def taught(stage, teacher):
    """The stage, with a teacher where it has one."""
    return stage | ({"teacher": str(teacher)} if stage["method"] == "distil" else {})


@pytest.mark.parametrize("stage", [CPT, DISTIL])
def test_two_steps_move_experts_and_routers_and_the_loss_is_finite(small, tmp_path, stage):
    report = recover(small, tmp_path / "out", taught(stage, small), tokens=500, log=(log := []))
    before, after = weights(small), weights(tmp_path / "out")
    assert before.keys() == after.keys() and report.steps >= 2
    # A router's correction follows no gradient.
    trained = [name for name in before if not name.endswith("e_score_correction_bias")]
    assert all(not torch.equal(before[name], after[name]) for name in trained)
    assert all(math.isfinite(loss) for _, loss in losses(log))
    assert (tmp_path / "out/config.json").read_text() == (small / "config.json").read_text()


def is_router(name):
    return ".mlp.router." in name or ".gate." in name


def has_router_loss(folder):
    return checkpoint.read_config(folder)["model_type"] not in ("deepseek_v3", "glm4_moe")  # transformers has none


def with_coefficient(small, folder, coefficient):
    """The checkpoint with another weight of the router's auxiliary loss in its config."""
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((small / "config.json").read_text()) | {"router_aux_loss_coef": coefficient}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("stage", [CPT, CPT | {"accumulation": 2}, DISTIL | {"accumulation": 2}])
def test_the_routers_auxiliary_loss_has_the_weight_that_the_config_names(small, tmp_path, stage):
    """The loss that is logged has it added; the auxiliary loss is about the number of experts of a token."""
    if not has_router_loss(small):
        pytest.skip("transformers has none for this family")
    first = {}
    for coefficient in (0.0, 1.0):
        source = with_coefficient(small, tmp_path / f"{coefficient}", coefficient)
        recover(source, tmp_path / f"{coefficient}-out", taught(stage, small), tokens=500, log=(log := []))
        first[coefficient] = losses(log)[0][1]
    experts_per_token = checkpoint.read_config(small)["num_experts_per_tok"]
    assert first[1.0] - first[0.0] == pytest.approx(experts_per_token, rel=0.3)


def test_lora_adapts_attention_experts_and_routers(small, tmp_path):
    recover(small, tmp_path / "out", CPT | {"lora": {"rank": 2}, "learning_rate": 1e-2}, tokens=500)
    before, after = weights(small), weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert all(any(part in name for name in moved) for part in ("self_attn", "experts"))
    assert any(map(is_router, moved))
    assert not any("norm" in name or "embed" in name for name in moved)


def test_a_step_of_grpo_moves_the_routers(small, tmp_path):
    """A random model earns no reward, so that the routers' auxiliary loss alone moves weights, where there is one."""
    stage = {"method": "grpo", "steps": 1, "batch_size": 4, "num_generations": 2, "max_completion_length": 8}
    stage |= {"guard_prompts": 0, "processes": 1, "rewards": [{"name": "final_answer"}], "learning_rate": 1e-2}
    recover(small, tmp_path / "out", stage, tokens=None)
    before, after = weights(small), weights(tmp_path / "out")
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    moved = any(is_router(name) and not torch.equal(before[name], after[name]) for name in before)
    assert moved == has_router_loss(small)


def test_the_optimizer_state_follows_the_experts_that_stay(small, tmp_path):
    recover(small, tmp_path / "once", CPT | {"carry_moments": True}, tokens=500, last=False)
    pruned = cut(tmp_path / "once", tmp_path / "pruned", experts=3)
    recover(pruned, tmp_path / "twice", CPT | {"carry_moments": True}, tokens=500, earlier=(500,), log=(log := []))
    assert (pruned / checkpoint.STATE).is_file() and all(math.isfinite(loss) for _, loss in losses(log))


def narrow(source, folder, width):
    family = FAMILIES[checkpoint.read_config(source)["model_type"]]
    goal = with_width(model_dimensions(source, family), width).params
    scored = Calibration(data=DATA.sources[0], num_sequences=8, max_length=64)
    prune_checkpoint(source, folder, Prune(), scored, unit="neurons", goal=goal, seed=0)
    return folder


@pytest.mark.parametrize("small", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("stage", [CPT, DISTIL], ids=["cpt", "distil"])
def test_two_steps_move_narrow_experts_and_the_loss_is_finite(small, tmp_path, stage):
    pruned = narrow(small, tmp_path / "narrow", width=16)
    report = recover(pruned, tmp_path / "out", taught(stage, small), tokens=500, log=(log := []))
    before, after = weights(pruned), weights(tmp_path / "out")
    assert report.steps >= 2 and all(math.isfinite(loss) for _, loss in losses(log))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    sizes = model_dimensions(tmp_path / "out", FAMILIES[checkpoint.read_config(small)["model_type"]])
    assert (sizes.width, sizes.experts) == (16, 4)


@pytest.mark.parametrize("small", ["qwen3_moe"], indirect=True)
def test_the_optimizer_state_follows_the_neurons_that_stay(small, tmp_path):
    recover(small, tmp_path / "once", CPT | {"carry_moments": True}, tokens=500, last=False)
    pruned = narrow(tmp_path / "once", tmp_path / "narrow", width=16)
    recover(pruned, tmp_path / "twice", CPT | {"carry_moments": True}, tokens=500, earlier=(500,), log=(log := []))
    assert (pruned / checkpoint.STATE).is_file() and all(math.isfinite(loss) for _, loss in losses(log))


def test_the_recovered_mixture_is_evaluated_with_its_active_parameters(small, tmp_path):
    """With router logits too, from which transformers cannot compute a loss while it generates for a padded batch."""
    small = shutil.copytree(small, tmp_path / "model")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    settings = Evaluate(tasks=[{"name": str(TASK), "limit": 4, "max_new_tokens": 8}], batch_size=2)
    scores = evaluate_checkpoint(small, tmp_path, settings, seed=0)
    assert scores.experts == 4 and scores.active_params < scores.params == dimensions.static_cost(small).params
    assert scores.tasks[0].items == 4 and (tmp_path / "items.jsonl").read_text().count("\n") == 4
