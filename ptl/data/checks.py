"""Checks of the data files that a config names, before anything is trained or scored on them."""

from __future__ import annotations

from collections.abc import Sequence

from ptl.config.recover import DataSource, Grpo, NextToken, RecoverStage, TrainingData
from ptl.config.run import Calibration
from ptl.data.sources import check_rows, fill, local_file, numbered_rows, prompt_of


def check_data(calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]) -> None:
    """Read local data files once: they must exist, parse, and have in each row what the templates name.

    Chats must end with an answer where it is scored or trained on; reinforcement learning needs the prompts alone.
    """
    # a method that trains on text needs an answer in each chat
    trains_on_answers = _trains_on_answers(recover)
    # the first field that names a source: the calibration data is often the training data
    fields: dict[tuple[DataSource, bool], str] = {}
    for field, source in named_sources(calibration, training, ()).items():
        answers = field == "calibration.data" or (trains_on_answers and field.startswith("training.sources"))
        fields.setdefault((source, answers), field)

    for (source, answers), field in fields.items():
        check_rows(source, answers=answers, field=field)


def named_sources(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> dict[str, DataSource]:
    """All sources that a config names, by their fields."""
    sources = {"calibration.data": calibration.data}
    sources |= {f"training.sources.{i}": source for i, source in enumerate(training.sources)}
    sources |= {f"training.decontaminate.against.{i}": s for i, s in enumerate(training.decontaminate.against)}
    stages = enumerate(recover)
    return sources | {f"recover.{i}.prompts": s.prompts for i, s in stages if isinstance(s, Grpo) and s.prompts}


def _trains_on_answers(stages: Sequence[RecoverStage]) -> bool:
    return any(isinstance(stage, NextToken) for stage in stages)


def check_chats(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check that local chats end with an answer, where a stage trains on them; the import step does not know that."""
    for source in training.sources:
        if source.format == "messages" and _trains_on_answers(stages):
            check_rows(source)


def check_rewards(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check local prompts of reinforcement learning, and that they have what the rewards compare with."""
    for stage in stages:
        if not isinstance(stage, Grpo):
            continue
        source = stage.prompt_source(training)
        # data on the hub is read by the step that trains on it
        if local_file(source) is None:
            continue
        for row in numbered_rows(source):
            prompt_of(row)
            for reward in stage.rewards:
                fill(reward.reference_template, row)
