"""Configs that nobody meant to write: each is an InputError, or a config that can be planned, stored and compiled."""

import json
import os

import golden_messages
import pytest
import yaml
from checkout import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptl.config import base, yaml_text
from ptl.config.run import Config, assign, check, essentials, load_config, pairs
from ptl.config.schedule import plan, removal
from ptl.errors import InputError
from ptl.local import run_directory

FIELDS = [".".join(path) for path in base.field_paths(Config)]

numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.5, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from([10**9, 2**31, 2**53 + 1, 2**63, 10**30, 10**400, -(10**400)]),
)
texts = st.one_of(
    st.text(st.characters(), max_size=8),
    st.sampled_from(
        [
            "",
            "\ud800",
            "a\0b",
            "x" * 300,
            "y/" * 3000,
            "off",
            "../..",
            "~",
            "s3://u:p@bucket/x",
            "{x.y}",
        ]
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(texts, numbers), inner, max_size=3)
    ),
    max_leaves=6,
)
fast = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def is_whole(config):
    """All that is done with a config before any work, and its form in the run's directory and in a pipeline."""
    for it in plan(config.schedule, config.prune):
        assert it.tokens >= 0
    removal(10**6, config.schedule.target)
    run_directory.dump(config).encode()
    json.dumps(essentials(config), allow_nan=False).encode()


@fast
@given(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
def test_any_values_of_fields_are_refused_or_sound(fields):
    raw = yaml.safe_load(TINY.read_text())
    for dotted, value in fields.items():
        *parents, last = dotted.split(".")
        section = raw
        for name in parents:
            if isinstance(section, dict):
                section = section.setdefault(name, {})
            if isinstance(section, list) and section:
                section = section[0]
        if isinstance(section, dict):
            section[last] = value
    try:
        is_whole(check(Config, raw, "config", folder=TINY.parent))
    except InputError as error:
        assert "wrong values" in str(error) and len(str(error)) < 20_000
        # Of pydantic, which speaks of tuples and inputs
        assert " should " not in str(error).replace("'", " ")


@fast
@given(st.sampled_from(FIELDS), values)
def test_any_override_is_refused_or_sound(name, value):
    try:
        is_whole(load_config(TINY, pairs("--set", [f"{name}={yaml.safe_dump(value)}"])))
    except InputError as error:
        assert str(error)


def test_yaml_that_no_config_needs_and_files_that_cannot_be_read_are_refused(tmp_path):
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    for text, message in (
        ("\n".join(bomb), "holds more than 10,000 values"),
        ("a: &a [*a]", "holds more than 10,000 values"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        ('name: "\\ud800"', "name: "),
        ("seed: 1\nname: x\nseed: 2", "line 1: 'seed' appears twice"),
        ("seed: 2026-13-01", "is not valid YAML: month must be"),
        ("seed: !!bool x", "is not valid YAML"),
        ("seed: !!python/object:os.system x", "is not valid YAML"),
        ("a: [1", "is not valid YAML"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=message) as error:
            load_config(tmp_path / "config.yaml")
        assert len(str(error.value)) < 2000
    (tmp_path / "latin").write_bytes(b"name: \xe4")
    (tmp_path / "list").write_text("- 1")
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 40)  # of which only as much is read as a config may be long
    names = {
        ".": "",
        "none.yaml": "",
        "x" * 300: "",
        "latin": "cannot be read",
        "list": "must hold a mapping",
    }
    for name, message in (names | {"long": "longer than 256 KiB"}).items():
        with pytest.raises(InputError, match=f"^config: .*{message}"):
            load_config(tmp_path / name)


def test_yaml_is_read_up_to_its_limits():
    for write, largest in (
        (lambda number: str([0] * number), 9_999),  # and the list itself
        (lambda characters: "x" * characters, 1 << 18),
    ):
        assert yaml_text.load(write(largest), "it")
        with pytest.raises(InputError, match=r"^it"):
            yaml_text.load(write(largest + 1), "it")


def test_each_message_names_field_value_and_remedy():
    def message(*sets):
        try:
            load_config(TINY, pairs("--set", sets))
        except InputError as error:
            return str(error)
        return "accepted"

    golden_messages.check("config.txt", message, config=TINY)


PATHS = {
    "model.path": "models/mine",
    "calibration.data.source": "calibration.parquet",
    "training.source": "./training.jsonl",
    "evaluate.data_dir": "./data",
    "evaluate.tasks": [{"name": "task.yaml"}, {"name": "gsm8k"}],
    "recover": [{"method": "distil", "teacher": "../teacher"}],
}


def located(config):
    return [
        *(config.model.path, config.calibration.data[0].source, config.training.sources[0].source),
        *(config.evaluate.data_dir, config.evaluate.tasks[0].name, config.recover[0].teacher),
    ]


def test_paths_are_relative_to_the_config_or_to_the_working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "models/mine").mkdir(parents=True)
    raw = yaml.safe_load(TINY.read_text())
    for dotted, value in PATHS.items():
        assign(raw, dotted, value)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(folder / "config.yaml")
    names = [
        "models/mine",
        "calibration.parquet",
        "training.jsonl",
        "data",
        "task.yaml",
        "../teacher",
    ]
    assert located(config) == [os.path.normpath(folder / name) for name in names]
    assert config.evaluate.tasks[1].name == "gsm8k"
    (tmp_path / "kept.yaml").write_text(run_directory.dump(config))
    assert load_config(tmp_path / "kept.yaml") == config  # that of a run's directory
    monkeypatch.chdir(folder)
    assert load_config("config.yaml") == config
    assert located(load_config(TINY, PATHS)) == located(config)  # options of the command line


def test_a_pipeline_has_paths_relative_to_the_working_directory_and_other_names_as_they_are(
    tmp_path, monkeypatch
):
    """So it is the same on every machine, and holds in the images, whose working directory has the examples."""
    config = load_config(TINY)
    for folder, prefix in ((ROOT, ""), (tmp_path, f"{ROOT}/")):
        monkeypatch.chdir(folder)
        assert essentials(config)["model"] == {"path": f"{prefix}examples/tiny_reasoner/checkpoint"}
    monkeypatch.setenv("HOME", "/home/somebody")
    located = {name: name for name in ("org/model", "s3://bucket/train.jsonl", "/data/train.jsonl")}
    located["~/model"] = "/home/somebody/model"
    assert {name: load_config(TINY, {"model.path": name}).model.path for name in located} == located
