"""Pruned and quantized checkpoints in vLLM itself, on the CPU: it computes what transformers does.

Skipped without `make vllm`. All models are answered for by one process, because vLLM takes long to import.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from test_gguf import cut_model, narrow_model
from tiny_models import MOE_VARIANTS, YARN, word_calibration
from transformers import AutoModelForCausalLM

from ptl import extras
from ptl.errors import InputError
from ptl.export.compressed_tensors import write as write_compressed
from ptl.export.formats import SQUARE_IN_VLLM
from ptl.model.families import FAMILIES

PYTHON = Path(os.environ.get("PTL_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.usefixtures("loads"),
]

TOKENS, NEW_TOKENS = [1, 60, 61, 5, 9, 77, 100, 12], 6
# the smallest heads that vLLM's attention takes on a CPU
HEADS = {"hidden_size": 128, "head_dim": 32}
GPT_OSS_YARN = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
# By variant: in place of what vLLM does not read, or reads otherwise (docs/exports.md has the list)
CHANGES = {
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.0}},
    "ernie4_5": {"use_bias": False},
    "cohere2": {"sliding_window": 32},
    "qwen2_moe": {"use_sliding_window": False},
    "qwen2_moe-dense": {"qkv_bias": True},
    "olmoe": {"attention_bias": False, "clip_qkv": None},
    "gpt_oss": {"sliding_window": 32, "rope_parameters": GPT_OSS_YARN},
}
# vLLM's transformers (5.19) does not have the first; its latent attention for CPUs gives other numbers unpruned too
LEFT_OUT = {"internlm3", "deepseek_v3"}
VARIANTS = [
    *(name for name, family in FAMILIES.items() if not family.experts),
    "llama-tied",
    *MOE_VARIANTS,
]
VARIANTS = [name for name in VARIANTS if name not in LEFT_OUT]


@pytest.fixture(scope="module")
def loads():
    """vLLM of PYTHON."""
    command = (str(PYTHON), "-c", "from vllm import LLM")
    try:
        extras.check_loads("vLLM", command, field="PTL_VLLM_PYTHON", remedy="make vllm")
    except InputError as error:
        pytest.skip(f"skipped: {error}")


def answered(folders, tmp_path, dtype="float32"):
    """By name what vLLM says of checkpoints."""
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    models = {name: {"folder": str(folder), "dtype": dtype} for name, folder in folders.items()}
    request.write_text(json.dumps({"tokens": TOKENS, "new_tokens": NEW_TOKENS, "models": models}))
    script = Path(__file__).parents[1] / "vllm_answers.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [PYTHON, script, request, answer], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(answer.read_text())


def expected(folder):
    """The log probabilities and the greedy tokens of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([TOKENS])
    options = {
        "attention_mask": torch.ones_like(tokens),
        "max_length": len(TOKENS) + NEW_TOKENS,
        "do_sample": False,
    }
    with torch.inference_mode():
        logprobs = model(tokens).logits.log_softmax(-1)[0, :-1]  # [T - 1, V]
        generated = model.generate(tokens, **options, eos_token_id=None, use_cache=True)
    of_tokens = logprobs.gather(-1, tokens[0, 1:, None])[:, 0]  # [T - 1]
    return {"logprobs": of_tokens.tolist(), "generated": generated[0, len(TOKENS) :].tolist()}


@pytest.fixture(scope="module")
def pruned(loads, tmp_path_factory):
    """By variant: the pruned checkpoint's folder, and what vLLM says of it. One layer of four is removed too.

    And of another with hidden size and KV heads pruned.
    """
    root = tmp_path_factory.mktemp("vllm")
    changes = {name: HEADS | CHANGES.get(name, {}) for name in VARIANTS}
    folders = {name: cut_model(name, root / name, **changes[name]) for name in VARIANTS}
    for name in VARIANTS:
        folders[f"narrow {name}"] = narrow_model(
            name, root / f"narrow-{name}", 96, **changes[name]
        )[1]
    found = answered(folders, root)
    return {name: (folders[name], found[name]) for name in folders}


@pytest.mark.parametrize("variant", [*VARIANTS, *(f"narrow {name}" for name in VARIANTS)])
def test_vllm_computes_what_transformers_does_of_a_pruned_checkpoint(variant, pruned):
    folder, found = pruned[variant]
    wanted = expected(folder)
    if variant.startswith("narrow") and variant.split()[1].partition("-")[0] in SQUARE_IN_VLLM:
        assert "error" in found or found["logprobs"] != pytest.approx(wanted["logprobs"], abs=1e-2)
        return
    assert "error" not in found, found
    assert found["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-4, rel=1e-4)
    assert found["generated"] == wanted["generated"]


@pytest.mark.usefixtures("llmcompressor")
@pytest.mark.parametrize("type", ["fp8", "int8", "w4a16"])
def test_vllm_computes_what_transformers_does_of_quantized_weights(type, tmp_path):
    # which the kernel for 4 bits does not have
    dtype = "bfloat16" if type == "w4a16" else "float32"
    source = cut_model("llama", tmp_path, **HEADS)
    write_compressed(source, tmp_path / "out", type, word_calibration(tmp_path))
    [found] = answered({type: tmp_path / "out"}, tmp_path, dtype).values()
    assert "error" not in found, found
    assert found["logprobs"] == pytest.approx(expected(tmp_path / "out")["logprobs"], abs=0.1)
