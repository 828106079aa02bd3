"""What llama.cpp would compute otherwise than transformers: it fixes by architecture what a config.json may choose.

From llama.cpp's own code: src/models/<architecture>.cpp (sizes, windows, scales, activations, biases) and the
conversion/ folder of its converter (which fields of config.json reach the file), both read in November 2026.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EVERY = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WINDOWED_EVERYWHERE = ("mistral", "phi3")  # transformers gives every layer the sliding window that config.json names


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp fixes for one model_type."""

    activations: tuple[str, ...] = ("silu", "swish")
    biases: tuple[str, ...] = ()  # parts of a layer whose biases are added
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    any_head_dim: bool = True  # else it must be hidden_size / num_attention_heads
    tied: bool | None = None  # whether the output layer is the embeddings; none: either
    full_every: int = 0  # of so many layers the last has full attention, the others a window; 0: no windows at all
    rescaled_depth: int = 0  # the number of layers by which the size is known that scales attention in another way


LLAMA = Architecture(biases=EVERY, ropes=("default", "linear", "yarn", "llama3"))
GEMMA = {"activations": ("gelu_pytorch_tanh", "gelu_new"), "ropes": ("default", "linear"), "tied": True}
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(biases=QKV, any_head_dim=False),
    "qwen3": Architecture(),
    "gemma2": Architecture(**GEMMA, full_every=2, rescaled_depth=46),  # type: ignore[arg-type]
    "gemma3_text": Architecture(**GEMMA, full_every=6, rescaled_depth=62),  # type: ignore[arg-type]
    "phi3": Architecture(ropes=("default", "longrope"), any_head_dim=False),
    "olmo2": Architecture(any_head_dim=False, tied=False),
}


def differences(config: Mapping[str, Any], tied: bool, biases: Iterable[str]) -> list[str]:
    """Reasons why llama.cpp's answers would not be those of transformers; empty where they are the same.

    `config` is the content of config.json, `biases` the parts of a layer that have a bias in the weights.
    """
    from transformers import AutoConfig

    kind = ARCHITECTURES[config["model_type"]]
    fields = {name: value for name, value in config.items() if name != "model_type"}
    effective = AutoConfig.for_model(config["model_type"], **fields)  # with the defaults that config.json leaves out
    found = [
        *_class(config),
        *_windows(config, effective, kind),
        *_scale(effective, kind),
        *_caps(config["model_type"], effective),
        *_ropes(config["model_type"], effective, kind),
    ]
    activation = getattr(effective, "hidden_activation", None) or getattr(effective, "hidden_act", None)
    if activation not in kind.activations:
        found.append(f"the activation is {activation}, and it always takes {kind.activations[0]}")
    ignored = sorted(set(biases) - set(kind.biases))
    if ignored:
        found.append(f"it has no biases for {', '.join(ignored)} of this architecture")
    if kind.tied is not None and tied != kind.tied:
        found.append(f"tie_word_embeddings is {str(tied).lower()}, and it knows this architecture only the other way")
    usual = effective.hidden_size // effective.num_attention_heads
    if not kind.any_head_dim and _head_dim(effective) != usual:
        found.append(f"head_dim is {_head_dim(effective)}, and it takes hidden_size / num_attention_heads = {usual}")
    return found


def _class(config: Mapping[str, Any]) -> list[str]:
    """The converter goes by `architectures`, transformers by model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    name, named = NAMES[config["model_type"]], config.get("architectures")
    return (
        [] if named == [name] else [f'architectures is {named}, by which the converter chooses; set it to ["{name}"]']
    )


def _windows(config: Mapping[str, Any], effective: Any, kind: Architecture) -> list[str]:
    """Windows and their pattern follow from the architecture, not from the file."""
    window, depth, longest = (
        config.get("sliding_window"),
        effective.num_hidden_layers,
        effective.max_position_embeddings,
    )
    if kind.full_every:
        types = list(effective.layer_types)
        usual = [i % kind.full_every == kind.full_every - 1 for i in range(depth)]
        if [each == "full_attention" for each in types] != usual:
            return [
                "layer_types (which layers have sliding windows) is not its pattern, full attention in one of "
                f"{kind.full_every} layers, the last: removing layers shifts it, removing neurons does not"
            ]
        if getattr(effective, "use_bidirectional_attention", False) or effective.sliding_window is None:
            return ["sliding_window is null or attention looks ahead, which it does not know"]
        return []
    if config["model_type"] == "olmo2":  # transformers has no windows there, the converter writes what it finds
        return [f"sliding_window is {window}, which transformers ignores and it does not"] if window else []
    if config["model_type"] in WINDOWED_EVERYWHERE:
        window = effective.sliding_window
    elif "sliding_attention" in (getattr(effective, "layer_types", None) or ()):
        window = effective.sliding_window or window
    else:
        window = None
    if window and window < longest:
        return [
            f"sliding_window is {window}, and it gives every layer full attention (layer_types): answers differ from "
            f"token {window + 1} on; if yours are shorter, set max_position_embeddings={window} in a copy's config.json"
        ]
    return []


def _scale(effective: Any, kind: Architecture) -> list[str]:
    """Gemma's queries are scaled by a field that does not reach the file."""
    if not kind.rescaled_depth:
        return []
    rescaled = effective.num_hidden_layers == kind.rescaled_depth
    usual = effective.hidden_size // effective.num_attention_heads if rescaled else _head_dim(effective)
    if effective.query_pre_attn_scalar == usual:
        return []
    return [
        f"query_pre_attn_scalar is {effective.query_pre_attn_scalar}, and for {effective.num_hidden_layers} layers it "
        f"takes {usual}"
    ]


def _caps(model_type: str, effective: Any) -> list[str]:
    """Soft caps are always there in Gemma 2 and never in Gemma 3."""
    if not model_type.startswith("gemma"):
        return []
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    always = model_type == "gemma2"
    return [
        f"{name} is {getattr(effective, name, None)}, and it {'needs a number' if always else 'has none'}"
        for name in caps
        if bool(getattr(effective, name, None)) != always
    ]


def _ropes(model_type: str, effective: Any, kind: Architecture) -> list[str]:
    """The rotary embeddings that the converter writes, and what of their parameters it leaves out."""
    parameters = effective.rope_parameters
    full = parameters.get("full_attention", parameters)
    windowed = parameters.get("sliding_attention", {}).get("rope_type", "default")
    rope = full.get("rope_type", "default")
    found = []
    if rope not in kind.ropes or windowed != "default":
        found.append(f"rope_type is {rope}{f' and {windowed}' * (windowed != 'default')}, which is lost on the way")
    lost = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if full.get(name) is not None]
    lost += ["truncate"] * (full.get("truncate") is False)
    if model_type != "phi3" and full.get("partial_rotary_factor", 1.0) != 1.0:
        lost.append("partial_rotary_factor")
    return found + [f"rope_parameters has {name}, which is lost on the way" for name in lost]


def _head_dim(effective: Any) -> int:
    return int(getattr(effective, "head_dim", None) or effective.hidden_size // effective.num_attention_heads)
