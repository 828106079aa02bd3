"""What a model costs: parameters, bytes, FLOPs and KV-cache per token from its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptl import checkpoint, shapes
from ptl.anatomy import model_dimensions
from ptl.families import family_of


@dataclass(frozen=True)
class Static:
    """Costs that follow from the shapes alone."""

    params: int  # tied tensors count once
    bytes: int  # of the weight files
    flops_per_token: int  # forward, products with the weights; attention adds `attention_flops` per token of context
    attention_flops: int  # per token of context
    kv_bytes_per_token: int  # of context; layers with a sliding window hold no more than their window
    widths: list[int]  # FFN width of each layer


def from_config(folder: Path) -> Static:
    """Measure a checkpoint folder without loading its weights. Raises InputError as model_dimensions."""
    config = checkpoint.read_config(folder)
    family = family_of(config)
    params = model_dimensions(folder, family).params
    sizes = shapes.sizes(config, family, folder / "config.json")
    heads_width = sizes.num_attention_heads * sizes.head_dim
    return Static(
        params=params,
        bytes=sum(path.stat().st_size for path in checkpoint.shards(folder)),
        flops_per_token=2 * shapes.count(config, family, sizes)[1],
        attention_flops=4 * sizes.layers * heads_width,
        kv_bytes_per_token=2 * sizes.layers * sizes.num_key_value_heads * sizes.head_dim * checkpoint.itemsize(folder),
        widths=[sizes.width] * sizes.layers,
    )
