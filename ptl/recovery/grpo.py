"""Recovery by reinforcement learning: answers to the same prompt compared by verifiable rewards (GRPO, 2402.03300)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ptl.config.recover import RecoverStage, Reward
from ptl.data import decontamination
from ptl.data.sequences import chat_ids, padded_ids, prompt_rows
from ptl.data.sources import SourceRow, fill, prompt_of
from ptl.errors import InputError, WorkError
from ptl.model import checkpoint, checks
from ptl.recovery import training
from ptl.recovery.job import Curve, RecoverReport, RecoveryJob
from ptl.recovery.launch import world_size
from ptl.recovery.rewards import REWARDS, TIMEOUTS, RewardValues, text_of
from ptl.storage.local_files import last_complete

# what is kept of a log
LOGGED = (
    "reward",
    "frac_reward_zero_std",  # share of groups without a difference to learn from
    "completions/mean_length",  # tokens
    "completions/clipped_ratio",  # share of answers that max_completion_length ended
    "kl",
    TIMEOUTS,  # share of answers whose code ran out of time
)

PromptRow = dict[str, Any]  # `prompt`, and a reference for each reward


def grpo(src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob) -> RecoverReport:
    """Train by trl's GRPOTrainer for this iteration's part of the steps, or until the stage's tokens are used up."""
    from datasets import Dataset
    from trl import GRPOTrainer

    started = time.monotonic()
    tokenizer = checks.load_tokenizer(src)
    # rows that share text with a benchmark's items are left out
    leak_filter = decontamination.build(job.data.decontaminate, job.benchmark_items)
    positions = checkpoint.read_config(src).get("max_position_embeddings")
    rows = prompts(settings, job, tokenizer, positions, leak_filter)
    model = training.load(src)
    model.generation_config.max_length = None  # max_completion_length counts; dst keeps the source's own file
    # for the step's metadata
    details: dict[str, Any] = {"processes": world_size()}
    if leak_filter is not None:
        details["decontaminated"] = leak_filter.report()
    # a training that is resumed has passed the guard
    if settings.guard_prompts and last_complete(job.scratch) is None:
        details["pass_at_k"] = guard(model, tokenizer, settings, rows, job.budget.seed)
    # the iteration's part of the run's steps
    _, steps = job.budget.part(settings.steps)
    curve = training.learning_rate_curve(settings, job.budget, steps, carried=False)
    trainer = training.with_curve(GRPOTrainer, curve)(
        model=model,
        reward_funcs=[reward_function(i, reward) for i, reward in enumerate(settings.rewards)],
        args=_arguments(settings, job, steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[training.watch(job), _token_limit(job.budget.tokens)],
    )
    resumed_at = training.run(trainer, job.scratch, steps)
    training.save(trainer, src, dst, sharded=training.is_sharded(settings))
    points, details["rewards"] = _logged(trainer)
    return RecoverReport(
        method=settings.method,
        tokens=int(trainer.state.num_input_tokens_seen),
        steps=trainer.state.global_step,
        curve=points,
        resumed_at=resumed_at,
        seconds=time.monotonic() - started,
        details=details,
    )


def _logged(trainer: Any) -> tuple[Curve, list[dict[str, float]]]:
    """The loss and the rewards at each log of a trainer."""
    points = []
    rewards = []
    for entry in trainer.state.log_history:
        # the last entry sums up the training
        if "reward" not in entry:
            continue
        tokens = int(entry["num_tokens"])
        if "loss" in entry:
            points.append((tokens, float(entry["loss"])))
        rewards.append({"tokens": tokens} | {name: float(entry[name]) for name in LOGGED if name in entry})
    return tuple(points), rewards


def prompts(
    settings: RecoverStage,
    job: RecoveryJob,
    tokenizer: Any,
    positions: int | None,  # of the model; None: it has no limit
    leak_filter: decontamination.Filter | None = None,
) -> list[PromptRow]:
    """The prompts of this iteration with their references; none was in an earlier iteration while the data lasts.

    Raises InputError for an iteration without a step, and for a prompt that leaves no room for an answer.
    """
    source = settings.prompt_source(job.data)
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
    picked = prompt_rows(
        source,
        seed=job.budget.seed,
        skip=steps_before * per_step,
        count=steps * per_step,
        leak_filter=leak_filter,
    )
    rows = []
    for row in picked:
        prompt = prompt_of(row)
        prompt_row = {"prompt": prompt}
        for i, reward in enumerate(settings.rewards):
            prompt_row[_reference(i)] = fill(reward.reference_template, row)
        rows.append(prompt_row)
        if positions is not None:
            num_prompt = len(_prompt_ids(tokenizer, prompt, row.number))
            _check_length(row, num_prompt, settings.max_completion_length, positions)
    return rows


def _check_length(row: SourceRow, num_prompt: int, num_answer: int, positions: int) -> None:
    """Raise InputError where a prompt and the longest answer, in tokens, are more than the model's positions."""
    length = num_prompt + num_answer
    if length <= positions:
        return
    raise InputError(
        f"prompt {row.number} of {row.source.source} and an answer of {num_answer} tokens are {length} tokens, "
        f"the model has {positions} positions",
        field="recover.max_completion_length",
        remedy="lower it, or leave such prompts out",
    )


def _reference(reward_index: int) -> str:
    """The column with what the answers are compared with; trl passes it to the reward function."""
    return f"reference_{reward_index}"


def reward_function(index: int, reward: Reward) -> Callable[..., RewardValues]:
    """A reward in the form that trl calls, which has its weight from the arguments."""

    def score(completions: Sequence[Any], **columns: Any) -> RewardValues:
        extra = {"log_metric": columns["log_metric"]} if reward.name == "code" else {}
        return REWARDS[reward.name](list(map(text_of, completions)), columns[_reference(index)], reward, **extra)

    score.__name__ = reward.name  # in the names of trl's metrics
    return score


def guard(
    model: Any,
    tokenizer: Any,
    settings: RecoverStage,
    rows: Sequence[PromptRow],
    seed: int,
) -> float:
    """pass@k on a sample: the share of prompts with a right answer among num_generations. Raises WorkError at zero.

    Without one right answer no group has a difference to learn from, and training would stay at zero reward.
    """
    sample = rows[: settings.guard_prompts]
    # as many answers at once as training generates
    per_batch = max(1, settings.batch_size // settings.num_generations)
    num_solved = 0
    torch.manual_seed(seed)
    for begin in range(0, len(sample), per_batch):
        batch = sample[begin : begin + per_batch]
        answers = _generate(model, tokenizer, settings, [row["prompt"] for row in batch])
        for row, group in zip(batch, answers, strict=True):
            num_solved += _is_solved(row, group, settings.rewards)
    if num_solved == 0:
        raise WorkError(
            f"the model solves none of {len(sample)} prompts in {settings.num_generations} tries each, "
            "so GRPO would learn nothing from them",
            field="recover",
            remedy="recover by cpt or distil first (recover: [{method: cpt}, {method: grpo}]), prune less, "
            "or give easier prompts",
        )
    return num_solved / len(sample)


def _is_solved(row: PromptRow, answers: Sequence[str], rewards: Sequence[Reward]) -> bool:
    """Whether one of the answers to a prompt is right by one of the rewards; a right format is not enough."""
    for i, reward in enumerate(rewards):
        references = [row[_reference(i)]] * len(answers)
        # None: the reference cannot be read
        if reward.name != "format" and any(REWARDS[reward.name](answers, references, reward)):
            return True
    return False


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Any,
    settings: RecoverStage,
    batch_prompts: Sequence[Any],  # texts or chats
) -> list[list[str]]:
    """num_generations sampled answers to each prompt."""
    k = settings.num_generations
    # not every tokenizer has a pad token; the mask says where the padding is
    pad_token = tokenizer.pad_token_id
    if pad_token is None:
        pad_token = tokenizer.eos_token_id
    ids = [_prompt_ids(tokenizer, prompt) for prompt in batch_prompts]
    batch = padded_ids(ids, pad_token, "left")  # [batch, width]
    width = batch["input_ids"].shape[1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generated = model.to(device).generate(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        max_new_tokens=settings.max_completion_length,
        num_return_sequences=k,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token,
    )  # [batch * k, width + answer]
    # the answers to one prompt are next to each other
    answers = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return [answers[begin : begin + k] for begin in range(0, len(answers), k)]


def _prompt_ids(tokenizer: Any, prompt: Any, number: int = 0) -> list[int]:
    """Tokens of a text or a chat; `number` is its row's, for errors."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    return chat_ids(tokenizer, prompt, number)


def _arguments(settings: RecoverStage, job: RecoveryJob, steps: int) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        **training.arguments(settings, job),
        max_steps=steps,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_completion_length,
        beta=settings.beta,
        temperature=settings.temperature,
        reward_weights=[reward.weight for reward in settings.rewards],
        weight_decay=settings.weight_decay,
        shuffle_dataset=False,  # the prompts come shuffled
        use_vllm=torch.cuda.is_available() and find_spec("vllm") is not None,
        vllm_mode="colocate",
    )


def _token_limit(tokens: int | None) -> Any:
    """A callback that ends training with the step that uses up the budget; None: there is no limit."""
    from transformers import TrainerCallback

    class TokenLimit(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if tokens is not None and state.num_input_tokens_seen >= tokens:
                control.should_training_stop = True
                # so that the curve ends with the last step
                control.should_log = True

    return TokenLimit()
