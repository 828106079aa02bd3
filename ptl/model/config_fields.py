"""Fields of a config.json of which transformers builds a model that a step could not compute with."""

from __future__ import annotations

import math
from typing import Any

from ptl.model.checkpoint import checkpoint_error
from ptl.model.families import ConfigJson, Family

# Numbers above 0 in a config.json, which transformers takes whatever they are
POSITIVE = (
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range", "max_position_embeddings"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
MAX_LAYERS = 10_000  # a model beyond it is a typing error, and would take minutes to build
CORRECT = "correct it, or fetch the checkpoint again"


def check(config: ConfigJson, source: str) -> None:
    """Raise InputError for fields of a config.json that transformers would read otherwise, or not object to.

    `source` is the file, for the messages.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        remedy = "where the weights are float, remove that field, else dequantize the model and save it"
        if method == "mxfp4":  # gpt-oss
            remedy = (
                "load it by AutoModelForCausalLM.from_pretrained(..., quantization_config="
                "Mxfp4Config(dequantize=True)) of transformers, save that model and its tokenizer, and give that folder"
            )
        problem = f"{source} has a quantization_config ({method}), and only float weights can be pruned"
        raise checkpoint_error(problem, remedy)
    depth = config.get("num_hidden_layers", 1)
    if not isinstance(depth, int) or not 0 < depth <= MAX_LAYERS:
        problem = f"{source} has num_hidden_layers={depth!r}, which must be a whole number from 1 to {MAX_LAYERS:,}"
        raise checkpoint_error(problem, CORRECT)
    for field in POSITIVE:
        value = config.get(field)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise checkpoint_error(f"{source} has {field}={value!r}, which must be a number above 0", CORRECT)


def check_built(config: Any, family: Family, source: str) -> None:
    """Raise InputError for sizes in transformers' config of a model that it builds and cannot compute with."""
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    problem = ""
    if heads % key_value_heads:
        problem = f"num_attention_heads={heads}, no multiple of num_key_value_heads={key_value_heads}"
    elif family.experts:
        number = getattr(config, family.experts.counts[0])
        groups = getattr(config, "n_group", 1)
        if number % groups or number < fewest_experts(config):
            problem = f"{number} experts in each layer, of which num_experts_per_tok={config.num_experts_per_tok} "
            problem += f"cannot be chosen (n_group={groups}, topk_group={getattr(config, 'topk_group', 1)})"
    if problem:
        raise checkpoint_error(f"{source} has {problem}", CORRECT)


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
