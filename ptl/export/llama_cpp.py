"""Where llama.cpp and transformers would differ: llama.cpp fixes by architecture what a config.json may choose.

From llama.cpp's own code: src/models/<architecture>.cpp (sizes, windows, scales, activations, biases) and the
conversion/ folder of its converter (which fields of config.json reach the file), both read in November 2026.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptl.model import pretrained, text_tower
from ptl.model.config_fields import longrope_limit
from ptl.model.families import MLP, QKV, QKVO, ConfigJson

# transformers gives every layer the sliding window that config.json names
WINDOWED_EVERYWHERE = ("mistral", "ministral3", "phi3", "mixtral", "qwen3_moe")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp fixes for one model_type."""

    activations: tuple[str, ...] = ("silu", "swish")  # names of the one activation that it computes
    biases: tuple[str, ...] = ()  # parts of a layer whose biases are added
    ropes: tuple[str, ...] = ("default", "linear", "yarn")  # kinds of rotary embeddings that reach the file
    any_head_dim: bool = True  # else it must be hidden_size / num_attention_heads
    tied: bool | None = None  # whether the output layer is the embeddings; none: either
    full_every: int = 0  # of so many layers the last has full attention, the others a window; 0: no windows at all
    any_pattern: bool = False  # whichever layers have windows
    windowed_depth: int = 0  # the number of layers with which there are windows, in whichever layers
    rotary_pattern: int = 0  # of so many layers the last has no rotary embeddings
    rope_theta: float = 0.0  # the only one; 0: any
    partial_rotary: bool = False  # whether a part of each head may be left as it is
    rescaled_depth: int = 0  # the number of layers by which the size is known that scales attention in another way
    grouped: bool = True  # whether several heads may share their keys and values
    values: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json with the one value that it computes


LLAMA = Architecture(
    biases=(*QKVO, *MLP),
    ropes=("default", "linear", "yarn", "llama3"),
)
GEMMA = Architecture(
    activations=("gelu_pytorch_tanh", "gelu_new"),
    ropes=("default", "linear"),
    tied=True,
)
OLMO = Architecture(any_head_dim=False, tied=False)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(biases=QKV, any_head_dim=False),
    "qwen3": Architecture(),
    "gemma2": replace(GEMMA, full_every=2, rescaled_depth=46),
    "gemma3_text": replace(GEMMA, full_every=6, rescaled_depth=62),
    "phi3": Architecture(ropes=("default", "longrope"), any_head_dim=False, partial_rotary=True),
    "olmo2": OLMO,
    "olmo3": replace(OLMO, any_pattern=True),
    "gemma": replace(GEMMA, ropes=("default",), rope_theta=10_000.0),
    "ministral3": Architecture(ropes=("yarn",)),
    "smollm3": Architecture(biases=QKV, rotary_pattern=4),
    "granite": Architecture(biases=LLAMA.biases, any_head_dim=False),
    "exaone4": Architecture(ropes=LLAMA.ropes, any_head_dim=False, windowed_depth=64),
    "seed_oss": Architecture(biases=QKV),
    "ernie4_5": Architecture(),
    "glm4": Architecture(biases=QKV, partial_rotary=True),
    "cohere2": Architecture(ropes=("default",), any_head_dim=False, tied=True, full_every=4),
    "qwen3_moe": Architecture(values={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}),
    "olmoe": replace(
        OLMO,
        grouped=False,
        values={"norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-5},
    ),
    "mixtral": Architecture(ropes=LLAMA.ropes),
}


def differences(config: ConfigJson, tied: bool, biases: Iterable[str]) -> Iterator[str]:
    """Reasons why llama.cpp's answers would not be those of transformers; none where they are the same.

    `config` is the content of config.json, `biases` the parts of a layer that have a bias.
    """
    model_type = config["model_type"]
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        yield f"model_type {model_type} has not been compared with it"
        return
    effective = pretrained.config_with_defaults(config)
    # Structure, attention and rotary embeddings; then the smaller parts
    yield from _class_differences(config)
    yield from _layer_differences(config, effective, architecture)
    if architecture.rescaled_depth:
        yield from _scale_differences(effective, architecture.rescaled_depth)
    if model_type in ("gemma2", "gemma3_text"):
        yield from _cap_differences(model_type, effective)
    yield from _rope_differences(effective, architecture)
    # Gemma's configs have the first of these fields.
    activation = getattr(effective, "hidden_activation", None) or getattr(effective, "hidden_act", None)
    if activation not in architecture.activations:
        yield f"the activation is {activation}, but it always uses {architecture.activations[0]}"
    ignored = set(biases) - set(architecture.biases)
    if ignored:
        names = ", ".join(sorted(ignored))
        yield f"it has no biases for {names} of this architecture"
    if architecture.tied not in (None, tied):
        value = str(tied).lower()
        yield f"tie_word_embeddings is {value}, but it supports only the opposite for this architecture"
    head_dim = _head_dim(effective)
    usual = effective.hidden_size // effective.num_attention_heads
    if head_dim != usual and not architecture.any_head_dim:
        yield f"head_dim is {head_dim}, but it uses hidden_size / num_attention_heads = {usual}"
    if not architecture.grouped and effective.num_key_value_heads != effective.num_attention_heads:
        yield f"num_key_value_heads is {effective.num_key_value_heads}, but it has one for each attention head"
    for name, value in architecture.values.items():
        if getattr(effective, name) != value:
            yield f"{name} is {getattr(effective, name)}, but it always uses {value}"


