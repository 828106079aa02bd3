"""GRPO: it learns from verifiable rewards, refuses what it cannot learn from, and resumes after a kill."""

import json
import shutil

import pytest
import torch
from recovering import DATA, DENSE, cut, recover, weights
from safetensors.torch import save_file

from ptl.config.recover import RecoverStage
from ptl.data.checks import check_rewards
from ptl.errors import InputError, WorkError
from ptl.recovery import grpo
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.training import learning_rate_curve
from ptl.storage.local_files import COMPLETE

REWARDS = [{"name": "final_answer", "weight": 0.9}, {"name": "format", "weight": 0.1}]
STAGE = {
    "method": "grpo",
    "learning_rate": 3e-4,
    "steps": 4,
    "batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 44,
    "guard_prompts": 8,
    "save_steps": 2,
    "processes": 1,
    "rewards": REWARDS,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return cut(DENSE, tmp_path_factory.mktemp("cut"), 130_000)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    dst, log = tmp_path_factory.mktemp("grpo") / "out", []
    return dst, recover(small, dst, STAGE, log=log), log


def job(folder, index=1, weights=(1,)):
    return RecoveryJob(DATA, StageBudget(None, (), index, True, 0, weights), folder, lambda metrics, step: None)


def test_steps_move_the_weights_and_what_matters_is_logged(small, trained):
    dst, report, log = trained
    before, after = weights(small), weights(dst)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert report.steps == 4
    rewards = [metrics for _, metrics in log if "reward" in metrics]
    assert len(rewards) == 4
    for metrics in rewards:
        assert {"frac_reward_zero_std", "completions/mean_length", "kl", "rewards/final_answer/mean"} <= metrics.keys()
        assert 0 <= metrics["reward"] <= 1
    assert report.tokens == rewards[-1]["num_tokens"] > 0


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_to_the_same_weights(small, trained, tmp_path):
    scratch = tmp_path / "training"
    shutil.copytree(trained[0].with_name("out.training"), scratch)
    shutil.rmtree(scratch / "checkpoint-4")
    report = recover(small, tmp_path / "out", STAGE, scratch=scratch)
    assert report.resumed_at == 2 and (scratch / "checkpoint-4" / COMPLETE).exists()
    mine, theirs = weights(tmp_path / "out"), weights(trained[0])
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_the_warm_up_leaves_no_step_without_training(steps):
    curve = learning_rate_curve(
        RecoverStage(method="grpo"), StageBudget(None, (), 2, True, 0, (1, 2)), steps, carried=False
    )
    factors = [curve(step) for step in range(steps)]
    assert min(factors) > 0 and factors[steps // 2 :] == [1.0] * (steps - steps // 2)
    assert factors == sorted(factors)


@pytest.mark.slow
def test_an_iteration_of_one_step_trains_and_keeps_the_dtype(small, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(small, half)
    stored = {name: tensor.bfloat16() for name, tensor in weights(small).items()}
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    report = recover(half, tmp_path / "out", STAGE | {"steps": 1, "learning_rate": 1e-2})
    after = weights(tmp_path / "out")
    assert report.steps == 1 and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(after[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_a_share_of_the_tokens_ends_training(small, tmp_path):
    chain = ({"method": "cpt", "share": 0.5}, STAGE | {"share": 0.5})
    report = recover(small, tmp_path / "out", *chain, tokens=1600)
    first, second = report.details["stages"]
    assert (report.method, first["tokens"]) == ("cpt+grpo", 800)
    assert second["steps"] < 4 and 800 <= second["tokens"] < 800 + 16 * 256


def test_prompts_of_the_iterations_are_others_and_carry_their_references(small, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    positions = 256
    stage = RecoverStage(**STAGE | {"steps": 6})
    first, second = (grpo.prompts(stage, job(tmp_path, index, (1, 2)), tokenizer, positions) for index in (1, 2))
    assert (len(first), len(second)) == (2 * 16 // 4, 4 * 16 // 4)  # the control has the six steps at once
    assert [row["prompt"] for row in grpo.prompts(stage, job(tmp_path), tokenizer, positions)] == [
        row["prompt"] for row in (*first, *second)
    ]
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in second}
    assert all(row["prompt"].endswith("?\n") and "####" in row["reference_0"] for row in first)
    with pytest.raises(InputError, match="an answer of 300 tokens"):
        grpo.prompts(RecoverStage(**STAGE | {"max_completion_length": 300}), job(tmp_path), tokenizer, positions)


@pytest.mark.slow
def test_zero_reward_ends_training(small, tmp_path):
    """A reference that no answer equals stands for a model that solves nothing."""
    rewards = [{"name": "final_answer", "answer": "#### 123456"}, {"name": "format"}]
    with pytest.raises(WorkError, match=r"solves none of 8 prompts in 4 tries.*recover by cpt or distil first"):
        recover(small, tmp_path / "out", STAGE | {"rewards": rewards})
    assert not list(tmp_path.glob("out.training/checkpoint-*"))


def test_prompts_need_no_completion(small, tmp_path):
    from transformers import AutoTokenizer

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"problem": "One plus one?", "solution": "2"}\n')
    prompts = {"source": str(path), "prompt": "{problem}"}
    stage = RecoverStage(**STAGE | {"prompts": prompts, "rewards": [{"name": "math", "answer": "{solution}"}]})
    positions = 256
    found = grpo.prompts(stage, job(tmp_path), AutoTokenizer.from_pretrained(small), positions)
    assert found[0] == {"prompt": "One plus one?", "reference_0": "2"} and len(found) == 16


def test_steps_are_shared_out_and_none_is_an_error(small, tmp_path):
    parts = [StageBudget(None, (), i, i == 3, 0, (1, 2, 4)).part(60) for i in (1, 2, 3)]
    assert parts == [(0, 8), (8, 17), (25, 35)] and StageBudget(None, (), 1, True, 0).part(60) == (0, 60)
    with pytest.raises(InputError, match="6 steps over 4 iterations leave none for iteration 1"):
        grpo.prompts(RecoverStage(**STAGE | {"steps": 6}), job(tmp_path, 1, (1, 2, 4, 8)), None, None)


def test_a_reward_without_its_column_is_refused(small, tmp_path):
    with pytest.raises(InputError, match="lacks 'solution'"):
        recover(small, tmp_path / "out", STAGE | {"rewards": [{"name": "math", "answer": "{solution}"}]})


def test_prompts_and_rewards_are_checked_before_a_run(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"problem": "One plus one?", "solution": "2"}\n')
    prompts = {"source": str(path), "prompt": "{problem}"}
    right = [{"name": "math", "answer": "{solution}"}]
    check_rewards([RecoverStage(method="grpo", prompts=prompts, rewards=right)], DATA)
    check_rewards(
        [RecoverStage(method="grpo", rewards=[{"name": "math", "answer": "{answer}"}])], DATA
    )  # the training data's prompts
    for change, said in (
        ({"prompts": prompts}, "lacks 'answer'"),
        ({"prompts": prompts | {"prompt": "{question}"}, "rewards": right}, "lacks 'question'"),
        ({"prompts": {"source": "none.jsonl"}}, r"no file none\.jsonl"),
    ):
        with pytest.raises(InputError, match=said):
            check_rewards([RecoverStage(method="grpo", **change)], DATA)
    with pytest.raises(ValueError, match="no regular expression"):
        RecoverStage(method="grpo", rewards=[*right, {"name": "format", "pattern": "("}])


def test_the_source_keeps_its_generation_config(small, trained):
    name = "generation_config.json"
    assert json.loads((trained[0] / name).read_text()) == json.loads((small / name).read_text())
