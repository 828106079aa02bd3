"""GRPO: it learns from verifiable rewards, refuses what it cannot learn from, and resumes after a kill."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from chats import tokenizer_with
from recovering import DATA, as_if_died_after, recover, weights
from transformers import TrainingArguments

from ptl.config.chat import Chat
from ptl.config.recover import RecoverStage
from ptl.errors import InputError, WorkError
from ptl.model import pretrained
from ptl.preflight.rows import check_rewards
from ptl.recovery import grpo, sft
from ptl.recovery.job import RecoveryJob, StageBudget

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("grpo")]
STAGE = {
    "method": "grpo",
    "learning_rate": 3e-4,
    "steps": 4,
    "batch_size": 16,
    "num_generations": 4,
    "save_steps": 2,
}
STAGE |= {"max_completion_length": 44, "guard_prompts": 8, "processes": 1}
STAGE |= {"rewards": [{"name": "final_answer", "weight": 0.9}, {"name": "format", "weight": 0.1}]}


def test_steps_move_the_weights_and_continue_after_a_kill(small, tmp_path):
    dst, scratch = tmp_path / "out", tmp_path / "training"
    report = recover(small, dst, STAGE, log=(log := []), scratch=scratch)
    before, after = weights(small), weights(dst)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rewards = [metrics for _, metrics in log if "reward" in metrics]
    assert report.steps == len(rewards) == 4
    for metrics in rewards:
        parts = 0.9 * metrics["rewards/final_answer/mean"] + 0.1 * metrics["rewards/format/mean"]
        assert metrics["reward"] == pytest.approx(parts)
    assert report.tokens == rewards[-1]["num_tokens"] > 0
    assert (dst / "generation_config.json").read_text() == (
        small / "generation_config.json"
    ).read_text()
    as_if_died_after(2, scratch)
    assert recover(small, tmp_path / "again", STAGE, scratch=scratch).resumed_at == 2
    again = weights(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in before)


def test_a_share_of_the_tokens_ends_training(small, tmp_path):
    chain = ({"method": "cpt", "share": 0.5}, STAGE | {"share": 0.5})
    report = recover(small, tmp_path / "out", *chain, tokens=1600)
    first, second = report.details["stages"]
    assert (report.method, first["tokens"]) == ("cpt+grpo", 800)
    assert second["steps"] < 4 and 800 <= second["tokens"] < 800 + 16 * 256


def test_a_model_that_solves_nothing_ends_training():
    for step, max_steps, correct, guard, ends in (
        (1, 4, [0.0], 8, False),  # four prompts a step
        (2, 4, [0.0], 8, True),
        (2, 4, [0.1, 0.0], 8, False),
        (2, 4, [None], 8, True),  # no reference could be read
        (1, 1, [0.0], 8, True),  # the last step
        (2, 4, [0.0], 0, False),  # no guard
    ):
        log = [
            {"rewards/final_answer/mean": share, "rewards/format/mean": 1.0} for share in correct
        ]
        stage = RecoverStage(**STAGE | {"guard_prompts": guard})
        state = SimpleNamespace(global_step=step, max_steps=max_steps, log_history=log)
        with (
            pytest.raises(WorkError, match=rf"solves none of {4 * step} prompts")
            if ends
            else nullcontext()
        ):
            grpo._limits(stage, None).on_log(
                None, state, SimpleNamespace(should_training_stop=False)
            )


def test_rewards_are_for_what_follows_the_thought_which_the_prompt_may_have_begun():
    said = [{"role": "assistant", "content": "#### 3</think>#### 4"}]
    thought = [{"role": "assistant", "content": "#### 4"}]
    for template, without_end in (("qwen3", "#### 4"), ("deepseek_r1_distill", "")):
        read = grpo.reader(Chat(enabled=True), tokenizer_with(template))
        assert (read(said), read(thought)) == ("#### 4", without_end)
    assert grpo.reader(Chat(), None)("<think>3") == "<think>3"
    tokenizer = tokenizer_with("qwen3")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    for begin in ("<|im_end|>", "<|im_end|>thought"):
        with pytest.raises(
            InputError, match=r"^chat\.thought: <\|im_end\|>.* and x are special .*; recover by"
        ):
            grpo.reader(Chat(enabled=True, thought=(begin, "x")), tokenizer)


def prompts(model, folder, index=1, shares=(1,), **settings):
    """Those of an iteration, for a model of 256 positions."""
    budget = StageBudget(None, (), index, index == len(shares), 0, shares)
    job = RecoveryJob(DATA, budget, folder, lambda metrics, step: None)
    return grpo.prompts(RecoverStage(**STAGE | settings), job, pretrained.tokenizer(model), 256)


def test_steps_are_shared_out_and_prompts_of_iterations_carry_their_references(small, tmp_path):
    first, second = (prompts(small, tmp_path, index, (1, 2), steps=6) for index in (1, 2))
    assert (len(first), len(second)) == (2 * 16 // 4, 4 * 16 // 4)
    # the control has the six steps at once
    assert prompts(small, tmp_path, steps=6) == [*first, *second]
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in second}
    assert all(row["prompt"].endswith("?\n") and "####" in row["reference_0"] for row in first)
    parts = [StageBudget(None, (), i, i == 3, 0, (1, 2, 4)).part(60) for i in (1, 2, 3)]
    assert parts == [(0, 8), (8, 17), (25, 35)] and StageBudget(None, (), 1, True, 0).part(60) == (
        0,
        60,
    )
    assert StageBudget(None, (), 2, False, 0, (1, 2, 5)).interval == (0.125, 0.375)
    with pytest.raises(InputError, match="6 steps over 4 iterations leave none for iteration 1"):
        prompts(small, tmp_path, 1, (1, 2, 4, 8), steps=6)


def test_a_single_process_trains_on_one_gpu_of_several(tmp_path, monkeypatch):
    """trl refuses to divide a batch among them without processes; here they are as if there."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    job = RecoveryJob(DATA, StageBudget(1500, (), 1, True, 0), tmp_path, lambda metrics, step: None)
    stage = RecoverStage(**STAGE)
    for arguments in (sft.sft_arguments(stage, job), grpo._arguments(stage, job, 1)):
        assert arguments._n_gpu == 1


