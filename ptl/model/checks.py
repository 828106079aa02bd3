"""Whether a checkpoint can be trained and asked at all: tokenizer, EOS token, positions. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptl.errors import InputError
from ptl.model import checkpoint, pretrained, text_tower


def load_tokenizer(folder: Path, field: str = pretrained.MODEL) -> Any:
    """The tokenizer of a checkpoint. Raises InputError where it cannot be read or has no EOS token."""
    tokenizer = pretrained.tokenizer(folder, field)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{folder}: the tokenizer has no EOS token, so no answer could end",
            field=field,
            remedy="set eos_token and save it",
        )
    return tokenizer


def check_generation_config(folder: Path) -> None:
    """Raise InputError for a generation_config.json that is no JSON object: transformers reads it with the weights."""
    path = folder / "generation_config.json"
    if path.is_file():
        checkpoint.json_object(path)


def check_positions(folder: Path, lengths: Mapping[str, int]) -> None:
    """Raise InputError for a config field whose sequences are longer than the model's context; `lengths` in tokens."""
    positions = text_tower.read_config(folder).get("max_position_embeddings")
    if not isinstance(positions, int):  # a family without a limit
        return
    for field, length in lengths.items():
        if length > positions:
            raise InputError(
                f"{length} is more than the model's {positions} positions ({folder})",
                field=field,
                remedy=f"lower it to {positions}",
            )


def compare_vocabularies(student: Mapping[str, int], teacher: Mapping[str, int], name: str) -> None:
    """Raise InputError where a token has not the same number for student and teacher; `name` is the teacher's."""
    if student == teacher:
        return
    # An entry is a token with its number; a token that has moved counts on both sides.
    different = set(student.items()) ^ set(teacher.items())
    raise InputError(
        f"{name} has another vocabulary ({len(teacher)} tokens, the student {len(student)}; "
        f"{len(different)} entries differ)",
        field="recover.teacher",
        remedy="distillation needs a teacher with the same tokenizer",
    )
