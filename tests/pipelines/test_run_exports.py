"""`ptl run` with exports: one that fails, which the same command makes, and one that a finished run gets later."""

import json
import sys

import pytest
import whole_run
import yaml
from gguf_files import needs_llama_cpp
from mlflow import MlflowClient

from ptl.export.compressed_tensors import PYTHON

FAILED, ADDED = "export-compressed-tensors-fp8", "export-gguf-q4-0"
FORMS = [{"format": "compressed-tensors", "type": "fp8"}, {"format": "gguf", "type": "q8_0"}]
# In place of a Python with llmcompressor: it fails while there is a file `broken` beside it, else copies float weights
# and says that they are quantized.
MOCK = """#!{python}
import json, pathlib, shutil, sys
if sys.argv[2] == "-c":
    sys.exit()
if pathlib.Path(__file__).with_name("broken").exists():
    sys.exit("no such scheme")
src, dst = map(pathlib.Path, sys.argv[4:6])
dst.mkdir()
shutil.copy(src / "model.safetensors", dst)
config = json.loads((src / "config.json").read_text())
config["quantization_config"] = {{"quant_method": "compressed-tensors"}}
(dst / "config.json").write_text(json.dumps(config))
(dst / "recipe.yaml").touch()
"""


@pytest.fixture
def llmcompressor(tmp_path, monkeypatch):
    """A mock of the Python that has it; the file returned breaks it."""
    python = tmp_path / "python"
    python.write_text(MOCK.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    (tmp_path / "broken").touch()
    return tmp_path / "broken"


def write_config(config, path, forms):
    """One short iteration, scored on few items."""
    raw = yaml.safe_load(config.read_text()) | {"export": forms}
    raw["schedule"] |= {"iterations": 1, "recovery_tokens": 6_000}
    raw["evaluate"]["tasks"][0]["limit"] = 16
    raw["evaluate"]["speed"]["repeats"] = 0
    path.write_text(yaml.safe_dump(raw))
    return path


def exports(home):
    """Those of the newest run's result, by name."""
    return {export["name"]: export for export in json.loads((home / "latest/result.json").read_text())["exports"]}


@needs_llama_cpp
@pytest.mark.slow
def test_a_form_fails_is_made_by_the_same_command_and_another_is_added(config, llmcompressor, tmp_path):
    path, home = write_config(config, tmp_path / "two-forms.yaml", FORMS), tmp_path / "home"
    process = whole_run.start(path, home)
    output, _ = process.communicate(timeout=900)
    # Not 0: not all was made that the config asks for.
    assert process.returncode == 1, output
    assert f"\nerror: {FAILED}: export: llmcompressor ended with 1: no such scheme\n" in output
    assert "the report is written without what failed; fix it and run the same command again" in output
    assert {name: bool(export["failed"]) for name, export in exports(home).items()} == {
        "compressed-tensors-fp8": True,
        "gguf-q8_0": False,
    }
    assert "Not made: export: llmcompressor ended" in (home / "latest/report.md").read_text()
    assert {"export-gguf-q8-0", "report"} <= (committed := whole_run.records(home)).keys() and FAILED not in committed

    llmcompressor.unlink()
    output = whole_run.finish(whole_run.start(path, home))
    assert "continuing run" in output and "export-gguf-q8-0: done before" in output
    assert [export["failed"] for export in exports(home).values()] == ["", ""]
    assert "Not made" not in (home / "latest/report.md").read_text()

    # The run is finished: it is named, and keeps its records.
    before = whole_run.records(home)
    added = {"format": "gguf", "type": "q4_0", "limit": 8}
    more = write_config(config, tmp_path / "three-forms.yaml", [*FORMS, added])
    latest = (home / "latest").resolve()
    output = whole_run.finish(whole_run.start(more, home, "--run-dir", str(home / "latest")))
    after = whole_run.records(home)
    assert f"continuing run {latest.name}" in output and list((home / "runs").iterdir()) == [latest]
    assert after.keys() - before.keys() == {ADDED}
    assert {step: after[step] for step in before} == before
    export = exports(home)["gguf-q4_0"]
    assert [task["items"] for task in export["models"]["final"]["tasks"]] == [8]
    pairs = export["pairs"]["tiny_reasoner"]
    assert {name: pair["items"] for name, pair in pairs.items()} == {"final": 8, "dense_export": 8, "dense": 8}
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    (version,) = client.search_model_versions("tags.`ptl.export` = 'gguf-q4_0'")
    assert version.source == after[ADDED]["pointer"]["uri"]
