"""`ptl export` to compressed-tensors, with a mock in place of llmcompressor. tests/export has the rest."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptl.cli.app import app
from ptl.config.run import load_config
from ptl.export import compressed_tensors

ROOT = Path(__file__).parents[2]
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.mark.parametrize(("type", "config"), [("fp8", TINY), ("int8", "tiny")])
def test_the_configs_calibration_text_is_passed_on(type, config, tmp_path, monkeypatch):
    texts = []

    def write(src, dst, type, calibration, seed):
        texts.append(calibration)
        shutil.copytree(src, dst)
        return []

    monkeypatch.setattr(compressed_tensors, "write_compressed", write)
    command = ["export", REASONER, tmp_path / "out", "--to", "compressed-tensors", "--type", type, "-c", config]
    answer = CliRunner().invoke(app, [*map(str, command)])
    assert texts == [load_config(TINY).calibration] and answer.exit_code == 0
    size = (REASONER / "model.safetensors").stat().st_size
    assert "".join(answer.output.split()) == f"wrote{tmp_path / 'out'}:{size:,}bytes"
