"""GPUs by their data sheets: memory, peak FLOP/s and bandwidth, and the names that the driver gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: bytes, dense FLOP/s in bf16 and in float32, bytes/s.

    float32 is without TF32, which torch does not use for matrix products unless it is told to.
    """

    memory: float
    bf16: float
    fp32: float
    bandwidth: float


GIB, TERA = 1 << 30, 1e12
# NVIDIA's data sheets; where they give bf16 with sparsity, half of that. Memory as sold: of cards whose ECC is kept in
# the memory itself the driver shows up to 6 % less, for which forecast.FULL leaves room.
GPUS = {
    "t4": Gpu(16 * GIB, 8.1 * TERA, 8.1 * TERA, 0.32 * TERA),  # Turing has no bf16; its 65 TFLOP/s are fp16
    "l4": Gpu(24 * GIB, 121 * TERA, 30.3 * TERA, 0.3 * TERA),
    "a10": Gpu(24 * GIB, 125 * TERA, 31.2 * TERA, 0.6 * TERA),
    "rtx4090": Gpu(24 * GIB, 165 * TERA, 82.6 * TERA, 1.008 * TERA),
    "a100-40": Gpu(40 * GIB, 312 * TERA, 19.5 * TERA, 1.555 * TERA),
    "l40s": Gpu(48 * GIB, 362 * TERA, 91.6 * TERA, 0.864 * TERA),
    "a100-80": Gpu(80 * GIB, 312 * TERA, 19.5 * TERA, 2.039 * TERA),  # SXM; the PCIe card has 1.935 TB/s
    "h100": Gpu(80 * GIB, 989 * TERA, 67 * TERA, 3.35 * TERA),  # SXM
    "h100-pcie": Gpu(80 * GIB, 756 * TERA, 51 * TERA, 2.0 * TERA),
    "h200": Gpu(141 * GIB, 989 * TERA, 67 * TERA, 4.8 * TERA),
    "b200": Gpu(180 * GIB, 2250 * TERA, 80 * TERA, 8.0 * TERA),  # HGX, 1,000 W
}

# The driver's name of a device -> its data sheet. A part of a GPU (MIG) and other cards are not here.
DRIVER_NAMES = {
    "Tesla T4": "t4",
    "NVIDIA L4": "l4",
    "NVIDIA A10": "a10",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