def test_prompts_with_room_for_answers_and_rewards_are_checked_before_a_run(small, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"problem": "One plus one?", "solution": "2"}\n')  # without a completion
    source, right = (
        {"source": str(path), "prompt": "{problem}"},
        [{"name": "math", "answer": "{solution}"}],
    )
    rows = prompts(small, tmp_path, prompts=source, rewards=right)
    assert rows == [{"prompt": "One plus one?", "reference_0": "2"}] * 16
    check_rewards([RecoverStage(method="grpo", prompts=source, rewards=right)], DATA)
    for settings, message in (
        ({"prompts": source}, "lacks 'answer'"),
        ({"rewards": right}, "lacks 'solution'"),  # the training data's prompts
        ({"prompts": source | {"prompt": "{question}"}, "rewards": right}, "lacks 'question'"),
        ({"prompts": {"source": "none.jsonl"}}, r"no file none\.jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            check_rewards([RecoverStage(method="grpo", **settings)], DATA)
    rows, tokenizer = prompts(small, tmp_path), pretrained.tokenizer(small)
    longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
    assert prompts(small, tmp_path, max_completion_length=256 - longest) == rows
    # Others come in the place of those that leave too little room.
    others = prompts(small, tmp_path, max_completion_length=257 - longest)
    assert (
        len(others) == len(rows)
        and max(len(tokenizer(row["prompt"])["input_ids"]) for row in others) < longest
    )
    with pytest.raises(InputError, match=r"^training: no prompt of .* leaves room for an answer"):
        prompts(small, tmp_path, max_completion_length=255)
