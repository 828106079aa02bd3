"""Files of every type that llama.cpp's quantizer writes: read again, and what is stored otherwise is said."""

import numpy as np
import pytest
from gguf_files import VOCABULARY, llama_tokenizer, needs_llama_cpp
from tiny_models import build, save

from ptl.config.export import TYPES
from ptl.errors import InputError, WorkError
from ptl.export import gguf
from ptl.export.gguf import write_gguf
from ptl.model.llama_runtime import LlamaContext, LlamaModel, Part

pytestmark = [needs_llama_cpp, pytest.mark.usefixtures("converter_in_process")]
IDS = [1, 260, 261, 262, 270, 280, 265, 266]


def model_of(folder, **sizes):
    save(build("llama", vocab_size=VOCABULARY, initializer_range=0.1, pad_token_id=2, **sizes), folder, tokenizer=False)
    llama_tokenizer(folder)
    return folder


def logits(file):
    return LlamaContext(LlamaModel(file), 1, 32).append([Part(0, IDS, len(IDS))])


@pytest.fixture
def wide(tmp_path):
    """All rows are multiples of 256."""
    return model_of(tmp_path / "wide", hidden_size=256, intermediate_size=512, head_dim=64)


@pytest.fixture
def narrow(tmp_path):
    return model_of(tmp_path / "narrow", hidden_size=64, intermediate_size=192, head_dim=16)


@pytest.mark.parametrize("type", TYPES["gguf"])
def test_every_type_is_written_and_computes_nearly_the_same(type, wide, tmp_path):
    notes = write_gguf(wide, tmp_path / "exact.gguf", "f32") + write_gguf(wide, tmp_path / "model.gguf", type)
    assert notes == []
    correlation = np.corrcoef(logits(tmp_path / "exact.gguf").ravel(), logits(tmp_path / "model.gguf").ravel())[0, 1]
    assert correlation > (0.7 if type in gguf.FTYPES else 0.998)  # the weights are random
    smaller = (tmp_path / "model.gguf").stat().st_size < 0.6 * (tmp_path / "exact.gguf").stat().st_size
    assert smaller == (type != "f32")
    assert {path.name for path in tmp_path.iterdir()} == {"wide", "exact.gguf", "model.gguf"}


def test_the_types_of_the_config_are_those_that_can_be_written():
    assert {*TYPES["gguf"]} == {"f32", "f16", "bf16", *gguf.FTYPES}


def test_rows_that_are_no_multiple_of_256_are_named_with_what_is_stored(narrow, tmp_path):
    (note,) = write_gguf(narrow, tmp_path / "model.gguf", "q4_k_m")
    rows = "attn_k (64), attn_output (64), attn_q (64), attn_v (64), ffn_down (192), ffn_gate (64), ffn_up (64)"
    assert note.startswith(f"q4_k_m needs rows of a multiple of 256, and stores in a larger type: {rows}, ")
    assert note.endswith("; for ffn_down prune with prune.width_multiple: 256")
    assert write_gguf(narrow, tmp_path / "other.gguf", "q4_0") == []  # in blocks of 32


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_rows_that_are_no_multiple_of_32_stay_in_16_bits(type, tmp_path):
    folder = model_of(tmp_path / "model", hidden_size=64, intermediate_size=40, head_dim=16)
    (note,) = write_gguf(folder, tmp_path / "model.gguf", type)
    assert "of 32, and stores in a larger type: ffn_down (40); for ffn_down prune with prune.width_multiple: 32" in note


def test_a_quantizer_that_fails_is_reported_with_its_reason(tmp_path):
    (tmp_path / "whole.gguf").write_text("no GGUF file")
    with pytest.raises(WorkError, match=r"llama\.cpp could not quantize to q4_0 .*(magic|load)"):
        gguf._quantize(tmp_path / "whole.gguf", "q4_0")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_text("no GGUF file")
    with pytest.raises(InputError, match=r"llama\.cpp cannot read .*model.gguf .*; export the checkpoint again"):
        LlamaModel(tmp_path / "model.gguf")
