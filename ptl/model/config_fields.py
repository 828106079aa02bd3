"""Fields of a config.json that transformers reads otherwise than a step needs it."""

from __future__ import annotations

import math
from typing import Any

from ptl.model.checkpoint import checkpoint_error
from ptl.model.experts import Experts
from ptl.model.families import ConfigJson

MAX_LAYERS = 10_000  # a model beyond it is a typing error, and would take minutes to build


def check(config: ConfigJson, source: str) -> None:
    """Raise InputError for fields of a config.json that transformers would read otherwise, or not object to.

    `source` is the file, for the messages.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise checkpoint_error(
            f"{source} has a quantization_config ({method}), and only float weights can be pruned",
            "where the weights are float, remove that field, else load the model dequantized and save it (mxfp4: "
            "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)))",
        )
    depth = config.get("num_hidden_layers", 1)
    if not isinstance(depth, int) or not 0 < depth <= MAX_LAYERS:
        problem = f"{source} has num_hidden_layers={depth!r}, which must be a whole number from 1 to {MAX_LAYERS:,}"
        raise checkpoint_error(problem, "correct it, or fetch the checkpoint again")


def check_experts(config: Any, experts: Experts, source: str) -> None:
    """Raise InputError where a token cannot be sent to as many experts as transformers' config says."""
    number = getattr(config, experts.counts[0])
    groups = getattr(config, "n_group", 1)
    if number % groups or number < fewest_experts(config):
        raise checkpoint_error(
            f"{source} has {number} experts in each layer, of which num_experts_per_tok={config.num_experts_per_tok} "
            f"cannot be chosen (n_group={groups}, topk_group={getattr(config, 'topk_group', 1)})"
        )


def fewest_experts(config: Any) -> int:
    """The fewest experts that a layer of a mixture can have: a token finds all its own in the groups that are chosen.

    `config` is that of transformers.
    """
    groups: int = getattr(config, "n_group", 1)
    of_group = math.ceil(config.num_experts_per_tok / getattr(config, "topk_group", 1))
    # By its two best experts a group is chosen.
    return groups * (max(2, of_group) if groups > 1 else of_group)


def longrope_limit(config: ConfigJson) -> int | None:
    """Tokens up to which longrope has its short factors; none for other rotary embeddings."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = config.get(field)
        if isinstance(parameters, dict) and parameters.get("rope_type", parameters.get("type")) in ("longrope", "su"):
            key = "original_max_position_embeddings"
            return parameters.get(key) or config.get(key)
    return None
