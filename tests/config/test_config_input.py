"""Configs that nobody meant to write: each is an InputError, or a config that can be planned, stored and compiled."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptl.config import base, yaml_text
from ptl.config.base import Section
from ptl.config.run import Config, assign, check, essentials, load_config, pairs
from ptl.config.schedule import plan, removal
from ptl.errors import InputError
from ptl.local import run_directory

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
FIELDS = [".".join(path) for path in base.field_paths(Config)]

numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.5, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from([10**9, 2**31, 2**53 + 1, 2**63, 10**30, 10**400, -(10**400)]),
)
texts = st.one_of(
    st.text(st.characters(), max_size=8),
    st.sampled_from(["", "\ud800", "a\0b", "x" * 300, "y/" * 3000, "off", "../..", "~", "s3://u:p@bucket/x", "{x.y}"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(texts, numbers), inner, max_size=3)),
    max_leaves=6,
)
fast = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@fast
@given(st.sampled_from(FIELDS), values)
def test_any_override_is_refused_or_sound(name, value):
    try:
        is_whole(load_config(TINY, pairs("--set", [f"{name}={yaml.safe_dump(value)}"])))
    except InputError as error:
        assert str(error)


@fast
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode(errors="replace"))))
def test_any_bytes_are_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_config(path)


def bomb(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), "holds more than 10,000 values"),
        ("a: &a [*a]", "nested more than 32 deep"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("a: " + "[" * 40 + "]" * 40, "nested more than 32 deep"),
        ("a: " + "{b: " * 40 + "}" * 40, "nested more than 32 deep"),
        ("\n".join(f"{' ' * i}a{i}:" for i in range(400)), "nested"),
        ("seed: " + "9" * 5000, "line 1 is a number of 5,000 digits"),
        ("name: x\nseed: 0x" + "f" * 5000, "line 2 is a number of 5,002 digits"),
        ('name: "\\ud800"', "a character that no file can hold"),
        ('name: "a\\0b"', "a character that no file can hold"),
        ("seed: 1\nname: x\nseed: 2", "line 1: 'seed' appears twice"),
        ("seed: 2026-13-01", "is not valid YAML: month must be"),
        ("seed: !!bool x", "is not valid YAML"),
        ("seed: !!python/object:os.system x", "is not valid YAML"),
        ("a: " + "x" * (1 << 19), "longer than 256 KiB"),
    ],
    ids=[
        *("aliases-of-aliases", "an-anchor-in-itself", "open-brackets", "lists", "mappings", "a-staircase"),
        *("decimal-digits", "hexadecimal-digits", "a-lone-surrogate", "a-NUL", "a-field-twice", "no-such-month"),
        *("no-truth-value", "a-Python-object", "a-long-file"),
    ],
)
def test_yaml_that_no_config_needs(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(path)
    assert len(str(error.value)) < 2000
    with pytest.raises(InputError, match=message):
        yaml_text.load(text, "--set: the value")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / ("x" * 300), tmp_path / ("y/" * 3000)):
        with pytest.raises(InputError, match="config: "):
            load_config(path)
    (tmp_path / "latin").write_bytes(b"name: \xe4")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "latin")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target", 0.3, r"target: unknown field; did you mean schedule\.target or prune\.target\?"),
        ("shedule.target", 0.3, "shedule: unknown field; did you mean schedule?"),
        ("prune.criterium", "max", r"did you mean prune\.criterion\?"),
        ("training.sourc", "x", r"did you mean training\.sources\.source\?$"),
        ("recover", [{"method": "grpo", "lerning_rate": 1}], r"did you mean recover\.learning_rate\?$"),
        (
            "recover",
            [{"method": "grpo", "max_length": 64}],
            r"recover\.0: max_length is no field of grpo but of cpt and distil: remove it$",
        ),
        ("colour", "red", "remove it, or see `ptl validate --schema`"),
        ("recover", [{"method": "cpt", "teacher": "x"}], r"teacher is no field of cpt but of distil: remove it"),
        ("schedule.target", 1.5, "1.5: must be a share of the parameters to remove, below 1"),
        ("schedule.target", 40, "40: must be a share .* 1000 or more"),
        ("schedule.target", float("inf"), "inf: Input should be a finite number"),
        ("schedule.target", "40%", r"schedule\.target: '40%': must be a share .*: write 0\.4$"),
        (
            "schedule.iterations",
            0,
            r"wrong values\n  schedule\.iterations: 0: must be a whole number from 1 to 64, or auto$",
        ),
        ("prune.width_multiple", "wide", r"'wide': must be a whole number of 1 or more, or auto$"),
        ("recover", [{"decay": 2}], r"decay: 2: must be a share from 0 to 1, or each$"),
        ("evaluate.tasks", ["gsm8k"], r"evaluate\.tasks\.0: 'gsm8k': must be a section, a mapping of its fields$"),
        ("evaluate.tasks", "gsm8k", r"evaluate\.tasks: 'gsm8k': must be a list"),
        ("evaluate.tasks.7.name", "gsm8k", r"7 is no entry of a list of 1; number its entries from 0"),
        ("images.tag", 1.0, r"images\.tag: 1\.0: must be text: put it in quotes, .* --set 'FIELD=\"VALUE\"'"),
        ("name", True, "name: True: must be text: put it in quotes"),
        ("storage.registered_model", "a/b", "storage.registered_model: 'a/b'"),
        ("storage.registered_model", "it's", "storage.registered_model"),
        ("training.source", "s3://key:secret@bucket/x.jsonl", r"'s3://\*\*\*@bucket/x.jsonl': holds a login"),
        ("calibration.batch_size", 10**17, "must be at most 2"),
        *((name, "y/" * 3000, "at most 4096 characters") for name in ("model.path", "calibration.data.source")),
        ("model.path", "a\0b", "should match pattern"),
    ],
)
def test_wrong_values_are_explained(field, value, message):
    with pytest.raises(InputError, match=message):
        load_config(TINY, {field: value})


def test_every_field_has_a_description():
    def parts(section):
        for part in section.__subclasses__():
            yield part
            yield from parts(part)

    fields = [(part.__name__, name, field) for part in parts(Section) for name, field in part.model_fields.items()]
    assert len(fields) > 100
    assert [f"{part}.{name}" for part, name, field in fields if not field.description] == []


PATHS = {
    "model.path": "models/mine",
    "calibration.data.source": "calibration.parquet",
    "training.source": "./training.jsonl",
    "evaluate.data_dir": "data",
    "evaluate.tasks": [{"name": "task.yaml"}, {"name": "gsm8k"}],
    "recover": [{"method": "distil", "teacher": "../teacher"}],
}


def located(config):
    return [
        *(config.model.path, config.calibration.data.source, config.training.sources[0].source),
        *(config.evaluate.data_dir, config.evaluate.tasks[0].name, config.recover[0].teacher),
    ]


def test_paths_are_relative_to_the_config(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "models/mine").mkdir(parents=True)
    (folder / "data").mkdir()
    raw = yaml.safe_load(TINY.read_text())
    for dotted, value in PATHS.items():
        assign(raw, dotted, value)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(folder / "config.yaml")
    names = ["models/mine", "calibration.parquet", "training.jsonl", "data", "task.yaml"]
    assert located(config) == [*(str(folder / name) for name in names), str(tmp_path / "teacher")]
    assert config.evaluate.tasks[1].name == "gsm8k"
    monkeypatch.chdir(folder)
    assert load_config("config.yaml") == config
    (tmp_path / "kept.yaml").write_text(run_directory.dump(config))
    assert load_config(tmp_path / "kept.yaml") == config  # that of a run's directory


def test_paths_of_the_command_line_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config(TINY, PATHS | {"evaluate.data_dir": "./data"})
    names = ["models/mine", "calibration.parquet", "training.jsonl", "data", "task.yaml", "../teacher"]
    assert located(config) == [os.path.normpath(tmp_path / name) for name in names]
    yaml.safe_dump(config.model_dump(), default_flow_style=True)  # plain texts again


def test_a_pipeline_has_paths_relative_to_the_working_directory(tmp_path, monkeypatch):
    """So it is the same on every machine, and holds in the images, whose working directory has the examples."""
    config = load_config(TINY)
    monkeypatch.chdir(ROOT)
    assert essentials(config)["model"] == {"path": "examples/tiny_reasoner/checkpoint"}
    assert essentials(config)["evaluate"]["tasks"][0]["name"] == "examples/tiny_reasoner/tiny_reasoner.yaml"
    monkeypatch.chdir(tmp_path)
    assert essentials(config)["model"] == {"path": str(ROOT / "examples/tiny_reasoner/checkpoint")}


@pytest.mark.parametrize("name", ["org/model", "s3://bucket/train.jsonl", "/data/train.jsonl"])
def test_other_names_stay_as_they_are(name):
    assert load_config(TINY, {"training.source": name}).training.sources[0].source == name


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_config(TINY, {"model.path": "~/model"}).model.path == "/home/somebody/model"


def test_a_section_of_very_many_keys_is_refused_at_once():
    text, began = "".join(f"k{i}: 1\n" for i in range(15_000)), time.process_time()
    with pytest.raises(InputError, match="more than 10,000 values"):
        yaml_text.load(text, "config")
    assert time.process_time() - began < 2.5  # quadratic: 5


def test_a_file_is_read_only_as_far_as_a_config_may_be_long(tmp_path):
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="longer than 256 KiB"):
        load_config(path)


@pytest.mark.parametrize("name", ["model.path", "evaluate.data_dir", "calibration.data.source"])
def test_an_empty_path_is_not_the_working_directory(name):
    with pytest.raises(InputError, match=name):
        load_config(TINY, pairs("--set", [f"{name}=''"]))
