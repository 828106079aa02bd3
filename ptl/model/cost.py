"""What a model costs: parameters, bytes, FLOPs and KV-cache per token from its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptl.model import checkpoint, shapes
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of
from ptl.model.sizes import read_sizes


@dataclass(frozen=True)
class StaticCost:
    """Costs that follow from the shapes alone."""

    params: int  # tied tensors count once
    active_params: int  # that a token meets: without the experts that it is not sent to; all in a dense model
    bytes: int  # of the weight files
    flops_per_token: int  # forward, products with the weights; attention adds `attention_flops` per token of context
    attention_flops: int  # per token of context
    kv_bytes_per_token: int  # of context; layers with a sliding window hold no more than their window
    widths: list[int]  # FFN width of each layer, or of each of its experts
    experts: int  # in each layer; 0: a dense model


def from_config(folder: Path) -> StaticCost:
    """Measure a checkpoint folder without loading its weights. Raises InputError as model_dimensions."""
    config = checkpoint.read_config(folder)
    family = family_of(config)
    sizes = read_sizes(config, family, f"{folder}/config.json")
    _, product_params = shapes.count(config, family, sizes)
    layers = sizes.num_hidden_layers
    cached_numbers = layers * sizes.cached_numbers
    dimensions = model_dimensions(folder, family)
    return StaticCost(
        params=dimensions.params,
        active_params=dimensions.active_params,
        bytes=sum(path.stat().st_size for path in checkpoint.shards(folder)),
        flops_per_token=2 * product_params,  # multiply and add
        attention_flops=2 * layers * (sizes.query_width + sizes.value_width),  # for scores and for values
        kv_bytes_per_token=cached_numbers * checkpoint.itemsize(folder),
        widths=[
            sizes.dense_intermediate_size if layer in sizes.dense_layers else sizes.intermediate_size
            for layer in range(layers)
        ],
        experts=dimensions.experts,
    )
