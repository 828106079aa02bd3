"""Recovery by reinforcement learning: answers to the same prompt compared by verifiable rewards (GRPO, 2402.03300)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ptl import checkpoint, decontaminate, model_checks, training
from ptl.config import DataSource, Grpo, Reward
from ptl.data import chat_ids, prompt_rows
from ptl.errors import InputError, WorkError
from ptl.job import RecoverReport, RecoveryJob
from ptl.launch import world_size
from ptl.preempt import last_complete
from ptl.rewards import REWARDS, check_patterns, reference_template, text_of
from ptl.sources import fill, prompt_of

# What is kept of a log: reward, share of groups without variance, answer length, KL
LOGGED = ("reward", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "kl")


def grpo(src: Path, dst: Path, settings: Grpo, job: RecoveryJob) -> RecoverReport:
    """Train by trl's GRPOTrainer for this iteration's part of the steps, or until the stage's tokens are used up."""
    from trl import GRPOTrainer

    started = time.monotonic()
    check_patterns(settings.rewards)
    tokenizer = model_checks.load_tokenizer(src)
    leaks = decontaminate.build(job.data.decontaminate, job.scored)
    rows = prompts(settings, job, tokenizer, checkpoint.read_config(src).get("max_position_embeddings"), leaks)
    model, dtype = training.load(src)
    model.generation_config.max_length = None  # max_completion_length counts; dst keeps the source's own file
    details: dict[str, Any] = {"processes": world_size()}
    if leaks is not None:
        details["decontaminated"] = leaks.report()
    if last_complete(job.scratch) is None:
        details["pass_at_k"] = guard(model, tokenizer, settings, rows, job.this.seed)
    curve = training.learning_rate_curve(settings, job.this, job.this.part(settings.steps)[1], carried=False)
    trainer = training.with_curve(GRPOTrainer, curve)(
        model=model,
        reward_funcs=[reward_function(i, reward) for i, reward in enumerate(settings.rewards)],
        args=_arguments(settings, job),
        train_dataset=_dataset(rows),
        processing_class=tokenizer,
        callbacks=[training.watch(job), _budget(job.this.tokens)],
    )
    resumed_at = training.run(trainer, job)
    training.save(trainer, src, dst, dtype, sharded=training.is_sharded(settings))
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    details["rewards"] = [
        {"tokens": int(entry["num_tokens"])} | {name: float(entry[name]) for name in LOGGED if name in entry}
        for entry in logs
    ]
    return RecoverReport(
        method=settings.method,
        tokens=int(trainer.state.num_input_tokens_seen),
        steps=trainer.state.global_step,
        curve=tuple((int(entry["num_tokens"]), float(entry["loss"])) for entry in logs if "loss" in entry),
        resumed_at=resumed_at,
        seconds=time.monotonic() - started,
        details=details,
    )


def prompts(
    settings: Grpo, job: RecoveryJob, tokenizer: Any, positions: int | None, leaks: decontaminate.Filter | None = None
) -> list[dict[str, Any]]:
    """The prompts of this iteration, none of them in an earlier one while the data lasts, each with its references."""
    source: DataSource = settings.prompts or job.data.sources[0]
    source = source.model_copy(update={"completion": ""})  # which is not needed: the answers are the model's own
    before, steps = job.this.part(settings.steps)
    if not steps:
        raise InputError(
            f"recover.steps: {settings.steps} steps over {len(job.this.weights)} iterations leave none for iteration "
            f"{job.this.index}; give more"
        )
    per_step = settings.batch_size // settings.num_generations
    rows = []
    skip, count = before * per_step, steps * per_step
    for number, row in prompt_rows(source, seed=job.this.seed, skip=skip, count=count, filter_=leaks):
        prompt = prompt_of(row, source, number)
        references = [fill(reference_template(reward), row, source, number) for reward in settings.rewards]
        rows.append({"prompt": prompt} | {f"reference_{i}": text for i, text in enumerate(references)})
        length = len(_ids(tokenizer, prompt, number)) + settings.max_completion_length
        if positions is not None and length > positions:
            raise InputError(
                f"recover.max_completion_length: prompt {number} of {source.source} and an answer of "
                f"{settings.max_completion_length} tokens are {length} tokens, the model has {positions} positions; "
                "lower it, or leave such prompts out"
            )
    return rows


