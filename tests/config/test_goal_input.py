"""Targets in memory: how they are written, and what is said where they are written wrongly."""

from pathlib import Path

import pytest

from ptl.config.run import Config, essentials, load_config, pairs
from ptl.config.schedule import MemoryGoal, memory_bytes
from ptl.errors import InputError

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"


def target(*sets):
    return load_config(TINY, pairs("--set", sets)).schedule.target


def test_a_goal_takes_the_place_of_a_number():
    assert target("schedule.target.memory=16GiB") == MemoryGoal(memory="16GiB")
    whole = target("schedule.target={memory: 1.5 GB, sequences: 8, tokens: 4096}")
    assert (whole.bytes, whole.sequences, whole.tokens, whole.itemsize) == (1_500_000_000, 8, 4096, 2)
    assert target("schedule.target.memory=16GiB", "schedule.target.sequences=8").sequences == 8
    assert target("schedule.target=0.3") == 0.3


def test_memory_has_a_unit():
    assert {text: memory_bytes(text) for text in ("16GiB", "16 Gi", "2kB", "0.5MB")} == {
        "16GiB": 16 << 30,
        "16 Gi": 16 << 30,
        "2kB": 2000,
        "0.5MB": 500_000,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("schedule.target.memory=16", "schedule.target.memory: 16: must be a number with a unit"),
        ("schedule.target.memory=0GB", "schedule.target.memory: '0GB': must be a number with a unit"),
        ("schedule.target={}", "schedule.target.memory: missing"),
        ("schedule.target.memroy=2GB", "schedule.target.memroy: unknown field; did you mean schedule.target.memory?"),
        ("schedule.target={memory: 1GB, tokens: 0}", "schedule.target.tokens: 0: Input should be greater than"),
        ("schedule.target=5", "schedule.target: 5: must be a share of the parameters"),
        ("gate=true", "gate: True: "),
    ],
)
def test_errors_name_the_field_and_the_value(change, said):
    with pytest.raises(InputError) as error:
        target(change)
    assert f"\n  {said}" in str(error.value)


def test_a_goal_survives_what_a_config_goes_through():
    config = load_config(TINY, {"schedule.target": {"memory": "300kB", "tokens": 10}})
    assert essentials(config)["schedule"]["target"] == {"memory": "300kB", "tokens": 10}
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config.schedule.model_copy(update={"iterations": "auto"}).num_iterations == 4
