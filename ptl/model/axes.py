"""What each axis of a tensor counts, read from transformers' own model: the same config with one of its sizes doubled.

So no family names the tensors of its attention, its norms or its router.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError
from ptl.model import pretrained
from ptl.model.experts import stored_tensors
from ptl.model.families import ConfigJson, Family
from ptl.model.safetensors_io import Entries

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = "hidden"  # dimensions of the residual stream
NEURONS = "neurons"  # of each MLP, or of each expert; stacked projections are so many times as long
# KV heads, each with its query heads: a group has rows that follow each other
KV_HEADS = "kv_heads"
ROTARY = ("rope_parameters", "rope_scaling")  # fields of config.json
FUSED_QKV = "self_attn.qkv_proj"  # rows of queries, keys and values below each other

Axes = tuple[str | None, ...]  # of a tensor; None: what width does not change


def of_config(
    content: ConfigJson,
    family: Family,
    # of a checkpoint, to which its own names are given as well as those in memory
    names: Entries | None = None,
) -> dict[str, Axes]:
    """The axes of each tensor of a config.json's model. Raises InputError as `pretrained.skeleton_of_config`."""
    config = pretrained.config_with_defaults(content)
    # No tensor depends on how positions are encoded, and some configs accept their factors for one hidden size alone.
    plain = {field: value for field, value in content.items() if field not in ROTARY}
    plain["head_dim"] = head_size(config)
    # Heads are doubled in a wider model: transformers wants a hidden size that they divide.
    wide = {**plain, "hidden_size": 2 * config.hidden_size}
    heads = {
        "num_attention_heads": 2 * config.num_attention_heads,
        "num_key_value_heads": 2 * kv_heads(config),
    }
    units = sizes(config, family)
    neurons = {family.width_field: 2 * units[NEURONS]}

    def tensors(changed: ConfigJson) -> Mapping[str, Tensor]:
        found = pretrained.skeleton_of_config(changed, "config.json").state_dict()
        # The optimizer state has the names of transformers' memory.
        return found if names is None else {**found, **stored_tensors(found, family.experts, names)}

    single, double = tensors(plain), tensors(wide)
    pairs = {
        HIDDEN: (single, double),
        KV_HEADS: (double, tensors({**wide, **heads})),
        NEURONS: (single, tensors({**plain, **neurons})),
    }
    axes: dict[str, Axes] = {}
    for name, tensor in single.items():
        counted: list[str | None] = [None] * tensor.dim()
        for kind, (before, after) in pairs.items():
            for axis, (size, larger) in enumerate(
                zip(before[name].shape, after[name].shape, strict=True)
            ):
                if larger > size and tensor.shape[axis] % units[kind] == 0:
                    counted[axis] = kind
        axes[name] = tuple(counted)
    return axes


def sizes(config: Any, family: Family) -> dict[str, int]:
    """How many there are of each kind; `config` is that of transformers."""
    return {
        HIDDEN: config.hidden_size,
        NEURONS: getattr(config, family.width_field),
        KV_HEADS: kv_heads(config),
    }


def kv_heads(config: Any) -> int:
    """KV heads of each layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def fixed(of_names: Mapping[str, Axes], content: ConfigJson, config: Any) -> dict[str, str]:
    """Why hidden size ("hidden") or KV heads ("kv") cannot be pruned exactly; empty: they can.

    `content` is that of config.json, `config` what transformers makes of it.
    """
    reasons: dict[str, str] = {}
    if _ties_heads_to_hidden(content, config):
        reasons |= dict.fromkeys(
            ("hidden", "kv"), "its config accepts only heads of its hidden size / number of heads"
        )
    if not hasattr(config, "rms_norm_eps"):
        reasons["hidden"] = "its norms subtract a mean, which the dimensions that go are part of"
    for name, kinds in of_names.items():
        if ".self_attn." not in name:
            continue
        if kinds.count(HIDDEN) > 1 or (kinds == (HIDDEN,) and name.endswith("norm.weight")):
            reasons |= dict.fromkeys(
                ("hidden", "kv"), "its attention is as wide as its hidden size"
            )
        elif kinds == (KV_HEADS,) and name.endswith("norm.weight"):
            reasons["kv"] = "a norm is over all of its heads together"
    return reasons


def _ties_heads_to_hidden(content: ConfigJson, config: Any) -> bool:
    """Whether the config class refuses another hidden size beside the same head_dim (Phi-3's checks longrope by it)."""
    try:
        pretrained.skeleton_of_config(
            {**content, "head_dim": head_size(config), "hidden_size": 2 * config.hidden_size},
            "config.json",
        )
    except InputError:
        return True
    return False


def value_size(config: Any) -> int:
    """Numbers of what a head gives."""
    return int(getattr(config, "v_head_dim", head_size(config)))


def head_size(config: Any) -> int:
    """Numbers of a head's keys; `config` is that of transformers."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
