"""`ptl validate --schema`: an editor that checks by it accepts and refuses what `ptl validate` does."""

import re

import pytest
import yaml
from checkout import SHIPPED

from ptl.config.data import TrainingData
from ptl.config.run import Config

SOURCE = {"source": "rows.jsonl"}


class EditorsLoader(yaml.SafeLoader):
    """Reads 6e-4 as a number, as editors do; for PyYAML it is a text, from which pydantic makes a number."""


NUMBER = re.compile(r"[-+]?\d+[eE][-+]?\d+")
EditorsLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("+-0123456789"))


@pytest.fixture(scope="module")
def problems():
    """What the schema says against a value, of the whole config or of one section."""
    from jsonschema import Draft202012Validator

    schema = Config.model_json_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False

    def messages(value, part=None):
        section = (
            schema if part is None else {"$defs": schema["$defs"], **schema["properties"][part]}
        )
        return [error.message for error in Draft202012Validator(section).iter_errors(value)]

    return messages


def test_shipped_configs_and_the_short_forms_of_training_fit(problems):
    for path in SHIPPED:
        assert problems(yaml.load(path.read_text(), EditorsLoader)) == [], path
    for training, compared in (
        (SOURCE, True),
        ({**SOURCE, "weight": 2, "decontaminate": {"tasks": True}}, True),
        ({**SOURCE, "decontaminate": False}, False),
        ({**SOURCE, "decontaminate": "off"}, False),  # what YAML 1.2 makes of off
        ([SOURCE, {**SOURCE, "weight": 2}], True),
        ({"sources": [SOURCE], "decontaminate": False}, False),
    ):
        assert problems(training, "training") == []
        assert TrainingData.model_validate(training).decontaminate.tasks == compared
    for data in (SOURCE, [SOURCE, {**SOURCE, "weight": 2}]):
        assert problems({"data": data}, "calibration") == []
    assert problems({"data": []}, "calibration")


def test_what_is_refused_does_not_fit(problems):
    for part, value in (
        ("training", {"sorce": "rows.jsonl"}),
        ("training", []),
        ("training", {**SOURCE, "decontaminate": True}),
        ("training", [{**SOURCE, "decontaminate": False}]),
        ("recover", [{"method": "sft"}]),
        ("prune", {"criterion": "on"}),
    ):
        assert problems(value, part), value
    for stage in ({}, {"learning_rate": 1e-4}, {"method": "distil", "mix": 0}, {"method": "grpo"}):
        assert problems([stage], "recover") == []
