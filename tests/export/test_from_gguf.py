"""examples/from_gguf.py: the way back from a GGUF file to a checkpoint."""

import sys

import pytest
import torch
from checkout import DENSE, EXAMPLE, ROOT
from gguf_files import needs_llama_cpp

from ptl.errors import InputError
from ptl.export.gguf import write_gguf
from ptl.model import pretrained

sys.path.insert(0, str(ROOT / "examples"))
import from_gguf

pytestmark = [needs_llama_cpp, pytest.mark.usefixtures("converter_in_process")]


@pytest.fixture(autouse=True)
def has_gguf(monkeypatch):
    """transformers asks for the package gguf, of which the converter brings a copy under another name."""
    from transformers import modeling_gguf_pytorch_utils as reader

    monkeypatch.setattr(reader, "is_gguf_available", lambda: True)


def test_the_checkpoint_is_the_one_that_the_file_was_made_of(tmp_path):
    write_gguf(DENSE, tmp_path / "model.gguf", "f32")
    from_gguf.convert(tmp_path / "model.gguf", tmp_path / "back", "float32")
    ours, its = pretrained.causal_lm(tmp_path / "back"), pretrained.causal_lm(DENSE)
    ids = torch.arange(20)[None]
    assert torch.allclose(ours(ids).logits, its(ids).logits, atol=1e-4)
    assert ours.config.tie_word_embeddings == its.config.tie_word_embeddings
    text = "Tom has 12 apples."
    assert (
        pretrained.tokenizer(tmp_path / "back")(text)["input_ids"]
        == pretrained.tokenizer(DENSE)(text)["input_ids"]
    )


@pytest.mark.parametrize(("noise", "is_tied"), [(0.05, True), (1.0, False)])
def test_a_head_is_tied_where_it_is_another_quantization_of_the_embedding(noise, is_tied, capsys):
    from gguf import GGMLQuantizationType as Type

    model = pretrained.causal_lm(DENSE, torch.float32)
    embedding = model.get_input_embeddings().weight
    torch.manual_seed(0)
    head = torch.nn.Parameter(embedding + noise * embedding.std() * torch.randn_like(embedding))
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = head
    from_gguf.tie_head(model, {"output.weight": Type.Q8_0, "token_embd.weight": Type.Q5_0})
    assert model.config.tie_word_embeddings == is_tied
    # The finer one of both
    assert (
        model.get_output_embeddings().weight is head
        and (model.get_input_embeddings().weight is head) == is_tied
    )
    assert f"differ by {100 * noise:.0f}" in capsys.readouterr().out


def test_another_tokenizer_than_that_of_the_file_is_refused(tmp_path, monkeypatch):
    write_gguf(DENSE, tmp_path / "model.gguf")
    other = pretrained.tokenizer(EXAMPLE / "thinker")
    monkeypatch.setattr(from_gguf.AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(InputError, match="different tokens"):
        from_gguf.convert(tmp_path / "model.gguf", tmp_path / "back")
    with pytest.raises(InputError, match="cannot read"):
        from_gguf.convert(EXAMPLE / "README.md", tmp_path / "back")
    assert not (tmp_path / "back").exists()
