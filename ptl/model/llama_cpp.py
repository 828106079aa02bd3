"""Where llama.cpp and transformers would differ: llama.cpp fixes by architecture what a config.json may choose.

From llama.cpp's own code: src/models/<architecture>.cpp (sizes, windows, scales, activations, biases) and the
conversion/ folder of its converter (which fields of config.json reach the file), both read in November 2026.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ptl.model import pretrained
from ptl.model.families import MLP, QKV, QKVO, ConfigJson

WINDOWED_EVERYWHERE = ("mistral", "phi3")  # transformers gives every layer the sliding window that config.json names


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp fixes for one model_type."""

    activations: tuple[str, ...] = ("silu", "swish")  # names of the one activation that it computes
    biases: tuple[str, ...] = ()  # parts of a layer whose biases are added
    ropes: tuple[str, ...] = ("default", "linear", "yarn")  # kinds of rotary embeddings that reach the file
    any_head_dim: bool = True  # else it must be hidden_size / num_attention_heads
    tied: bool | None = None  # whether the output layer is the embeddings; none: either
    full_every: int = 0  # of so many layers the last has full attention, the others a window; 0: no windows at all
    rescaled_depth: int = 0  # the number of layers by which the size is known that scales attention in another way


LLAMA = Architecture(
    biases=(*QKVO, *MLP),
    ropes=("default", "linear", "yarn", "llama3"),
)
GEMMA = Architecture(
    activations=("gelu_pytorch_tanh", "gelu_new"),
    ropes=("default", "linear"),
    tied=True,
)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(biases=QKV, any_head_dim=False),
    "qwen3": Architecture(),
    "gemma2": replace(GEMMA, full_every=2, rescaled_depth=46),
    "gemma3_text": replace(GEMMA, full_every=6, rescaled_depth=62),
    "phi3": Architecture(ropes=("default", "longrope"), any_head_dim=False),
    "olmo2": Architecture(any_head_dim=False, tied=False),
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
    if architecture.full_every:
        yield from _pattern_differences(effective, architecture.full_every)
    else:
        yield from _window_differences(config, effective)
    if architecture.rescaled_depth:
        yield from _scale_differences(effective, architecture.rescaled_depth)
    if model_type.startswith("gemma"):
        yield from _cap_differences(model_type, effective)
    yield from _rope_differences(model_type, effective, architecture)
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


def _class_differences(config: ConfigJson) -> Iterator[str]:
    """The converter goes by `architectures`, transformers by model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    name = NAMES[config["model_type"]]
    architectures = config.get("architectures")
    if architectures != [name]:
        yield f'architectures is {architectures}, by which the converter chooses; set it to ["{name}"]'


def _window_differences(config: ConfigJson, effective: Any) -> Iterator[str]:
    """All architectures but Gemma's have full attention in llama.cpp."""
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
    window = effective.sliding_window or window
    if window and window < effective.max_position_embeddings:
        yield (
            f"sliding_window is {window}, but it gives every layer full attention (layer_types): "
            f"answers differ from token {window + 1} on; if yours are shorter, "
            f"set max_position_embeddings={window} in a copy's config.json"
        )


def _pattern_differences(effective: Any, full_every: int) -> Iterator[str]:
    """Gemma's layers with full attention and with windows take turns, by the layer's number alone."""
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
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = getattr(effective, field, None)
        if bool(cap) != capped:
            yield f"{field} is {cap}, but it {requirement}"


def _rope_differences(
    model_type: str,
    effective: Any,
    architecture: Architecture,
) -> Iterator[str]:
    """The rotary embeddings that the converter writes, and which of their parameters it leaves out."""
    # Gemma 3 has parameters for each kind of attention, all others one set.
    parameters = effective.rope_parameters
    full = parameters.get("full_attention", parameters)
    windowed = parameters.get("sliding_attention", {})
    kind = full.get("rope_type", "default")
    windowed_kind = windowed.get("rope_type", "default")
    if windowed_kind != "default":
        yield f"rope_type is {kind} and {windowed_kind}, which the converter drops"
    elif kind not in architecture.ropes:
        yield f"rope_type is {kind}, which the converter drops"
    # Parameters of a known kind that the converter does not read
    unread = ("attention_factor", "mscale", "mscale_all_dim")
    ignored = [field for field in unread if full.get(field) is not None]
    if full.get("truncate") is False:  # llama.cpp always truncates
        ignored.append("truncate")
    if model_type != "phi3" and full.get("partial_rotary_factor", 1.0) != 1.0:
        ignored.append("partial_rotary_factor")
    for field in ignored:
        yield f"rope_parameters has {field}, which the converter drops"


def _head_dim(effective: Any) -> int:
    """The size of a head, which some configs leave to be derived."""
    usual = effective.hidden_size // effective.num_attention_heads
    return getattr(effective, "head_dim", None) or usual
