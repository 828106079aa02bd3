"""Reads the rows that a config names before anything is scored or trained: they must exist, parse, and have the
columns that templates and rewards name. Warns of columns with text that no template reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.config.data import DataSource, Reward, TrainingData, columns_of
from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration
from ptl.data.sources import (
    GENERAL,
    TRUNCATED,
    answer_of,
    check_rows,
    local_file,
    numbered_rows,
    prompt_of,
)
from ptl.units import listed

SAMPLE = 200  # rows that stand for all of a file


@dataclass(frozen=True)
class Reading:
    """A source as a run reads it."""

    field: str  # of the config, which names it
    source: DataSource
    answers: bool  # whether the rows' own answers are read


def check_data(
    calibration: Calibration,
    training: TrainingData,
    recover: Sequence[RecoverStage],
    *,
    hub_rows: bool = False,
) -> None:
    """Read data once, that of the hub only with `hub_rows`: it must exist, parse, and have what the templates name.

    Chats must end with an answer where it is scored or trained on; reinforcement learning needs the prompts alone.
    """
    for reading in readings(calibration, training, recover):
        check_rows(reading.source, answers=reading.answers, field=reading.field, hub_rows=hub_rows)


def readings(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> list[Reading]:
    """All sources of a config as they are read, none twice: the calibration data is often trained on."""
    learns_from_answers = any(stage.method != "grpo" for stage in recover)
    distinct: dict[tuple[DataSource, bool], Reading] = {}
    for field, source in named_sources(calibration, training, recover).items():
        answers = prompts_only = False
        if field.startswith("calibration.data"):
            prompts_only = calibration.answers == "self"
            answers = not prompts_only
        elif field.startswith("training.sources"):
            prompts_only = training.answers == "self"
            answers = not prompts_only and learns_from_answers
        elif field.endswith("prompts"):
            prompts_only = True
        read = source.prompts_only if prompts_only else source
        distinct.setdefault((read, answers), Reading(field, read, answers))
    return list(distinct.values())


def named_sources(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> dict[str, DataSource]:
    """All sources that a config names, by their fields."""
    sources: dict[str, DataSource] = {}
    for i, source in enumerate(calibration.data):
        is_list = len(calibration.data) > 1
        sources[f"calibration.data.{i}" if is_list else "calibration.data"] = source
    for i, source in enumerate(training.sources):
        sources[f"training.sources.{i}"] = source
    for i, source in enumerate(training.decontaminate.against):
        sources[f"training.decontaminate.against.{i}"] = source
    for i, stage in enumerate(recover):
        if stage.prompts:
            sources[f"recover.{i}.prompts"] = stage.prompts
    return sources


def column_warnings(
    calibration: Calibration, training: TrainingData, recover: Sequence[RecoverStage]
) -> list[str]:
    """Columns with text in the first rows of files that no template names: an `input` is easily forgotten."""
    rewards = [training.reward]
    for stage in recover:
        if stage.method == "grpo":
            rewards += stage.rewards
    references = [reward.reference_template for reward in rewards]
    fields: dict[DataSource, str] = {}
    for field, source in named_sources(calibration, training, recover).items():
        if source.source != GENERAL and "against" not in field:
            fields.setdefault(source, field)
    warnings = []
    for source, field in fields.items():
        if local_file(source, field) is None:
            continue
        first_rows = itertools.islice(numbered_rows(source, field), SAMPLE)
        columns = [row.columns for row in first_rows]
        warnings.append(unused_columns(source, columns, field, references))
    return [warning for warning in warnings if warning]


def unused_columns(
    source: DataSource,
    rows: Sequence[Mapping[str, Any]],
    field: str,
    references: Sequence[str] = (),
) -> str:
    """A sentence about columns of rows that hold something and are in no template; empty where there are none."""
    remedy = "name what the model needs in a template, as {column}"
    templates = list(references)
    used = {TRUNCATED}
    if source.format == "text":
        templates.append(source.text)
    elif source.format == "prompt_completion":
        templates += [source.prompt, source.completion]
    else:
        used.add(source.messages)
        remedy = "write what the model needs into the turns"
    for template in templates:
        used |= {name.partition("[")[0] for name in columns_of(template)}
    unused = [name for name in _filled_columns(rows) if name not in used]
    if not unused:
        return ""
    return f"{field}: no template reads {listed(unused)} of {Path(source.source).name}: {remedy}"


def _filled_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold something in one of the rows, in the order of the file."""
    filled: dict[str, None] = {}
    for row in rows:
        filled |= {name: None for name, value in row.items() if value not in (None, "", [], {})}
    return list(filled)


def check_own_answers(training: TrainingData) -> None:
    """Check that local prompts which the dense model is to answer have what the answers are verified by."""
    if training.answers == "self" and training.keep == "correct":
        for source in training.prompted:
            _check_prompts(source.prompts_only, [training.reward], "training.sources")


def check_rewards(stages: Sequence[RecoverStage], training: TrainingData) -> None:
    """Check local prompts of reinforcement learning, and that they have what the rewards compare with."""
    for i, stage in enumerate(stages):
        if stage.method == "grpo":
            field = f"recover.{i}.prompts" if stage.prompts else "training.sources.0"
            _check_prompts(stage.prompt_source(training), stage.rewards, field)


def _check_prompts(source: DataSource, rewards: Sequence[Reward], field: str) -> None:
    """Read the rows of a local file; data on the hub is read by the step that needs it."""
    if local_file(source, field) is None:
        return
    for row in numbered_rows(source, field):
        prompt_of(row)
        for reward in rewards:
            answer_of(reward.reference_template, row)
