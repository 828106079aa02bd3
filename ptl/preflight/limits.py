"""Checks what the model can do of all that the config asks of it: lengths, templates, chats. No weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptl.config.chat import Chat
from ptl.config.data import TrainingData
from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration, Evaluate
from ptl.data import chat_templates
from ptl.data.sequences import check_chat, no_row_left, tokenize
from ptl.data.sources import local_file, numbered_rows
from ptl.data.stages import check_stages
from ptl.errors import InputError
from ptl.model import checkpoint, pretrained, shapes
from ptl.preflight.rows import readings


def check_settings(
    folder: Path,
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    recover: Sequence[RecoverStage],
    chat: Chat,
) -> None:
    """Raise InputError for what the model in `folder` cannot do of the config."""
    tokenizer = pretrained.load_tokenizer(folder)
    checkpoint.generation_config(folder)  # transformers reads it with the weights
    shapes.check_positions(folder, _lengths(calibration, training, evaluate))
    check_stages(folder, recover, teacher=None)
    chat_templates.check(tokenizer, chat)
    if any(stage.method == "grpo" for stage in recover):
        chat_templates.check_thoughts(tokenizer, chat)
    for reading in readings(calibration, training, recover):
        source, field = reading.source, reading.field
        if source.format != "messages" or "against" in field:
            continue
        if not tokenizer.chat_template:
            raise InputError(
                f"`messages` needs a chat template, and the tokenizer of {folder} has none",
                field=f"{field}.format",
                remedy="use another format, or a model with a template",
            )
        if local_file(source, field):
            for row in numbered_rows(source, field):
                check_chat(row, tokenizer, chat, answers=reading.answers)
    if training.answers != "self":
        _check_room(tokenizer, training, recover, chat)


def _lengths(
    calibration: Calibration, training: TrainingData, evaluate: Evaluate
) -> dict[str, int]:
    """The tokens that the model must have positions for, by the field that asks for them; others follow the model."""
    lengths = {"calibration.max_length": calibration.max_length}
    if evaluate.max_length is not None:
        lengths["evaluate.max_length"] = evaluate.max_length
    if training.answers == "self":
        longest = training.max_new_tokens
        lengths["training.max_new_tokens and a prompt"] = longest + 1
        if evaluate.max_length is not None and longest >= evaluate.max_length:
            raise InputError(
                f"{longest} leaves no room for a prompt in evaluate.max_length={evaluate.max_length}",
                field="training.max_new_tokens",
                remedy="lower it, or raise evaluate.max_length",
            )
    for task in evaluate.tasks:
        if task.max_new_tokens:
            field = f"evaluate.tasks ({task.name}: max_new_tokens) and a prompt"
            lengths[field] = task.max_new_tokens + 1
    return lengths


def _check_room(
    tokenizer: Any, training: TrainingData, recover: Sequence[RecoverStage], chat: Chat
) -> None:
    """Raise InputError for a local source without a row that has room for its answer in the shortest stage."""
    lengths = [stage.max_length for stage in recover if stage.method != "grpo"]
    if not lengths:
        return
    shortest = min(lengths)
    for i, source in enumerate(training.sources):
        field = f"training.sources.{i}"
        if local_file(source, field) is None:
            continue
        rows = numbered_rows(source, field)
        # Reading stops at the first row that is useful.
        if not any(tokenize(row, tokenizer, shortest, chat).is_useful for row in rows):
            raise no_row_left(source, shortest)
