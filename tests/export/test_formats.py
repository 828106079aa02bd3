"""What is said of a checkpoint before it is pruned."""

import json
import shutil
from pathlib import Path

import pytest
from gguf_files import needs_llama_cpp
from tiny_models import build, build_multimodal, save

from ptl.config.export import Export
from ptl.errors import InputError
from ptl.export.compressed_tensors import write_compressed
from ptl.export.formats import check_exports, check_tokenizer, layer_warnings
from ptl.export.gguf import write_gguf

TOKENIZER = Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint"
FORMS = [Export(format="gguf", type="q8_0"), Export(format="compressed-tensors", type="fp8")]


@pytest.mark.parametrize(
    ("variant", "target", "warned"),
    [("gpt_oss", "layers", True), ("gpt_oss", "experts", False), ("cohere2", "layers", False)],
)
def test_layers_that_vllm_would_mistake_for_others_are_warned_of(variant, target, warned, tmp_path):
    folder = save(build(variant), tmp_path / "model", tokenizer=False)
    warnings = layer_warnings(folder, [], target)
    assert len(warnings) == warned
    assert all(f"prune.target={target} may remove layers, and vLLM gives every other layer" in w for w in warnings)


@needs_llama_cpp
def test_of_a_multimodal_model_the_text_model_counts(tmp_path):
    """Its import takes that out; the files as they are cannot be written."""
    folder = save(build_multimodal("gemma3", "gemma3_text"), tmp_path / "model", tokenizer=False)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    with pytest.raises(InputError, match="layer_types"):
        check_exports(folder, FORMS)
    check_exports(folder, FORMS[1:])
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 256  # the random model has fewer tokens than any tokenizer
    (folder / "config.json").write_text(json.dumps(config))
    check_tokenizer(folder, FORMS)
    for write in (write_gguf, write_compressed):
        with pytest.raises(InputError, match="run `ptl import-model`, which saves its text model"):
            write(folder, tmp_path / "out", "fp8" if write is write_compressed else "q8_0")
