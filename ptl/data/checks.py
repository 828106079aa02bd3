"""Checks before anything is scored or trained: of local data files, and of what the model can do with the config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptl.config.recover import DataSource, RecoverStage, TrainingData
from ptl.config.run import Calibration, Evaluate
from ptl.data.sources import check_rows, fill, local_file, numbered_rows, prompt_of
from ptl.errors import InputError
from ptl.model import checkpoint, hub, pretrained, shapes

TEACHER = "recover.teacher"


def check_data(calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]) -> None:
    """Read local data files once: they must exist, parse, and have in each row what the templates name.

    Chats must end with an answer where it is scored or trained on; reinforcement learning needs the prompts alone.
    """
    trains_on_answers = _trains_on_answers(recover)
    checked = set()  # the calibration data is often the training data
    for field, source in named_sources(calibration, training, ()).items():
        answers = field == "calibration.data" or (trains_on_answers and field.startswith("training.sources"))
        if (source, answers) not in checked:
            checked.add((source, answers))
            check_rows(source, answers=answers, field=field)


def named_sources(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> dict[str, DataSource]:
    """All sources that a config names, by their fields."""
    sources = {"calibration.data": calibration.data}
    sources |= {f"training.sources.{i}": source for i, source in enumerate(training.sources)}
    sources |= {f"training.decontaminate.against.{i}": s for i, s in enumerate(training.decontaminate.against)}
    stages = enumerate(recover)
    return sources | {f"recover.{i}.prompts": s.prompts for i, s in stages if s.prompts}


def _trains_on_answers(stages: Sequence[RecoverStage]) -> bool:
    return any(stage.method != "grpo" for stage in stages)


def check_recovery_data(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check local data where a recovery begins, which the import step does not know as well.

    Chats end with an answer, where a stage trains on them; prompts have what the rewards compare with.
    """
    for source in training.sources:
        if source.format == "messages" and _trains_on_answers(stages):
            check_rows(source)
    check_rewards(stages, training)


def check_rewards(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check local prompts of reinforcement learning, and that they have what the rewards compare with."""
    for stage in stages:
        # data on the hub is read by the step that trains on it
        if stage.method != "grpo" or local_file(source := stage.prompt_source(training)) is None:
            continue
        for row in numbered_rows(source):
            prompt_of(row)
            for reward in stage.rewards:
                fill(reward.reference_template, row)


def check_settings(
    folder: Path,
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    recover: Sequence[RecoverStage],
) -> None:
    """Raise InputError for what the model in `folder` cannot do of all that the config asks of it; reads no weights."""
    tokenizer = pretrained.load_tokenizer(folder)
    checkpoint.check_generation_config(folder)
    # What is not set follows the model.
    lengths = {"calibration.max_length": calibration.max_length}
    if evaluate.max_length is not None:
        lengths["evaluate.max_length"] = evaluate.max_length
    shapes.check_positions(folder, lengths)
    check_stages(folder, recover, teacher=None)
    if tokenizer.chat_template:
        return
    for field, source in named_sources(calibration, training, ()).items():
        if source.format == "messages" and "against" not in field:
            raise InputError(
                f"`messages` needs a chat template, and the tokenizer of {folder} has none",
                field=f"{field}.format",
                remedy="use another format, or a model with a template",
            )


def check_stages(folder: Path, stages: Sequence[RecoverStage], teacher: Path | None) -> None:
    """Raise InputError for lengths and teachers that the model in `folder` cannot have, before the first stage trains.

    `teacher` is the run's original model; None: not known yet, or the model itself.
    """
    tokenizer = pretrained.load_tokenizer(folder)
    for stage in stages:
        length = "max_completion_length" if stage.method == "grpo" else "max_length"
        shapes.check_positions(folder, {f"recover.{length}": getattr(stage, length)})
        if stage.method != "distil":
            continue
        # A teacher reads the same sequences, and numbers tokens in the same way; of a hub id only small files are read.
        own, name = teacher, stage.teacher
        if name:
            own = hub.locate(name, None, hub.SMALL_FILES, field=TEACHER)
        if own is not None:
            of_teacher = pretrained.load_tokenizer(own, TEACHER)
            shapes.check_positions(own, {"recover.max_length (for recover.teacher)": stage.max_length})
            pretrained.compare_vocabularies(tokenizer.get_vocab(), of_teacher.get_vocab(), name or str(own))
