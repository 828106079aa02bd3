"""The documentation builds with every link checked, and names only settings that exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipelines.prune_tune_loop.pipeline import parameters
from ptl.cli import app
from ptl.cli.configs import checked
from ptl.config.cluster import Resources, Storage
from ptl.config.run import load_config
from ptl.errors import PtlError
from ptl.model.families import FAMILIES, TEXT_TOWERS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def test_it_builds_with_every_link_checked(tmp_path):
    mkdocs = shutil.which("mkdocs") or shutil.which("mkdocs", path=str(Path(sys.executable).parent))
    if mkdocs is None:
        pytest.skip("NOT CHECKED: mkdocs is not installed here; `pip install '.[docs]'` brings it")
    command = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = {name: (tmp_path / "site" / name / "index.html").read_text() for name in ("config-reference", "commands")}
    assert "recovery_tokens" in pages["config-reference"] and "--rehearse" in pages["commands"]


def shown_commands():
    """Words of every `ptl` command in a block of a page, without the comment behind it."""
    for path in [ROOT / "README.md", *DOCS]:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.S | re.M):
            lines = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?ptl (.*)", block, re.M) if language in ("", "sh") else []
            for line in lines:
                yield [word.strip("[]") for word in shlex.split(line, comments=True)]


def test_commands_that_are_shown_exist_with_their_options():
    commands = typer.main.get_command(app.app).commands
    options = {
        name: {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        for name, command in commands.items()
    }
    shown = list(shown_commands())
    assert len(shown) > 40
    for name, *words in shown:
        assert name in commands
        unknown = [word for word in words if word.startswith("-") and word.split("=")[0] not in options[name]]
        assert not unknown, f"ptl {name} has no {unknown}"


def test_an_error_that_is_shown_with_its_command_is_what_the_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = [block for path in DOCS for block in re.findall(r"```\n\$ ptl (.*)\nerror: ([^`]*)\n```", path.read_text())]
    assert shown
    for command, error in shown:
        with pytest.raises(PtlError) as caught:
            app.app(shlex.split(command), standalone_mode=False)
        assert str(caught.value) == error


def test_the_page_of_run_parameters_explains_every_one():
    text = (ROOT / "docs" / "ui.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert told == set(parameters(load_config(ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml")))


@pytest.mark.parametrize(("section", "model"), [("resources", Resources), ("storage", Storage)])
def test_settings_that_are_named_exist(section, model):
    named = {name for path in DOCS for name in re.findall(rf"`{section}\.(\w+)", path.read_text())}
    assert named and named <= set(model.model_fields)


def test_the_page_of_model_families_lists_every_one():
    table = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "families.md").read_text(), re.MULTILINE)
    listed = set(re.findall(r"`(\w+)`", " ".join(table))) - {"model_type"}
    assert listed == FAMILIES.keys() | TEXT_TOWERS.keys()


def test_files_that_are_named_exist():
    pattern = re.compile(r"`((?:manifests|examples|pipelines|docs|tests|components)/[\w./-]+\.\w+)`")
    named = {name for path in DOCS for name in pattern.findall(path.read_text())}
    assert len(named) >= 4 and not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", ["README.md", "docs/scores.md"])
def test_a_whole_config_that_is_shown_is_valid(page, tmp_path):
    """It is said to be a file in the root of the checkout; its paths are relative to its folder."""
    block = re.search(r"```yaml\n(name: .*?)```", (ROOT / page).read_text(), re.S)[1]
    (tmp_path / "readme.yaml").write_text(block)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    config = load_config(tmp_path / "readme.yaml")
    assert checked(config).params == 213_568
