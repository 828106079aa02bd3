"""The documentation builds with every link checked, and shows commands and configs that work."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from checkout import DENSE, ROOT, TINY

from ptl.cli import app
from ptl.cli.configs import checked
from ptl.config.run import load_config
from ptl.errors import InputError


@pytest.mark.nightly
def test_it_builds_with_every_link_checked(tmp_path):
    command = [
        Path(sys.executable).with_name("mkdocs"),
        "build",
        "--strict",
        "--site-dir",
        tmp_path / "site",
    ]
    if not command[0].exists():
        pytest.skip("NOT CHECKED: mkdocs is not installed here; `pip install '.[docs]'` brings it")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "recovery_tokens" in (tmp_path / "site/config-reference/index.html").read_text()


def test_commands_that_are_shown_exist_with_their_options():
    commands = typer.main.get_command(app.app).commands
    options = {
        name: {
            option
            for parameter in command.params
            for option in [*parameter.opts, *parameter.secondary_opts]
        }
        for name, command in commands.items()
    }
    pages = "".join(
        path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", pages, re.S | re.M)
    script = "".join(block for language, block in blocks if language in ("", "sh"))
    shown = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?ptl (.*)", script, re.M)
    assert len(shown) > 40
    for line in shown:
        name, *words = [word.strip("[]") for word in shlex.split(line, comments=True)]
        assert name in commands, line
        assert {word.split("=")[0] for word in words if word.startswith("-")} <= options[name], line


def test_a_whole_config_that_is_shown_is_valid(tmp_path):
    """It is said to be a file in the root of the checkout; its paths are relative to its folder."""
    part = re.search(r"```yaml\n(schedule: .*?)```", (ROOT / "docs/scores.md").read_text(), re.S)[1]
    # said to be sections of tiny.yaml
    assert load_config(TINY, yaml.safe_load(part)).gate.margin == 0.03
    block = re.search(r"```yaml\n(name: .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (tmp_path / "readme.yaml").write_text(block)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert checked(load_config(tmp_path / "readme.yaml")).params == 213_568


# ---- docs/data.md

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ enable_thinking }}"

DATA_PAGE = (ROOT / "docs/data.md").read_text()
# Parts of a config, and the error that follows each, if one does.
EXAMPLES = re.findall(r"```yaml\n(.*?)```(?:\n\n```\nerror: (.*?)\n```)?", DATA_PAGE, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, and a model that can chat."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(DENSE, folder / "model")
    (folder / "model/chat_template.jinja").write_text(TEMPLATE)
    for name, text in re.findall(r"`([\w.-]+)`:\n\n```json\n(.*?)```", DATA_PAGE, re.S):
        (folder / name).write_text(text)
    rows = [json.loads(line) for line in (folder / "alpaca.jsonl").read_text().splitlines()]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    (folder / "other-benchmark.jsonl").write_text('{"question": "What is 7 * 6?"}\n')
    return folder


@pytest.mark.parametrize(("part", "said"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_is_valid_or_has_the_error_that_follows_it(folder, part, said):
    """In a config of the tiny reasoner, in the folder /home/you."""
    settings = load_config(TINY).model_dump(mode="json") | {"model": {"path": "model"}}
    for name, value in yaml.safe_load(part).items():
        settings[name] = settings[name] | value if name == "evaluate" else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    if not said:
        assert checked(load_config(path)).params == 213_568
        return
    with pytest.raises(InputError) as caught:
        checked(load_config(path))
    assert str(caught.value).replace(str(folder), "/home/you") == said
