"""A mixture of experts from pruning to its scores: recovery trains experts and routers, evaluation asks the result."""

import shutil
from dataclasses import replace

import pytest
import torch
from recovering import DATA, DENSE, losses, prune_to, recover, weights
from tiny_models import change_config, family_at, with_reasoners_tokenizer

from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration, Evaluate
from ptl.data.stages import check_stages
from ptl.errors import InputError
from ptl.evaluation.evaluate import evaluate_checkpoint
from ptl.model import checkpoint, dimensions
from ptl.model.dimensions import model_dimensions

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("recover_experts")]
CPT, DISTIL = {"method": "cpt"}, {"method": "distil"}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """A mixture of each family with the tiny reasoner's tokenizer, pruned from six experts to four."""
    folders = {}
    # training differs by what a layer has besides plain experts: a shared one and corrections, or biases
    for family in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        source = with_reasoners_tokenizer(family, tmp_path_factory.mktemp(family))
        folders[family] = prune(source, tmp_path_factory.mktemp("pruned"), "experts", 4)
    return folders


def prune(source, folder, unit, number):
    size = {"experts": "experts", "neurons": "width"}[unit]
    goal = replace(model_dimensions(source, family_at(source)), **{size: number}).params
    scored = Calibration(data=DATA.sources[0], num_sequences=8, max_length=64)
    prune_to(goal, source, folder, scored, unit=unit, target=unit)
    return folder


def moved(before, after):
    """Names of the weights that differ."""
    assert before.keys() == after.keys() and all(
        torch.isfinite(tensor).all() for tensor in after.values()
    )
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_router(name):
    return ".mlp.router." in name or ".gate." in name


def test_a_family_that_mixes_packed_texts_is_not_trained_on_them(mixtures):
    packed = RecoverStage(packing=True, loss="all", max_length=64)
    check_stages(mixtures["qwen3_moe"], [packed], None)
    with pytest.raises(InputError, match=r"recover\.packing: true, and in gpt_oss packed texts"):
        check_stages(mixtures["gpt_oss"], [packed], None)


@pytest.mark.parametrize(
    ("family", "stage"), [("qwen3_moe", CPT), ("deepseek_v3", CPT), ("gpt_oss", DISTIL)]
)
def test_training_moves_experts_and_routers(mixtures, tmp_path, family, stage):
    small = mixtures[family]
    recover(small, tmp_path / "out", stage, tokens=500, teacher=small)
    before = weights(small)
    # A router's correction follows no gradient.
    trained = {name for name in before if not name.endswith("e_score_correction_bias")}
    assert moved(before, weights(tmp_path / "out")) == trained


@pytest.mark.parametrize(
    ("family", "stage"),
    [
        ("qwen3_moe", CPT),
        ("gpt_oss", CPT | {"accumulation": 2}),
        ("qwen3_moe", DISTIL | {"accumulation": 2}),
    ],
)
def test_the_routers_auxiliary_loss_has_the_weight_that_the_config_names(
    mixtures, tmp_path, family, stage
):
    """The loss that is logged has it added; the auxiliary loss is about the number of experts of a token."""
    first = []
    for coefficient in (0.0, 1.0):
        source = shutil.copytree(mixtures[family], tmp_path / f"{coefficient}")
        change_config(source, router_aux_loss_coef=coefficient)
        out = tmp_path / f"{coefficient}-out"
        recover(source, out, stage, tokens=300, log=(log := []), teacher=mixtures[family])
        first.append(losses(log)[0][1])
    assert first[1] - first[0] == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_lora_adapts_attention_experts_and_routers(mixtures, tmp_path, family):
    recover(
        mixtures[family],
        tmp_path / "out",
        CPT | {"lora": {"rank": 2}, "learning_rate": 1e-2},
        tokens=300,
    )
    names = moved(weights(mixtures[family]), weights(tmp_path / "out"))
    assert all(any(part in name for name in names) for part in ("self_attn", "experts")) and any(
        map(is_router, names)
    )
    assert not any("norm" in name or "embed" in name for name in names)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_step_of_grpo_moves_the_routers(mixtures, tmp_path, family):
    """A random model earns no reward, so that the routers' auxiliary loss alone moves weights, where there is one."""
    stage = {
        "method": "grpo",
        "steps": 1,
        "batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
    }
    stage |= {
        "guard_prompts": 0,
        "processes": 1,
        "rewards": [{"name": "final_answer"}],
        "learning_rate": 1e-2,
    }
    recover(mixtures[family], tmp_path / "out", stage, tokens=None)
    names = moved(weights(mixtures[family]), weights(tmp_path / "out"))
    # for which transformers has none
    assert any(map(is_router, names)) == (family != "deepseek_v3")


def test_the_optimizer_state_follows_the_experts_and_neurons_that_stay(mixtures, tmp_path):
    once, fewer, narrow, twice = (tmp_path / name for name in ("once", "fewer", "narrow", "twice"))
    recover(mixtures["qwen3_moe"], once, CPT, tokens=300, last=False)
    prune(prune(once, fewer, "experts", 3), narrow, "neurons", 16)
    state = dict(checkpoint.tensors(narrow / checkpoint.STATE))
    report = recover(narrow, twice, CPT, tokens=500, earlier=(300,), last=False)
    assert moved(weights(narrow), weights(twice)) == weights(narrow).keys()
    sizes = model_dimensions(twice, family_at(twice))
    assert (sizes.width, sizes.experts) == (16, 3)
    later = dict(checkpoint.tensors(twice / checkpoint.STATE))
    assert later["step"] == state["step"] + report.steps
    assert {name: tensor.shape for name, tensor in later.items()} == {
        name: t.shape for name, t in state.items()
    }


def test_the_recovered_mixture_is_evaluated_with_its_active_parameters(mixtures, tmp_path):
    """With router logits too, from which transformers cannot compute a loss while it generates for a padded batch."""
    small = shutil.copytree(mixtures["qwen3_moe"], tmp_path / "model")
    change_config(small, output_router_logits=True)
    task = {"name": str(DENSE.parent / "tiny_reasoner.yaml"), "limit": 4, "max_new_tokens": 8}
    scores = evaluate_checkpoint(small, tmp_path, Evaluate(tasks=[task], batch_size=2), seed=0)
    assert (
        scores.experts == 4
        and scores.active_params < scores.params == dimensions.static_cost(small).params
    )
    assert scores.tasks[0].items == 4 and (tmp_path / "items.jsonl").read_text().count("\n") == 4
