"""This machine: which GPU it has, and what its CPU reaches, measured in about a second."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

from ptl.errors import InputError
from ptl.preflight.forecast_model import GIB, GPUS, NO_GPU, TERA, Gpu

# Words of CUDA's name of a card, by our kind; `h100-pcie` is before `h100`, whose word it has too.
CARDS = {
    "t4": {"t4"},
    "l4": {"l4"},
    "a10": {"a10"},
    "rtx4090": {"rtx", "4090"},
    "a100-40": {"a100", "40gb"},
    "a100-80": {"a100", "80gb"},
    "l40s": {"l40s"},
    "h100-pcie": {"h100", "pcie"},
    "h100": {"h100"},
    "h200": {"h200"},
    "b200": {"b200"},
}
MEASURED = 0.2  # seconds of each measurement
TOKENS = 512  # that go through a layer together
HEAD = 64  # numbers of an attention head
WIDEST = 2048  # hidden size of the layer that is measured: larger ones are hardly faster


def gpu() -> str:
    """The kind of this machine's GPU, or NO_GPU. Raises InputError that names --gpu for a card that is not known."""
    if find_spec("torch") is None:
        return NO_GPU
    import torch

    if not torch.cuda.is_available():
        return NO_GPU
    card = torch.cuda.get_device_name()
    kind = kind_of(card)
    if kind is None:
        gib = torch.cuda.get_device_properties(0).total_memory / GIB
        raise InputError(
            f"this machine's {card} ({gib:.0f} GiB) is not known",
            field="--gpu",
            remedy=f"name the kind that is most like it ({', '.join(GPUS)}), or none",
        )
    return kind


def kind_of(card: str) -> str | None:
    """The kind of a card by CUDA's name for it; None for one without a data sheet here."""
    words = set(re.split(r"[^a-z0-9]+", card.lower()))
    return next((kind for kind, named in CARDS.items() if named <= words), None)


@cache
def cpu(hidden: int, width: int) -> Gpu:
    """What this machine's CPU reaches in layers of such sizes, in the form of a GPU's data sheet."""
    import psutil
    import torch

    hidden, width = min(hidden, WIDEST), min(width, 4 * WIDEST)
    row = torch.ones(1, hidden)
    matrix = torch.full((hidden, width), 1e-3)
    return Gpu(
        gib=psutil.virtual_memory().total / GIB,
        bf16=_flops(hidden, width, torch.bfloat16) / TERA,
        fp32=_flops(hidden, width, torch.float32) / TERA,
        bandwidth=matrix.nbytes / _seconds(lambda: row @ matrix) / TERA,
        reached=1.0,
        decoded=1.0,
        # hardly a product: Python and torch's calls
        layer_seconds=_seconds(_layer(1, 8, 8, torch.float32)),
    )


def _flops(hidden: int, width: int, dtype: Any) -> float:
    """FLOP/s of a forward pass through a layer, by the products of its weights."""
    import torch

    weights = 4 * hidden * hidden + 3 * hidden * width
    layer = _layer(TOKENS, hidden, width, dtype)
    threads = torch.get_num_threads()
    # Threads of a small layer wait for each other, on a busy machine a hundred times as long as they compute.
    torch.set_num_threads(1)
    alone = _seconds(layer)
    torch.set_num_threads(threads)
    return 2 * TOKENS * weights / min(alone, _seconds(layer))


def _layer(tokens: int, hidden: int, width: int, dtype: Any) -> Callable[[], Any]:
    """A Llama's layer and a sequence that goes through it."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    heads = max(1, hidden // HEAD)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        head_dim=hidden // heads,
        num_hidden_layers=1,
        vocab_size=8,
    )
    model = LlamaModel(config).to(dtype)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    return lambda: model(ids)


def _seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of a piece of work: the fastest of several, as other work comes between."""
    import torch

    durations: list[float] = []
    with torch.inference_mode():
        work()  # the first one also takes memory
        while not durations or sum(durations) < MEASURED:
            begun = time.perf_counter()
            work()
            durations.append(time.perf_counter() - begun)
    return min(durations)
