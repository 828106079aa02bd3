"""Checkpoints with quantized weights: what is refused before they are loaded. tests/export scores a real one."""

import json
import shutil
from pathlib import Path

import pytest

from ptl.config.run import Evaluate, Task
from ptl.errors import InputError
from ptl.evaluation import quantized
from ptl.evaluation.language_models import tensor_parallel
from ptl.evaluation.quantized import quantized_model

REASONER = Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint"
SETTINGS = Evaluate(tasks=[Task(name="gsm8k")])


def quantized_copy(folder):
    """The reasoner with the mark of a quantized checkpoint."""
    shutil.copytree(REASONER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    )
    return folder


def test_float_weights_are_not_scored_as_quantized_ones():
    with pytest.raises(
        InputError, match=r"^export: config.json in .* has no quantization_config of compressed-tensors"
    ):
        quantized_model(REASONER, SETTINGS)


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        InputError, match=r"package compressed-tensors is not installed.*pip install 'prune-tune-loop\[evaluate\]'"
    ):
        quantized_model(quantized_copy(tmp_path / "model"), SETTINGS)


def test_vllm_divides_quantized_weights_over_as_many_gpus(tmp_path):
    assert tensor_parallel(quantized_copy(tmp_path / "model"), 4) == tensor_parallel(REASONER, 4) == 4
