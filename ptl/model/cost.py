"""What a checkpoint costs: parameters, bytes, FLOPs and KV cache per token, from its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptl.model import checkpoint, shapes
from ptl.model.dimensions import dimensions_of
from ptl.model.families import family_of


@dataclass(frozen=True)
class StaticCost:
    """What a checkpoint costs, as far as its shapes say it."""

    params: int  # tied tensors count once
    active_params: int  # that a token meets: without the experts that it is not sent to; all in a dense model
    bytes: int  # of the weight files
    flops_per_token: int  # forward, products with the weights; attention adds `attention_flops` per token of context
    attention_flops: int  # per token of context
    kv_bytes_per_token: int  # of context; layers with a sliding window hold no more than their window
    widths: list[int]  # FFN width of each layer, or of each of its experts
    experts: int  # in each layer; 0: a dense model


def from_config(folder: Path) -> StaticCost:
    """Measure a checkpoint folder without loading its weights. Raises InputError as `shapes.of_checkpoint`."""
    model = shapes.of_checkpoint(folder, family_of(checkpoint.read_config(folder)))
    dimensions = dimensions_of(model)
    dense_width = getattr(model.config, "intermediate_size", 0)
    return StaticCost(
        params=dimensions.params,
        active_params=dimensions.active_params,
        bytes=sum(path.stat().st_size for path in checkpoint.shards(folder)),
        flops_per_token=2 * model.matrix_params,  # multiply and add
        attention_flops=2 * model.attention_width,  # for scores and for values
        kv_bytes_per_token=model.cached_numbers * checkpoint.itemsize(folder),
        widths=[
            dense_width if layer in dimensions.dense_layers else dimensions.width for layer in range(dimensions.layers)
        ],
        experts=dimensions.experts,
    )
