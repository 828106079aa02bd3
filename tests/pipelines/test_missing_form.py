"""`ptl run` with two forms, of which one fails: the report is written, and the same command makes what is missing."""

import json
import sys

import pytest
import whole_run
import yaml
from gguf_files import needs_llama_cpp

from ptl.export.compressed_tensors import PYTHON

FAILED = "export-compressed-tensors-fp8"
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


@needs_llama_cpp
@pytest.mark.slow
def test_one_of_two_forms_fails_and_is_made_by_the_same_command(config, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(MOCK.format(python=sys.executable))
    python.chmod(0o755)
    broken = tmp_path / "broken"
    broken.touch()
    monkeypatch.setenv(PYTHON, str(python))
    raw = yaml.safe_load(config.read_text()) | {"export": FORMS}
    raw["schedule"] |= {"iterations": 1, "recovery_tokens": 6_000}
    raw["evaluate"]["tasks"][0]["limit"] = 8
    raw["evaluate"]["speed"]["repeats"] = 0
    path = tmp_path / "two-forms.yaml"
    path.write_text(yaml.safe_dump(raw))
    home = tmp_path / "home"

    process = whole_run.start(path, home)
    output, _ = process.communicate(timeout=900)
    # Not 0: not all was made that the config asks for.
    assert process.returncode == 1, output
    assert f"\nerror: {FAILED}: export: llmcompressor ended with 1: no such scheme\n" in output
    assert "the report is written without what failed; fix it and run the same command again" in output
    result = json.loads((home / "latest/result.json").read_text())
    assert [bool(export["failed"]) for export in result["exports"]] == [True, False]
    assert "Not made: export: llmcompressor ended" in (home / "latest/report.md").read_text()
    assert {"export-gguf-q8-0", "report"} <= (committed := whole_run.records(home)).keys() and FAILED not in committed

    broken.unlink()
    output = whole_run.finish(whole_run.start(path, home))
    assert "continuing run" in output and "export-gguf-q8-0: done before" in output
    result = json.loads((home / "latest/result.json").read_text())
    assert [export["failed"] for export in result["exports"]] == ["", ""]
    assert "Not made" not in (home / "latest/report.md").read_text()
    assert len(list((home / "runs").iterdir())) == 1
