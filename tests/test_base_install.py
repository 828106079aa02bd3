"""What the package without extras can do, tried in a process that cannot import what the extras bring."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
from checkout import DENSE, ROOT, TINY
from packaging.requirements import Requirement

SCRIPT = """
import json, sys
blocked, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in blocked else found(name, package)
from one_process import ptl
print(json.dumps([ptl(*command) for command in commands]))
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
            todo += [
                need.name
                for need in needs
                if not need.marker or need.marker.evaluate({"extra": ""})
            ]
    by_module = metadata.packages_distributions().items()
    return {
        module
        for module, sources in by_module
        if known & {name.lower().replace("_", "-") for name in sources}
    }


# Commands with their exit codes.
WORKS = {
    ("--help",): 0,
    ("validate", "--schema"): 0,
    ("validate", TINY): 0,
    ("plan", TINY): 2,  # transformers builds the model
    ("up", "--stop"): 0,
    ("status", "run", "--host", "https://127.0.0.1:9"): 2,  # needs kfp's client
}
# Commands with the extras that they name in one line.
NEEDS = {
    ("compile", TINY, "-o", "p.yaml"): "pipelines",
    ("run", TINY): "prune,recover,evaluate,pipelines",
    ("submit", TINY, "--host", "https://127.0.0.1:9"): "pipelines",
    ("up",): "pipelines",
    ("import-model", DENSE, "imported"): "prune",
    ("prune", DENSE, "pruned", "-c", TINY): "prune",
    ("recover", DENSE, "recovered", "-c", TINY): "recover",
    ("evaluate", DENSE, "evaluated", "-c", TINY): "evaluate",
    ("export", DENSE, "model.gguf"): "gguf",
}


@pytest.mark.nightly
def test_commands_of_a_base_install_work_or_name_the_extra_that_they_need(tmp_path):
    """What its requirements do not bring is not there; all in one process."""
    text = (
        (ROOT / "setup.cfg")
        .read_text()
        .partition("install_requires =")[2]
        .partition("[options.")[0]
    )
    there = modules_of(Requirement(line).name for line in text.strip().splitlines())
    there |= {"ptl", "mlflow", "pip", "setuptools", "_virtualenv"}
    blocked = sorted(set(metadata.packages_distributions()) - there)
    assert {"torch", "kfp", "lm_eval", "trl", "flask", "sqlalchemy", "pandas"} <= set(blocked)
    commands = [[str(word) for word in command] for command in (*WORKS, *NEEDS)]
    environment = {
        "COLUMNS": "200",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONSAFEPATH": "1",
    }
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"
    command = [sys.executable, "-c", SCRIPT, json.dumps(blocked), json.dumps(commands)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = dict(zip((*WORKS, *NEEDS), json.loads(done.stdout), strict=True))
    assert {command: answers[command][0] for command in WORKS} == WORKS, answers
    for command, extra in NEEDS.items():
        code, shown = answers[command]
        assert (code, shown.count("\n")) == (2, 1) and f"'prune-tune-loop[{extra}]'" in shown, (
            command,
            shown,
        )
    assert not any("Traceback" in shown for _, shown in answers.values())
