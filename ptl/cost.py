"""What a model costs: parameters, bytes, FLOPs and KV-cache per token from its config, and its measured speed."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl import checkpoint, shapes
from ptl.anatomy import model_dimensions
from ptl.config import Speed
from ptl.families import family_of

PREFILL_SECONDS, PREFILL_PASSES = 0.1, 20  # a prompt is read that long in every repeat, but no more often than that


@dataclass(frozen=True)
class StaticCost:
    """Costs that follow from the shapes alone."""

    params: int  # tied tensors count once
    bytes: int  # of the weight files
    flops_per_token: int  # forward, products with the weights; attention adds `attention_flops` per token of context
    attention_flops: int  # per token of context
    kv_bytes_per_token: int  # of context; layers with a sliding window hold no more than their window
    widths: list[int]  # FFN width of each layer


def from_config(folder: Path) -> StaticCost:
    """Measure a checkpoint folder without loading its weights. Raises InputError as model_dimensions."""
    config = checkpoint.read_config(folder)
    family = family_of(config)
    sizes = shapes.sizes(config, family, f"{folder}/config.json")
    _, product_params = shapes.count(config, family, sizes)
    query_width = sizes.num_attention_heads * sizes.head_dim
    key_width = sizes.num_key_value_heads * sizes.head_dim
    cached_numbers = 2 * sizes.layers * key_width  # keys and values
    return StaticCost(
        params=model_dimensions(folder, family).params,
        bytes=sum(path.stat().st_size for path in checkpoint.shards(folder)),
        flops_per_token=2 * product_params,  # multiply and add
        attention_flops=4 * sizes.layers * query_width,  # the same for scores and for values
        kv_bytes_per_token=cached_numbers * checkpoint.itemsize(folder),
        widths=[sizes.width] * sizes.layers,
    )


def measure(models: Mapping[str, Any], settings: Speed, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Prefill and decode speed of models side by side: name -> one row for each batch size.

    Rows: batch, prefill_tokens_per_s, decode_tokens_per_s, prefill_s, decode_s, repeats. Tokens are counted over the
    whole batch. The models take turns in every repeat, so that a busy machine hits all alike; the median is reported.
    The prompts are random tokens, and generation goes on for exactly `new_tokens`. A short prompt is read several times
    in a repeat, since one pass of a small model is shorter than the system's own pauses. No repeats, no rows.
    """
    import torch

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for batch in settings.batch_sizes if settings.repeats else ():
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        passes = dict.fromkeys(models, 1)
        for repeat in range(settings.repeats + 1):
            for name, model in models.items():
                generator = torch.Generator().manual_seed(seed)
                prompt = torch.randint(
                    0, model.config.vocab_size, (batch, settings.prompt_tokens), generator=generator
                ).to(model.device)  # [batch, prompt_tokens]
                taken = _once(model, prompt, settings.new_tokens, passes[name])
                if repeat:
                    times[name].append(taken)
                else:  # the first one warms up
                    passes[name] = min(PREFILL_PASSES, 1 + int(PREFILL_SECONDS / max(taken[0], 1e-9)))
        for name, pairs in times.items():
            prefill, decode = (statistics.median(column) for column in zip(*pairs, strict=True))
            rows[name].append(
                {
                    "batch": batch,
                    "prefill_tokens_per_s": batch * settings.prompt_tokens / prefill,
                    "decode_tokens_per_s": batch * settings.new_tokens / decode,
                    "prefill_s": prefill,
                    "decode_s": decode,
                    "repeats": settings.repeats,
                }
            )
    return rows


def _once(model: Any, prompt: Any, new_tokens: int, passes: int) -> tuple[float, float]:
    """Seconds for the prompt, the mean of `passes`, and for `new_tokens` greedy steps after it with the KV cache."""
    import torch

    # transformers 5.24 renamed the argument; the old name goes in 5.40
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    wait: Callable[[], None] = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    with torch.inference_mode():
        wait()
        begin = time.perf_counter()
        for _ in range(passes):
            out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)  # [batch, 1]
        wait()
        filled = time.perf_counter()
        for _ in range(new_tokens):
            out = model(input_ids=token, use_cache=True, logits_to_keep=1, **{cache: out.past_key_values})
            token = out.logits[:, -1:].argmax(-1)
        wait()
        return (filled - begin) / passes, time.perf_counter() - filled