def reward_function(index: int, reward: Reward) -> Callable[..., list[float | None]]:
    """A reward in the form that trl calls; its weight is given apart."""

    def score(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return REWARDS[reward.name]([text_of(each) for each in completions], columns[f"reference_{index}"], reward)

    score.__name__ = reward.name
    return score


def guard(model: Any, tokenizer: Any, settings: Grpo, rows: Sequence[dict[str, Any]], seed: int) -> float:
    """pass@k on a sample: the share of prompts with a right answer among num_generations. Raises WorkError at zero.

    Without one right answer no group has a difference to learn from, and training would sit at zero reward.
    """
    sample = list(rows[: settings.guard_prompts])
    judges = [(i, reward) for i, reward in enumerate(settings.rewards) if reward.name != "format"]
    solved = 0
    torch.manual_seed(seed)
    per_batch = max(1, settings.batch_size // settings.num_generations)
    for begin in range(0, len(sample), per_batch):
        part = sample[begin : begin + per_batch]
        answers = _generate(model, tokenizer, settings, [row["prompt"] for row in part])
        for row, group in zip(part, answers, strict=True):
            scores = [REWARDS[reward.name](group, [row[f"reference_{i}"]] * len(group), reward) for i, reward in judges]
            solved += any(score for column in scores for score in column)
    if solved == 0:
        raise WorkError(
            f"recover: the model solves none of {len(sample)} prompts in {settings.num_generations} tries each, so "
            "GRPO would learn nothing from them; recover by cpt or distil first "
            "(recover: [{method: cpt}, {method: grpo}]), cut less, or give easier prompts"
        )
    return solved / len(sample)


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, settings: Grpo, given: Sequence[Any]) -> list[list[str]]:
    """num_generations sampled answers to each prompt."""
    ids = [torch.tensor(_ids(tokenizer, prompt)) for prompt in given]
    width = max(len(each) for each in ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = torch.full((len(ids), width), pad)
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for i, each in enumerate(ids):  # padded on the left
        batch[i, width - len(each) :], mask[i, width - len(each) :] = each, 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = model.to(device).generate(
        input_ids=batch.to(device),
        attention_mask=mask.to(device),
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        max_new_tokens=settings.max_completion_length,
        num_return_sequences=settings.num_generations,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    answers = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    k = settings.num_generations
    return [answers[i : i + k] for i in range(0, len(answers), k)]


def _ids(tokenizer: Any, prompt: Any, number: int = 0) -> list[int]:
    return tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else chat_ids(tokenizer, prompt, number)


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _arguments(settings: Grpo, job: RecoveryJob) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        **training.arguments(settings, job, world_size()),
        max_steps=job.this.part(settings.steps)[1],
        num_generations=settings.num_generations,
        max_completion_length=settings.max_completion_length,
        beta=settings.beta,
        temperature=settings.temperature,
        reward_weights=[reward.weight for reward in settings.rewards],
        weight_decay=settings.weight_decay,
        shuffle_dataset=False,  # the prompts come shuffled
        use_vllm=uses_vllm(settings),
        vllm_mode="colocate",
    )


def uses_vllm(settings: Grpo) -> bool:
    """Whether vLLM generates the answers. Raises InputError where it is asked for and cannot."""
    possible = torch.cuda.is_available() and find_spec("vllm") is not None
    if settings.rollouts == "vllm" and not possible:
        raise InputError("recover.rollouts: vllm needs a GPU and the vllm package; use auto or transformers")
    return possible and settings.rollouts != "transformers"


def _budget(tokens: int | None) -> Any:
    """A callback that ends training with the step that uses up the budget."""
    from transformers import TrainerCallback

    class Budget(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if tokens is not None and state.num_input_tokens_seen >= tokens:
                control.should_training_stop = control.should_log = True

    return Budget()