def context_notes(src: Path) -> list[str]:
    """What to serve a checkpoint with longrope with; of `src` only config.json is read."""
    limit = longrope_limit(text_tower.read_config(src))
    if limit is None:
        return []
    return [
        "longrope: llama.cpp and vLLM choose the factors by the size of their context, transformers by the length of "
        f"the text. Only up to {limit} tokens, in a context of no more, are the answers the same: serve with "
        f"--ctx-size {limit} --parallel 1 (llama-server) or --max-model-len {limit} (vLLM)"
    ]


def layer_rules(model_type: str, layers: int) -> list[str]:
    """What llama.cpp fixes by a layer's position, or by how many there are, in a model of so many layers.

    It may not hold once layers are removed. Empty where any of them may be, and for an unknown architecture.
    """
    architecture = ARCHITECTURES.get(model_type, Architecture())
    rules = []
    # In a model with fewer layers than a pattern has they are all alike.
    if 0 < architecture.full_every <= layers:
        rules.append(f"full attention in one of {architecture.full_every} layers, the last (layer_types)")
    if 0 < architecture.rotary_pattern <= layers:
        rules.append(f"no rotary embeddings in one of {architecture.rotary_pattern} layers, the last (no_rope_layers)")
    if 0 < architecture.windowed_depth <= layers:
        rules.append(f"windows with {architecture.windowed_depth} layers alone (sliding_window)")
    if architecture.rescaled_depth == layers:
        rules.append(f"another scale of attention with {layers} layers alone (query_pre_attn_scalar)")
    return rules


def _class_differences(config: ConfigJson) -> Iterator[str]:
    """The converter goes by `architectures`, transformers by model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    name = NAMES[config["model_type"]]
    architectures = config.get("architectures")
    if architectures != [name]:
        yield f'architectures is {architectures}, by which the converter chooses; set it to ["{name}"]'


def _layer_differences(config: ConfigJson, effective: Any, architecture: Architecture) -> Iterator[str]:
    """Windows and rotary embeddings of single layers, which llama.cpp has by the layer's number alone."""
    if architecture.full_every:
        yield from _pattern_differences(effective, architecture.full_every)
    elif architecture.windowed_depth:
        yield from _depth_differences(effective, architecture.windowed_depth)
    elif not architecture.any_pattern:
        yield from _window_differences(config, effective)
    every = architecture.rotary_pattern
    if every and effective.no_rope_layers != [
        int(layer % every > 0) for layer in range(1, len(effective.layer_types) + 1)
    ]:
        yield (
            f"no_rope_layers is not its pattern, no rotary embeddings in one of {every} layers, the last: removing "
            "layers shifts it, removing neurons does not"
        )
    if config["model_type"] == "cohere2" and "rotary_pct" not in config:
        yield "config.json lacks rotary_pct, which the converter reads; set it to 1.0"


def _depth_differences(effective: Any, depth: int) -> Iterator[str]:
    """EXAONE 4 has windows, and layers without rotary embeddings, by the depth of its large model."""
    window = effective.sliding_window
    layers = effective.num_hidden_layers
    if (window is not None) != (layers == depth):
        yield f"sliding_window is {window} with {layers} layers, but it has windows with {depth} layers alone"


