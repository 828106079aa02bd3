"""GPUs by their data sheets (memory, peak FLOP/s, bandwidth), and those of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from itertools import takewhile

from ptl import cuda

GIB, TERA = 1 << 30, 1e12


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet. float32 is without TF32, which torch uses for matrix products only where it is set."""

    memory: float  # bytes
    bf16: float  # dense FLOP/s
    fp32: float  # the same in float32
    bandwidth: float  # bytes/s of the memory


def _gpu(memory: float, bf16: float, fp32: float, bandwidth: float) -> Gpu:
    """From GiB, TFLOP/s and TB/s, as the sheets have them."""
    return Gpu(
        memory * GIB,
        bf16 * TERA,
        fp32 * TERA,
        bandwidth * TERA,
    )


# NVIDIA's data sheets; where they give bf16 with sparsity, half of that. Memory as sold: of cards whose ECC is kept in
# the memory itself the driver shows up to 6 % less, for which forecast.FULL leaves room.
GPUS = {
    # kind: memory, bf16, float32, bandwidth
    "t4": _gpu(16, 8.1, 8.1, 0.32),  # Turing has no bf16; its 65 TFLOP/s are fp16
    "l4": _gpu(24, 121, 30.3, 0.3),
    "a10": _gpu(24, 125, 31.2, 0.6),
    "rtx4090": _gpu(24, 165, 82.6, 1.008),
    "a100-40": _gpu(40, 312, 19.5, 1.555),
    "l40s": _gpu(48, 362, 91.6, 0.864),
    "a100-80": _gpu(80, 312, 19.5, 2.039),  # SXM; the PCIe card has 1.935 TB/s
    "h100": _gpu(80, 989, 67, 3.35),  # SXM
    "h100-pcie": _gpu(80, 756, 51, 2.0),
    "h200": _gpu(141, 989, 67, 4.8),
    "b200": _gpu(180, 2250, 80, 8.0),  # HGX, 1,000 W
}


def visible() -> int:
    """How many GPUs of this machine a process may use; without torch, whose import takes seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    # One line for each GPU, and an indented one for each part of a GPU (MIG).
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    devices = cuda.listed(os.environ)
    if devices is None:
        return count
    # A number that no GPU has ends the list; UUIDs of parts of a GPU (MIG) are not in the count.
    numbers = {str(number) for number in range(count)}
    existing = takewhile(lambda device: device in numbers or not device.isdecimal(), devices)
    return len(set(existing)) if count else 0
