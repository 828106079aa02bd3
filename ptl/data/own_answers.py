"""Calibration on the model's own chains of thought: its correct answers to the calibration prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ptl.config.run import Calibration
from ptl.data.sequences import TokenIds, Tokens, calibration_rows, padded_ids
from ptl.errors import InputError, WorkError
from ptl.model import pretrained

TRIES = 4  # prompts answered for each sequence that is asked for, at most
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str:
    """What a text concludes: behind the last ####, else in the last \\boxed{}, else its last number; '' without one."""
    # as GSM8K marks an answer
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif r"\boxed{" in text:
        # may be a formula: all of it counts
        return _up_to_closing_brace(text.rsplit(r"\boxed{", 1)[1]).strip()
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def own_answers(
    folder: Path,
    settings: Calibration,
    tokenizer: Any,
    seed: int,
) -> list[Tokens]:
    """Prompts with the model's own greedy answers, the correct ones only, at most num_sequences.

    Needs the complete model in memory, unlike scoring. Raises WorkError when no answer is correct.
    """
    if settings.data.format == "text":
        raise InputError(
            "`self` needs prompts: data.format must be prompt_completion or messages", field="calibration.answers"
        )
    # more than are needed: not every answer will be correct
    prompts = calibration_rows(settings, tokenizer, seed, TRIES * settings.num_sequences)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = pretrained.causal_lm(folder).eval().to(device)
    correct: list[Tokens] = []
    # until there are enough, or no prompts are left
    for begin in range(0, len(prompts), settings.batch_size):
        if len(correct) >= settings.num_sequences:
            break
        group = prompts[begin : begin + settings.batch_size]
        correct += _correct_answers(model, tokenizer, group, settings)
    if not correct:
        raise WorkError(
            f"none of the model's own answers to {len(prompts)} prompts was correct",
            field="calibration.answers",
            remedy="use `given` answers, or raise calibration.max_length",
        )
    return correct[: settings.num_sequences]


def _correct_answers(
    model: Any,
    tokenizer: Any,
    group: list[Tokens],
    settings: Calibration,
) -> list[Tokens]:
    """The prompts with the model's answers, where these end and are correct."""
    eos = tokenizer.eos_token_id
    correct = []
    for tokens, answer in zip(group, _generate(model, tokenizer, group, settings), strict=True):
        # an answer that was ended has no conclusion
        if eos not in answer:
            continue
        answer = answer[: answer.index(eos) + 1]
        # the data's own answer, of which the conclusion counts
        expected = final_answer(tokenizer.decode(tokens.ids[tokens.prompt :], skip_special_tokens=True))
        concluded = final_answer(tokenizer.decode(answer, skip_special_tokens=True))
        if expected and concluded == expected:
            # to be scored like a row of the data
            ids = tokens.ids[: tokens.prompt] + answer
            correct.append(Tokens(ids[: settings.max_length], tokens.prompt))
    return correct


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Any,
    group: list[Tokens],
    settings: Calibration,
) -> list[TokenIds]:
    """The model's greedy answer to each prompt, padded to the longest."""
    pad_token = tokenizer.pad_token_id or 0
    prompts = [tokens.ids[: tokens.prompt] for tokens in group]
    batch = padded_ids(prompts, pad_token, "left")  # [batch, width]
    width = batch["input_ids"].shape[1]
    generated = model.generate(
        **{name: tensor.to(model.device) for name, tensor in batch.items()},
        max_new_tokens=max(1, settings.max_length - width),  # longer answers would be cut
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token,
    )  # [batch, width + answer]
    answers: list[TokenIds] = generated[:, width:].tolist()
    return answers


def _up_to_closing_brace(text: str) -> str:
    """The text up to the brace that closes one opened before it."""
    depth = 1  # braces that are open
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:position]
    return text
