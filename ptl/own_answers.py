"""Calibration on the model's own chains of thought: its correct answers to the calibration prompts."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import torch

from ptl import pretrained
from ptl.config import Calibration
from ptl.data import Batch, Tokens, order, read_rows, tokenize
from ptl.errors import InputError, WorkError

TRIES = 4  # prompts answered for each sequence that is wanted, at most
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str:
    """What a text concludes: behind the last ####, else in the last \\boxed{}, else its last number; '' without one."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif r"\boxed{" in text:
        return _braced(text.rsplit(r"\boxed{", 1)[1]).strip()
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def own_answers(folder: Path, settings: Calibration, tokenizer: Any, seed: int) -> list[Tokens]:
    """Prompts with the model's own greedy answers, the correct ones only, at most num_sequences.

    Needs the whole model in memory, unlike scoring. Raises WorkError when no answer is correct.
    """
    if settings.data.format == "text":
        raise InputError("calibration.answers: `self` needs prompts: data.format must be prompt_completion or messages")
    rows = read_rows(settings.data)
    tries = itertools.islice(order(len(rows), seed), min(len(rows), TRIES * settings.num_sequences))
    # all at once, so that a wrong row is found before any answer is generated
    given = iter([tokenize(rows[i], settings.data, tokenizer, settings.max_length, i + 1) for i in tries])
    model = pretrained.causal_lm(folder).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    found: list[Tokens] = []
    asked = 0
    while len(found) < settings.num_sequences and (group := list(itertools.islice(given, settings.batch_size))):
        asked += len(group)
        found += _answered(model, tokenizer, group, settings)
    if not found:
        raise WorkError(
            f"calibration.answers: none of the model's own answers to {asked} prompts was correct; use `given` "
            "answers, or raise calibration.max_new_tokens"
        )
    return found[: settings.num_sequences]


def _answered(model: Any, tokenizer: Any, group: list[Tokens], settings: Calibration) -> list[Tokens]:
    """The prompts with the model's answers, where these end and are correct."""
    prompts = [tokens.ids[: tokens.prompt] for tokens in group]
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id or 0
    batch: Batch = {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }
    with torch.no_grad():
        out = model.generate(
            **{name: tensor.to(model.device) for name, tensor in batch.items()},
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
    found = []
    for tokens, prompt, answer in zip(group, prompts, out[:, width:].tolist(), strict=True):
        ended = tokenizer.eos_token_id in answer
        answer = answer[: answer.index(tokenizer.eos_token_id) + 1] if ended else answer
        wanted = final_answer(tokenizer.decode(tokens.ids[tokens.prompt :], skip_special_tokens=True))
        said = final_answer(tokenizer.decode(answer, skip_special_tokens=True))
        if ended and wanted != "" and said == wanted:
            found.append(Tokens((prompt + answer)[: settings.max_length], min(len(prompt), settings.max_length)))
    return found


def _braced(text: str) -> str:
    """The text up to the brace that closes one opened before it."""
    depth = 1
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:position]
    return text
