"""What the package without extras can do, tried in a process that cannot import what the extras bring."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ptl import extras
from ptl.errors import InputError

ROOT = Path(__file__).parents[1]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
DENSE = ROOT / "examples/tiny_reasoner/checkpoint"

SCRIPT = """
import contextlib, io, json, sys
blocked, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in blocked else found(name, package)
from ptl.cli.app import main
done = []
for command in commands:
    sys.argv, code = ["ptl", *command], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        except Exception as error:
            code, text = 1, print(f"Traceback: {error!r}")
    done.append([code, out.getvalue()])
print(json.dumps(done))
"""


def modules_of(names):
    """Top-level modules of distributions and of all that they require without extras."""
    todo, known = list(names), set()
    while todo:
        name = todo.pop().lower().replace("_", "-")
        try:
            needs = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        if name not in known:
            known.add(name)
            todo += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return {
        module
        for module, sources in metadata.packages_distributions().items()
        if any(source.lower().replace("_", "-") in known for source in sources)
    }


@pytest.fixture(scope="module")
def base():
    """Run commands as in a base install: what its requirements do not bring is not there."""
    text = (ROOT / "setup.cfg").read_text().partition("install_requires =")[2].partition("[options.")[0]
    names = [Requirement(line.strip()).name for line in text.splitlines() if line.strip()]
    assert "mlflow-skinny" in names and "numpy" in names
    there = modules_of(names) | {"ptl", "mlflow", "pip", "setuptools", "_virtualenv"}
    blocked = sorted(set(metadata.packages_distributions()) - there)
    assert {"torch", "kfp", "lm_eval", "trl", "flask", "sqlalchemy", "pandas"} <= set(blocked)

    def run(*commands, folder=ROOT):
        arguments = [json.dumps(blocked), json.dumps([[str(word) for word in command] for command in commands])]
        environment = {
            "COLUMNS": "200",
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "PYTHONSAFEPATH": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_every_command_has_its_help(base):
    ((code, shown),) = base(["--help"])
    commands = re.findall(r"^│ ([a-z][a-z-]+)  ", shown, re.M)
    assert code == 0 and len(commands) == 20 and {"compare", "submit", "doctor"} <= set(commands), shown
    for command, (code, shown) in zip(commands, base(*([name, "--help"] for name in commands)), strict=True):
        assert code == 0 and "Usage" in shown, (command, shown)


def test_what_needs_no_extra_works(base, tmp_path):
    for name, outcomes in (("a", [1] * 400), ("b", [1] * 300 + [0] * 100)):
        (tmp_path / name).mkdir()
        rows = [{"task": "t", "id": str(i), "prompt_digest": "d", "correct": right} for i, right in enumerate(outcomes)]
        (tmp_path / name / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = {
        ("--version",): 0,
        ("validate", "--schema"): 0,
        ("validate", TINY): 0,
        ("plan", TINY): 2,  # transformers builds the model
        ("init", DENSE, "-o", "first.yaml"): 2,
        ("compare", "a", "a"): 0,
        ("compare", "a", "b"): 1,
        ("images",): 0,
        ("up", "--stop"): 0,
        ("status", "run", "--host", "https://127.0.0.1:9"): 2,  # needs kfp's client
    }
    done = base(*commands, folder=tmp_path)
    assert [code for code, _ in done] == list(commands.values()), done
    assert "inferior" in done[5][1] and not any("Traceback" in shown for _, shown in done)


def test_what_needs_an_extra_names_it_in_one_line(base, tmp_path):
    home = tmp_path / ".ptl"
    home.mkdir()
    (home / "mlflow.db").touch()
    commands = {
        ("compile", TINY, "-o", tmp_path / "p.yaml"): "pipelines",
        ("run", TINY): "prune,recover,evaluate,pipelines",
        ("run", TINY, "--runner", "docker"): "pipelines",
        ("submit", TINY, "--host", "https://127.0.0.1:9"): "pipelines",
        ("up",): "pipelines",
        ("up", "--ui"): "pipelines",
        ("gc",): "pipelines",
        ("fetch", "run", tmp_path / "out"): "pipelines",
        ("import-model", DENSE, tmp_path / "imported"): "prune",
        ("prune", DENSE, tmp_path / "pruned", "-c", TINY): "prune",
        ("recover", DENSE, tmp_path / "recovered", "-c", TINY): "recover",
        ("evaluate", DENSE, tmp_path / "evaluated", "-c", TINY): "evaluate",
        ("export", DENSE, tmp_path / "model.gguf"): "gguf",
    }
    done = base(*commands, folder=tmp_path)
    for (command, extra), (code, shown) in zip(commands.items(), done, strict=True):
        assert code == 2 and f"pip install 'prune-tune-loop[{extra}]'" in shown and shown.count("\n") == 1, (
            command,
            shown,
        )


def test_a_module_that_no_extra_brings_is_an_error_of_ours():
    assert extras.missing("no_such_module", "run") is None
    assert isinstance(extras.missing("torch.nn", "evaluate"), InputError)
    assert "ptl evaluate: needs the module torch" in str(extras.missing("torch.nn", "evaluate"))