def _window_differences(config: ConfigJson, effective: Any) -> Iterator[str]:
    """Most architectures have full attention in every layer."""
    model_type = config["model_type"]
    window = config.get("sliding_window")
    if model_type == "olmo2":
        # transformers has no windows there, the converter writes the field all the same.
        if window:
            yield f"sliding_window is {window}, which transformers ignores but it does not"
        return
    layer_types = getattr(effective, "layer_types", None) or ()
    if model_type not in WINDOWED_EVERYWHERE and "sliding_attention" not in layer_types:
        return
    # Of the others the JSON may name one that the layers of layer_types have.
    window = effective.sliding_window or (None if model_type in WINDOWED_EVERYWHERE else window)
    if window and window < effective.max_position_embeddings:
        yield (
            f"sliding_window is {window}, but it gives every layer full attention (layer_types): "
            f"answers differ from token {window + 1} on; if yours are shorter, "
            f"set max_position_embeddings={window} in a copy's config.json"
        )


def _pattern_differences(effective: Any, full_every: int) -> Iterator[str]:
    """Layers with full attention and with windows take turns."""
    pattern = ["sliding_attention"] * effective.num_hidden_layers
    for last in range(full_every - 1, len(pattern), full_every):
        pattern[last] = "full_attention"
    if list(effective.layer_types) != pattern:
        yield (
            "layer_types (which layers have sliding windows) is not its pattern, full attention in one of "
            f"{full_every} layers, the last: removing layers shifts it, removing neurons does not"
        )
    elif getattr(effective, "use_bidirectional_attention", False) or effective.sliding_window is None:
        yield "sliding_window is null or attention looks ahead, which it does not support"


def _scale_differences(effective: Any, rescaled_depth: int) -> Iterator[str]:
    """Gemma's queries are scaled by a field that does not reach the file."""
    # One size of the model, known by its depth, is scaled in another way.
    layers = effective.num_hidden_layers
    scalar = effective.query_pre_attn_scalar
    usual = _head_dim(effective)
    if layers == rescaled_depth:
        usual = effective.hidden_size // effective.num_attention_heads
    if scalar != usual:
        yield f"query_pre_attn_scalar is {scalar}, and for {layers} layers it takes {usual}"


def _cap_differences(model_type: str, effective: Any) -> Iterator[str]:
    """Soft caps are always there in Gemma 2 and never in Gemma 3."""
    capped = model_type == "gemma2"
    requirement = "needs a number" if capped else "has none"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = getattr(effective, name, None)
        if bool(cap) != capped:
            yield f"{name} is {cap}, but it {requirement}"


def _rope_differences(effective: Any, architecture: Architecture) -> Iterator[str]:
    """The rotary embeddings that the converter writes, and which of their parameters it leaves out."""
    # Gemma 3 and OLMo 3 have parameters for each kind of attention, all others one set.
    parameters = effective.rope_parameters
    full = parameters.get("full_attention", parameters)
    windowed = parameters.get("sliding_attention", {})
    kind = full.get("rope_type", "default")
    windowed_kind = windowed.get("rope_type", "default")
    if windowed_kind != "default":
        yield f"rope_type is {kind} and {windowed_kind}, which the converter drops"
    elif kind not in architecture.ropes:
        yield f"rope_type is {kind}, which the converter drops"
    theta = full.get("rope_theta")
    if architecture.rope_theta and theta != architecture.rope_theta:
        yield f"rope_theta is {theta}, but it always uses {architecture.rope_theta:g}"
    for name in _unread_rope_fields(effective.model_type, full, architecture):
        yield f"rope_parameters has {name}, which the converter drops"


def _unread_rope_fields(model_type: str, parameters: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    """Parameters of a known kind of rotary embeddings that matter and do not reach llama.cpp."""
    factor = parameters.get("attention_factor")
    # The factor that yarn has without this field
    usual = 0.1 * math.log(parameters.get("factor") or 1.0) + 1
    is_usual = parameters.get("rope_type") == "yarn" and math.isclose(factor or usual, usual, rel_tol=1e-6)
    if factor is not None and not is_usual:
        yield "attention_factor"
    if model_type == "ministral3":  # needs both fields, and takes the first as 1
        if parameters.get("mscale") != 1.0 or not parameters.get("mscale_all_dim"):
            yield "mscale and mscale_all_dim other than 1"
    else:
        yield from (name for name in ("mscale", "mscale_all_dim") if parameters.get(name) is not None)
    if parameters.get("truncate") is False:  # llama.cpp always truncates
        yield "truncate"
    if not architecture.partial_rotary and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor"


def _head_dim(effective: Any) -> int:
    """The size of a head, which some configs leave to be derived."""
    usual = effective.hidden_size // effective.num_attention_heads
    return getattr(effective, "head_dim", None) or usual
