"""`ptl validate --schema`: an editor that checks by it accepts and refuses what `ptl validate` does."""

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from ptl.config.recover import TrainingData
from ptl.config.run import Config

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs").glob("*.yaml"))
SOURCE = {"source": "rows.jsonl"}


class EditorsLoader(yaml.SafeLoader):
    """Reads 6e-4 as a number, as editors do; for PyYAML it is a text, from which pydantic makes a number."""


EditorsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("+-0123456789")
)


@pytest.fixture(scope="module")
def schema():
    printed = Config.model_json_schema()
    Draft202012Validator.check_schema(printed)
    return printed


def problems(schema, part, value):
    section = {"$defs": schema["$defs"], **schema["properties"][part]}
    return [error.message for error in Draft202012Validator(section).iter_errors(value)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_fits(schema, path):
    settings = yaml.load(path.read_text(), EditorsLoader)
    assert [error.message for error in Draft202012Validator(schema).iter_errors(settings)] == []


@pytest.mark.parametrize(
    "training",
    [
        SOURCE,
        {**SOURCE, "weight": 2, "decontaminate": {"tasks": True}},
        {**SOURCE, "decontaminate": False},
        {**SOURCE, "decontaminate": "off"},  # what YAML 1.2 makes of off
        [SOURCE, {**SOURCE, "weight": 2}],
        {"sources": [SOURCE], "decontaminate": False},
    ],
)
def test_the_short_forms_of_training_fit(schema, training):
    assert problems(schema, "training", training) == []
    decontaminate = TrainingData.model_validate(training).decontaminate
    is_off = isinstance(training, dict) and training.get("decontaminate") in (False, "off")
    assert decontaminate.tasks is not is_off


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("training", {"sorce": "rows.jsonl"}),
        ("training", []),
        ("training", {**SOURCE, "decontaminate": True}),
        ("training", [{**SOURCE, "decontaminate": False}]),
        ("recover", [{"method": "sft"}]),
        ("prune", {"criterion": "on"}),
    ],
)
def test_a_wrong_value_does_not_fit(schema, part, value):
    assert problems(schema, part, value)


@pytest.mark.parametrize("stage", [{}, {"learning_rate": 1e-4}, {"method": "distil", "mix": 0}, {"method": "grpo"}])
def test_a_stage_fits(schema, stage):
    assert problems(schema, "recover", [stage]) == []
