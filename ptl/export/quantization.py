"""llama.cpp's own quantizer, and what it has stored in another type than the one that was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ptl.errors import WorkError
from ptl.model import llama_runtime

# By our names: the quantizer's number (llama_ftype), by its name in llama.h.
FTYPES = {
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q3_k_m": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
}
K_BLOCK = 256  # values of a row that a k-quant's scales belong to
BLOCK = 32  # of the others
FFN_DOWN = "ffn_down"  # whose rows are as long as the FFN is wide
LAYER = re.compile(r"^blk\.\d+\.|\.weight$")


def quantize(src: Path, dst: Path, type: str) -> None:
    """Write the GGUF file `src` of 16 or 32 bits in one of FTYPES. Raises WorkError where llama.cpp fails."""
    ffi, lib = llama_runtime.library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, FTYPES[type])
    params.nthread = llama_runtime.threads()
    if lib.llama_model_quantize(str(src).encode(), str(dst).encode(), ffi.addressof(params)):
        raise WorkError(f"llama.cpp could not quantize to {type} ({llama_runtime.last_warnings()})", field="export")


def notes(file: Path, type: str) -> list[str]:
    """One sentence for each length of rows because of which tensors are stored otherwise than `type` says."""
    if not type.startswith("q"):
        return []
    block = K_BLOCK if "_k" in type else BLOCK
    tensors: dict[int, dict[str, set[str]]] = {}  # names, by the length of rows and the type that is stored
    for name, row, stored in _matrices(file):
        if row % block:
            tensors.setdefault(row, {}).setdefault(stored, set()).add(name)
    return [_note(row, tensors[row], block, type) for row in sorted(tensors)]


def _matrices(file: Path) -> Iterator[tuple[str, int, str]]:
    """(name without the layer, length of its rows, type) of each weight that could have been quantized."""
    from gguf import GGUFReader

    for tensor in GGUFReader(file).tensors:
        # Norms and biases have one dimension, and a mixture's router stays as it is.
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name:
            yield LAYER.sub("", tensor.name), int(tensor.shape[0]), tensor.tensor_type.name


def _note(row: int, tensors: dict[str, set[str]], block: int, type: str) -> str:
    """The tensors whose rows have this length, by the type that is stored, and what could be done."""
    parts = [f"{', '.join(sorted(names))} as {stored}" for stored, names in sorted(tensors.items())]
    remedy = "the width of the FFN does not change that"
    if any(name.startswith(FFN_DOWN) for names in tensors.values() for name in names):
        remedy = f"prune with prune.width_multiple: {block}"
    return f"{type} needs rows of a multiple of {block}; of {row} are {', and '.join(parts)}: {remedy}"
