"""What a config.json promises: its fields are checked, and the shape of each tensor follows from them. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.checkpoint import DTYPES
from ptl.errors import InputError
from ptl.families import Family

LARGEST = 1 << 31  # of a size; a model beyond it is a typing error
MOST_LAYERS = 10_000
WHOLE = ("max_position_embeddings", "sliding_window")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "use_sliding_window")
POSITIVE = (
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
LAYER_TYPES = ("full_attention", "sliding_attention")
# Names that transformers gives to activations without weights of their own (tests/test_shapes.py compares)
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu"),
    *("silu", "swish", "relu", "relu2", "relu6", "leaky_relu", "mish", "laplace", "hardswish"),
    *("sigmoid", "tanh", "linear"),
)
# Kinds of rotary embeddings and the parameters that each needs
ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),  # an old name of longrope
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes by which tensors are shaped."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    width: int
    layers: int
    vocab_size: int


def sizes(config: Mapping[str, Any], family: Family, where: Path | str) -> Sizes:
    """Check a config and read its sizes. Raises InputError that names the field, its value and what is possible.

    `where` is the file, for the messages. What config.json leaves out has the default that transformers gives it.
    """
    _check_loading(config, where)
    hidden, heads = (_size(config, family, field, where) for field in ("hidden_size", "num_attention_heads"))
    derived = {"num_key_value_heads": heads, "head_dim": hidden // heads}
    kv_heads, head_dim = (_size(config, family, field, where, derived[field]) for field in derived)
    found = Sizes(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        width=_size(config, family, family.width_field, where),
        layers=_size(config, family, family.depth_field, where, most=MOST_LAYERS),
        vocab_size=_size(config, family, "vocab_size", where),
    )
    for part, whole in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
        if getattr(found, whole) % getattr(found, part):
            values = f"{whole}={getattr(found, whole)} is no multiple of {part}={getattr(found, part)}"
            raise InputError(f"model.path: in {where} {values}; fetch the checkpoint again")
    if head_dim % 2:
        raise InputError(f"model.path: {where} gives the odd head_dim={head_dim}; fetch the checkpoint again")
    _check_types(config, family, found.layers, where)
    _check_numbers(config, where)
    _check_padding(config, found.vocab_size, where)
    _check_activation(config, where)
    _check_rope(config, where)
    return found


def expected(part: str, family: Family, found: Sizes) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The shape of a tensor's weight, and the config's fields that it follows from.

    `part` is a family's part of a layer, or `embed_tokens`, `lm_head` or `norm`.
    """
    hidden, head = found.hidden_size, found.head_dim
    queries, keys = found.num_attention_heads * head, found.num_key_value_heads * head
    name = part.rpartition(".")[2]
    query_fields, key_fields = ("num_attention_heads", "head_dim"), ("num_key_value_heads", "head_dim")
    if part in family.rows:
        return (family.blocks * found.width, hidden), (family.width_field, "hidden_size")
    if part == family.columns:
        return (hidden, found.width), (family.width_field, "hidden_size")
    shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "q_proj": ((queries, hidden), (*query_fields, "hidden_size")),
        "k_proj": ((keys, hidden), (*key_fields, "hidden_size")),
        "v_proj": ((keys, hidden), (*key_fields, "hidden_size")),
        "qkv_proj": ((queries + 2 * keys, hidden), (*query_fields, "num_key_value_heads", "hidden_size")),
        "o_proj": ((hidden, queries), (*query_fields, "hidden_size")),
        "q_norm": ((head,), ("head_dim",)) if family.norm_per_head else ((queries,), query_fields),
        "k_norm": ((head,), ("head_dim",)) if family.norm_per_head else ((keys,), key_fields),
        "embed_tokens": ((found.vocab_size, hidden), ("vocab_size", "hidden_size")),
        "lm_head": ((found.vocab_size, hidden), ("vocab_size", "hidden_size")),
    }
    return shapes.get(name, ((hidden,), ("hidden_size",)))


def count(config: Mapping[str, Any], family: Family, found: Sizes) -> tuple[int, int]:
    """Parameters of the model, and those among them that stand in products with a token: the output layer's too."""
    layer = {part: expected(part, family, found)[0] for part in family.parts}
    products = found.layers * sum(math.prod(shape) for shape in layer.values() if len(shape) > 1)
    vectors = found.layers * sum(shape[0] for shape in layer.values() if len(shape) == 1) + found.hidden_size
    vectors += found.layers * sum(layer[part][0] for part in family.biased(config))
    embeddings = found.vocab_size * found.hidden_size
    outer = embeddings if family.is_tied(config) else 2 * embeddings
    return products + vectors + outer, products + embeddings


