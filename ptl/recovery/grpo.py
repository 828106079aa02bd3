"""Recovery by reinforcement learning: answers to the same prompt compared by verifiable rewards (GRPO, 2402.03300)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ptl.config.chat import Chat
from ptl.config.data import Reward
from ptl.config.recover import RecoverStage
from ptl.data import chat_templates, decontamination
from ptl.data.sequences import leaves_room, prompt_rows
from ptl.data.sources import answer_of, prompt_of
from ptl.errors import InputError, WorkError
from ptl.model import checkpoint, pretrained
from ptl.recovery import training
from ptl.recovery.job import RecoverReport, RecoveryJob
from ptl.recovery.launch import world_size
from ptl.recovery.rewards import REWARDS, RewardValues, text_of

PromptRow = dict[str, Any]  # `prompt`, and a reference for each reward


def grpo(src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob) -> RecoverReport:
    """Train by trl's GRPOTrainer for this iteration's part of the steps, or until the stage's tokens are used up."""
    from datasets import Dataset
    from trl import GRPOTrainer

    tokenizer = pretrained.load_tokenizer(src)
    # rows that share text with a benchmark's items are left out
    leak_filter = decontamination.build(job.data.decontaminate, job.benchmark_items)
    positions = checkpoint.read_config(src).get("max_position_embeddings")
    rows = prompts(settings, job, tokenizer, positions, leak_filter)
    read = reader(job.chat, tokenizer)
    model = training.load(src)
    # max_completion_length counts; dst keeps the source's own file
    model.generation_config.max_length = None
    # for the step's metadata
    details: dict[str, Any] = {"processes": world_size()}
    if leak_filter is not None:
        details["decontaminated"] = leak_filter.report()
    # the iteration's part of the run's steps
    _, steps = job.budget.part(settings.steps)
    curve = training.learning_rate_curve(settings, job.budget, steps, carried=False)
    trainer = training.with_curve(GRPOTrainer, curve)(
        model=model,
        reward_funcs=[
            reward_function(i, reward, read) for i, reward in enumerate(settings.rewards)
        ],
        args=_arguments(settings, job, steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[training.watch(job), _limits(settings, job.budget.tokens)],
    )
    return training.run(trainer, src, dst, settings, job, steps, details)


def prompts(
    settings: RecoverStage,
    job: RecoveryJob,
    tokenizer: Any,
    positions: int | None,  # of the model; None: it has no limit
    leak_filter: decontamination.Filter | None = None,
) -> list[PromptRow]:
    """The prompts of this iteration with their references; none was in an earlier iteration while the data lasts.

    None leaves too little room for an answer. Raises InputError for an iteration without a step.
    """
    steps_before, steps = job.budget.part(settings.steps)
    if not steps:
        raise InputError(
            f"{settings.steps} steps over {len(job.budget.weights)} iterations leave none "
            f"for iteration {job.budget.iteration}",
            field="recover.steps",
            remedy="give more",
        )
    # an optimizer step takes several answers to each of its prompts
    per_step = settings.batch_size // settings.num_generations
    room = math.inf if positions is None else positions - settings.max_completion_length
    picked = prompt_rows(
        settings.prompt_source(job.data),
        seed=job.budget.seed,
        skip=steps_before * per_step,
        count=steps * per_step,
        fits=partial(leaves_room, tokenizer=tokenizer, chat=job.chat, room=room),
        leak_filter=leak_filter,
    )
    rows = []
    for row in picked:
        prompt = prompt_of(row, job.chat)
        references = {
            _reference(i): answer_of(reward.reference_template, row)
            for i, reward in enumerate(settings.rewards)
        }
        rows.append({"prompt": prompt, **references})
    return rows


def _reference(reward_index: int) -> str:
    """The column with what the answers are compared with; trl passes it to the reward function."""
    return f"reference_{reward_index}"


def reader(chat: Chat, tokenizer: Any) -> Callable[[Any], str]:
    """What takes the answer from a completion: in a chat what follows the thought, which the prompt may have begun.

    Raises InputError for thoughts between special tokens.
    """
    if not chat.enabled:
        return text_of
    chat_templates.check_thoughts(tokenizer, chat)
    opening = chat_templates.opening(tokenizer, chat)
    begun = chat.begun_thought(opening, opening)
    return lambda completion: chat.answer(begun + text_of(completion))


def reward_function(
    index: int, reward: Reward, read: Callable[[Any], str]
) -> Callable[..., RewardValues]:
    """A reward in the form that trl calls, which has its weight from the arguments; `read` takes the answers."""

    def score(completions: Sequence[Any], **columns: Any) -> RewardValues:
        extra = {"log_metric": columns["log_metric"]} if reward.name == "code" else {}
        return REWARDS[reward.name](
            list(map(read, completions)), columns[_reference(index)], reward, **extra
        )

    score.__name__ = reward.name  # in the names of trl's metrics
    return score


def _arguments(settings: RecoverStage, job: RecoveryJob, steps: int) -> Any:
    from trl import GRPOConfig

    config = GRPOConfig(
        **training.arguments(settings, job),
        max_steps=steps,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_completion_length,
        chat_template_kwargs=job.chat.template_kwargs,
        beta=settings.beta,
        temperature=settings.temperature,
        reward_weights=[reward.weight for reward in settings.rewards],
        weight_decay=settings.weight_decay,
        shuffle_dataset=False,  # the prompts come shuffled
        model_init_kwargs={
            "device_map": None
        },  # of the reference (trl warns: the policy has its own); `auto` uses all GPUs
        use_vllm=torch.cuda.is_available() and find_spec("vllm") is not None,
        vllm_mode="colocate",
    )
    return training.on_one_gpu(config)


def _limits(settings: RecoverStage, tokens: int | None) -> Any:
    """A callback that ends training with the step that uses up the tokens, if any, and where no prompt is solved."""
    from transformers import TrainerCallback

    prompts_per_step = settings.batch_size // settings.num_generations
    # a right format is not enough
    names = [
        f"rewards/{reward.name}/mean" for reward in settings.rewards if reward.name != "format"
    ]

    class Limits(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if tokens is not None and state.num_input_tokens_seen >= tokens:
                control.should_training_stop = True
                # so that the curve ends with the last step
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen = state.global_step * prompts_per_step
            is_last = state.global_step >= state.max_steps or control.should_training_stop
            is_late = seen >= settings.guard_prompts or is_last
            if not (settings.guard_prompts and is_late):
                return
            # without one right answer no group has a difference to learn from; None: no reference could be read
            if any((entry.get(name) or 0) > 0 for entry in state.log_history for name in names):
                return
            raise WorkError(
                f"the model solves none of {seen} prompts in {settings.num_generations} tries each, "
                "so GRPO learns nothing from them",
                field="recover",
                remedy="recover by cpt or distil first (recover: [{method: cpt}, {method: grpo}]), prune less, "
                "or give easier prompts",
            )

    return Limits()
