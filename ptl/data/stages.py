"""Refuses stages of a recovery that a model cannot run, before the first one trains and before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptl.config.recover import RecoverStage
from ptl.errors import InputError
from ptl.model import checkpoint, hub, pretrained, shapes

TEACHER = "recover.teacher"


def check_stages(folder: Path, stages: Sequence[RecoverStage], teacher: Path | None) -> None:
    """Raise InputError for lengths, packing and teachers that the model in `folder` cannot have.

    `teacher` is the run's original model; None: not known yet, or the model itself.
    """
    tokenizer = pretrained.load_tokenizer(folder)
    for stage in stages:
        length = "max_completion_length" if stage.method == "grpo" else "max_length"
        shapes.check_positions(folder, {f"recover.{length}": getattr(stage, length)})
        # transformers (5.24) gives this family's attention masks no positions, which alone separate packed texts.
        if stage.packing and checkpoint.read_config(folder)["model_type"] == "gpt_oss":
            raise InputError(
                "true, and in gpt_oss packed texts would attend to each other",
                field="recover.packing",
                remedy="set it to false",
            )
        if stage.method == "distil":
            _check_teacher(stage, tokenizer, teacher)


def _check_teacher(stage: RecoverStage, tokenizer: Any, original: Path | None) -> None:
    """Raise InputError unless the teacher reads the same sequences and numbers tokens as the student does."""
    teacher = original
    if stage.teacher:
        teacher = hub.locate(stage.teacher, None, hub.SMALL_FILES, field=TEACHER)
    if teacher is None:
        return
    if not (teacher / "config.json").is_file():
        raise InputError(
            f"no config.json in {teacher}",
            field=TEACHER,
            remedy="give the folder of a checkpoint, or a hub id",
        )
    # The weights of the run's own model are checked elsewhere, and those of a hub id are not downloaded yet.
    if stage.teacher and Path(stage.teacher).is_dir():
        checkpoint.shards(teacher)
    vocabulary = tokenizer.get_vocab()
    of_teacher = pretrained.load_tokenizer(teacher, TEACHER).get_vocab()
    shapes.check_positions(teacher, {"recover.max_length (for recover.teacher)": stage.max_length})
    # An entry is a token with its number; a token that has moved counts on both sides.
    different = vocabulary.items() ^ of_teacher.items()
    if different:
        raise InputError(
            f"{stage.teacher or teacher} has another vocabulary ({len(of_teacher)} tokens, the student "
            f"{len(vocabulary)}; {len(different)} entries differ)",
            field=TEACHER,
            remedy="distillation needs a teacher with the same tokenizer",
        )
