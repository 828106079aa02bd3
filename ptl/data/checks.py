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
    # the calibration data is often the training data
    checked: set[tuple[DataSource, bool]] = set()

    def check_once(field: str, source: DataSource, *, answers: bool) -> None:
        key = (source, answers)
        if key not in checked:
            check_rows(source, answers=answers, field=field)
        checked.add(key)

    check_once("calibration.data", calibration.data, answers=True)
    # a method that trains on text needs an answer in each chat
    trains_on_answers = any(isinstance(stage, NextToken) for stage in recover)
    for i, source in enumerate(training.sources):
        check_once(f"training.sources.{i}", source, answers=trains_on_answers)
    for i, benchmark in enumerate(training.decontaminate.against):
        check_once(f"training.decontaminate.against.{i}", benchmark, answers=False)


def check_chats(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check that local chats end with an answer, where a stage trains on them; the import step does not know that."""
    if not any(isinstance(stage, NextToken) for stage in stages):
        return
    for source in training.sources:
        if source.format == "messages":
            check_rows(source)


def check_rewards(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check local prompts of reinforcement learning, and that they have what the rewards compare with."""
    for stage in stages:
        if isinstance(stage, Grpo):
            _check_prompts(stage, training)


def _check_prompts(stage: Grpo, training: TrainingData) -> None:
    # data on the hub is read by the step that trains on it
    source = stage.prompt_source(training)
    if local_file(source) is None:
        return
    for row in numbered_rows(source):
        prompt_of(row)
        for reward in stage.rewards:
            fill(reward.reference_template, row)