def _check_loading(config: Mapping[str, Any], where: Path | str) -> None:
    """Fields that make transformers load something else than the weights that are there."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"model.path: {where} has a quantization_config ({method}), and only float weights can be pruned: "
            "where the weights are float, remove that field, else dequantize the model and save it"
        )


def _size(
    config: Mapping[str, Any],
    family: Family,
    field: str,
    where: Path | str,
    derived: int | None = None,
    most: int = LARGEST,
) -> int:
    """A positive whole number of the config; the family's default where it is missing, `derived` where it is null."""
    value = config.get(field, dict(family.defaults).get(field))
    value = derived if value is None else value
    if value is None:
        raise InputError(f"model.path: {where} lacks {field}; fetch the checkpoint again")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise InputError(
            f"model.path: {where} has {field}={value!r}, which must be a whole number from 1 to {most:,}; fetch the "
            "checkpoint again"
        )
    return value


def _check_types(config: Mapping[str, Any], family: Family, layers: int, where: Path | str) -> None:
    """Lists with one entry per layer are as long as the model is deep, and have entries that are known."""
    for field in family.per_layer_fields:
        types = config.get(field)
        if types is None:
            continue
        if not isinstance(types, list) or len(types) != layers or not all(each in LAYER_TYPES for each in types):
            raise InputError(
                f"model.path: {where} must have {layers} entries in {field}, one for each layer, each of "
                f"{', '.join(LAYER_TYPES)}; fetch the checkpoint again"
            )


def _check_numbers(config: Mapping[str, Any], where: Path | str) -> None:
    for field in POSITIVE:
        value = config.get(field)
        if value is not None and not (_is_number(value) and value > 0):
            raise InputError(f"model.path: {where} has {field}={value!r}, which must be a number above 0")
    for field in WHOLE:
        value = config.get(field)
        if value is not None and not (_is_number(value) and isinstance(value, int) and value > 0):
            raise InputError(f"model.path: {where} has {field}={value!r}, which must be a whole number above 0")
    for field in SWITCHES:
        if not isinstance(config.get(field), bool | None):  # null where a family does not have the field
            raise InputError(f"model.path: {where} has {field}={config[field]!r}, which must be true or false")
    dropout = config.get("attention_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        raise InputError(f"model.path: {where} has attention_dropout={dropout!r}, which must be from 0 to below 1")
    for field in ("dtype", "torch_dtype"):
        value = config.get(field)
        if value is not None and (not isinstance(value, str) or value not in DTYPES):
            raise InputError(f"model.path: {where} has {field}={value!r}, which must be one of {', '.join(DTYPES)}")


def _check_padding(config: Mapping[str, Any], vocabulary: int, where: Path | str) -> None:
    """The embeddings are made with the padding token's number, which counts from the end where it is negative."""
    value = config.get("pad_token_id")
    if value is not None and not (isinstance(value, int) and -vocabulary <= value < vocabulary):
        raise InputError(
            f"model.path: {where} has pad_token_id={value!r}, which is no token of the {vocabulary} in vocab_size; set "
            "it to one, or to null"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_activation(config: Mapping[str, Any], where: Path | str) -> None:
    for field in ("hidden_act", "hidden_activation"):
        value = config.get(field)
        if value is not None and value not in ACTIVATIONS:
            raise InputError(
                f"model.path: {where} has {field}={value!r}, which transformers does not know; it must be one of "
                f"{', '.join(ACTIVATIONS)}"
            )


def _check_rope(config: Mapping[str, Any], where: Path | str) -> None:
    """Rotary embeddings of a known kind with the parameters that it needs, for all layers or by kind of attention."""
    for field in ("rope_parameters", "rope_scaling"):
        value = config.get(field)
        if value is None:
            continue
        named = {field: value}
        if isinstance(value, dict) and any(kind in value for kind in LAYER_TYPES):
            named = {f"{field}.{kind}": inner for kind, inner in value.items() if kind in LAYER_TYPES}
        for name, parameters in named.items():
            if not isinstance(parameters, dict):
                raise InputError(f"model.path: {where} has {name}={parameters!r}, which must be a JSON object")
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if not isinstance(kind, str) or kind not in ROPES:
                raise InputError(
                    f"model.path: {where} has {name}.rope_type={kind!r}, which is not known; it must be one of "
                    f"{', '.join(ROPES)}"
                )
            for needed in ROPES[kind]:
                values = parameters.get(needed)
                values = values if isinstance(values, list) and needed in ROPES["longrope"] else [values]
                if not all(_is_number(each) and each > 0 for each in values):
                    raise InputError(
                        f"model.path: {where} has {name}.{needed}={parameters.get(needed)!r}, and rope_type={kind} "
                        "needs a number there above 0, or a list of them for short_factor and long_factor"
                    )
