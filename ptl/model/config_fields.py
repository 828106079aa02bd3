"""Fields of a config.json that shape no tensor, checked: transformers would fail on them only later. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ptl.model.checkpoint import DTYPES, checkpoint_error
from ptl.model.families import ConfigJson, Family

CORRECT = "correct it, or fetch the checkpoint again"
LAYER_TYPES = ("full_attention", "sliding_attention")
# Config lists with one entry for each layer, and the entries that they may have
PER_LAYER = {
    "layer_types": LAYER_TYPES,
    "no_rope_layers": (0, 1),  # 0: without rotary embeddings
}
# Names that transformers gives to activations without weights of their own (tests/model/test_shapes.py compares)
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu"),
    *("silu", "swish", "relu", "relu2", "relu6", "leaky_relu", "mish", "laplace", "hardswish"),
    *("sigmoid", "tanh", "linear"),
)
Fields = tuple[str, ...]  # of config.json
# Kinds of rotary embeddings and the parameters that each needs
ROPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),  # an old name of longrope
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def check(config: ConfigJson, family: Family, layers: int, vocabulary: int, source: str) -> None:
    """Raise InputError that names a field, its value and what is possible. `source` is the file, for the messages."""
    _check_layer_types(config, family, layers, source)
    _check_optional_fields(config, source)
    _check_padding(config, vocabulary, source)
    _check_rope(config, source)


def longrope_limit(config: ConfigJson) -> int | None:
    """Tokens up to which longrope has its short factors; none for other rotary embeddings."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = config.get(field) or {}
        if parameters.get("rope_type", parameters.get("type")) in ("longrope", "su"):
            key = "original_max_position_embeddings"
            return parameters.get(key) or config.get(key)
    return None


def check_not_quantized(config: ConfigJson, source: str) -> None:
    """transformers would load something else than the weights that are there."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    remedy = "where the weights are float, remove that field, else dequantize the model and save it"
    if method == "mxfp4":  # gpt-oss
        remedy = (
            "load it by AutoModelForCausalLM.from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)) "
            "of transformers, save that model and its tokenizer, and give that folder"
        )
    raise checkpoint_error(
        f"{source} has a quantization_config ({method}), and only float weights can be pruned",
        remedy,
    )


def _check_layer_types(config: ConfigJson, family: Family, layers: int, source: str) -> None:
    """Lists with one entry per layer are as long as the model is deep, and have entries that are known."""
    for field in family.per_layer_fields:
        entries: Any = config.get(field)
        possible = PER_LAYER[field]
        complete = isinstance(entries, list) and len(entries) == layers
        if entries is not None and not (complete and all(map(possible.__contains__, entries))):
            known = ", ".join(map(str, possible))
            raise checkpoint_error(
                f"{source} must have {layers} entries in {field}, one for each layer, each of {known}",
            )


def _is_number(value: Any) -> bool:
    # Exact types: true is an int in Python.
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


# Optional fields of config.json, which values they may have beside null, and the same in words
OPTIONAL_FIELDS: tuple[tuple[Fields, Callable[[Any], bool], str], ...] = (
    (
        (
            *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range"),
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        ),
        _is_positive,
        "a number above 0",
    ),
    (
        ("max_position_embeddings", "sliding_window"),
        lambda value: isinstance(value, int) and _is_positive(value),
        "a whole number above 0",
    ),
    (
        (
            *("tie_word_embeddings", "use_cache", "use_sliding_window", "norm_topk_prob", "output_router_logits"),
            *("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "qkv_bias", "bias"),
        ),
        lambda value: isinstance(value, bool),
        "true or false",
    ),
    (
        ("attention_dropout",),
        lambda value: _is_number(value) and 0 <= value < 1,
        "from 0 to below 1",
    ),
    (
        ("dtype", "torch_dtype"),
        lambda value: isinstance(value, str) and value in DTYPES,
        "one of " + ", ".join(DTYPES),
    ),
    (
        ("hidden_act", "hidden_activation"),
        ACTIVATIONS.__contains__,
        "known to transformers: one of " + ", ".join(ACTIVATIONS),
    ),
)


def _check_optional_fields(config: ConfigJson, source: str) -> None:
    """transformers would fail on these only when it builds or runs the model."""
    for fields, is_possible, possible in OPTIONAL_FIELDS:
        for field in fields:
            value = config.get(field)
            # Qwen 2's mixtures have 0 for a window that is switched off.
            unused = field == "sliding_window" and config.get("use_sliding_window") is False
            if value is not None and not unused and not is_possible(value):
                raise checkpoint_error(f"{source} has {field}={value!r}, which must be {possible}", CORRECT)


def _check_padding(config: ConfigJson, vocabulary: int, source: str) -> None:
    """The padding token is an index into the embeddings, which counts from the end where it is negative."""
    value = config.get("pad_token_id")
    if value is not None and not (isinstance(value, int) and -vocabulary <= value < vocabulary):
        raise checkpoint_error(
            f"{source} has pad_token_id={value!r}, which is not one of the {vocabulary} tokens of vocab_size",
            "set it to one of them, or to null",
        )


def _check_rope(config: ConfigJson, source: str) -> None:
    """Rotary embeddings of a known kind with the parameters that it needs, for all layers or by kind of attention."""
    for field in ("rope_parameters", "rope_scaling"):
        value: Any = config.get(field)
        # Gemma 3 rotates by other parameters where attention has a window.
        layer_types = [name for name in LAYER_TYPES if name in value] if isinstance(value, dict) else []
        for layer_type in layer_types:
            _check_rope_parameters(f"{field}.{layer_type}", value[layer_type], source)
        if value is not None and not layer_types:
            _check_rope_parameters(field, value, source)


def _check_rope_parameters(name: str, parameters: Any, source: str) -> None:
    """`name` is that of the field, for the messages."""
    if not isinstance(parameters, dict):
        raise checkpoint_error(f"{source} has {name}={parameters!r}, which must be a JSON object", CORRECT)
    # Older files call it `type`.
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        known = ", ".join(ROPES)
        raise checkpoint_error(
            f"{source} has {name}.rope_type={kind!r}, which is not known",
            f"it must be one of {known}",
        )
    for field in ROPES[kind]:
        value: Any = parameters.get(field)
        # longrope has a factor for each rotated pair
        is_list = isinstance(value, list) and field in ROPES["longrope"]
        if not all(map(_is_positive, value if is_list else [value])):
            raise checkpoint_error(
                f"{source} has {name}.{field}={value!r}, "
                f"and rope_type={kind} needs a number above 0 there, "
                "or a list of them for short_factor and long_factor",
                CORRECT,
            )
