"""Where layers, MLPs and config fields live: one record per model_type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptl.errors import InputError

# A tensor of a decoder layer, whatever stands before `layers.` (Adam's moments have `exp_avg.` there)
IN_LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<part>.+)\.(?P<kind>weight|bias)$")
ROTARY = re.compile(r"^(?:.*\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")  # old files hold it; it is recomputed

QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """How one architecture names the parts that are cut.

    Tensor names are relative to a decoder layer, as in the checkpoint: `<prefix>layers.<i>.<name>.weight`. `others`,
    `rows` and `columns` together are all the tensors of a layer: a checkpoint with more or fewer is refused.
    """

    model_type: str
    others: tuple[str, ...] = (*QKVO, *PRE_NORMS)
    rows: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # [blocks * intermediate, hidden]; biases are cut alike
    blocks: int = 1  # how often the neurons stand in one `rows` tensor: twice where gate and up are fused
    columns: str = "mlp.down_proj"  # [hidden, intermediate]; its bias stays
    biases: tuple[tuple[str, tuple[str, ...]], ...] = ()  # config field that switches biases on ("": always), parts
    width_field: str = "intermediate_size"
    depth_field: str = "num_hidden_layers"
    per_layer_fields: tuple[str, ...] = ()  # config lists with one entry per layer
    prefix_fields: tuple[str, ...] = ()  # config counts of leading layers, for example those with full attention
    tied: bool = False  # whether embeddings are tied where the config does not say
    # The last parts before the residual stream, where only norms read the stream; else none (see repair.magnitude).
    writes: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    norm_offset: float = 0.0  # what the norms add to their weight: 1 in Gemma
    norm_per_head: bool = True  # q_norm and k_norm: of each head, or of all heads together
    defaults: tuple[tuple[str, int], ...] = ()  # sizes that transformers takes where config.json leaves them out
    post_norm: str = ""  # the norm between `columns` and the residual stream, where there is one

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part of a layer."""
        return (*self.others, *self.rows, self.columns)

    def biased(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The parts of a layer that have a bias."""
        return tuple(part for field, parts in self.biases if not field or config.get(field) for part in parts)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the output layer is the embeddings."""
        return bool(config.get("tie_word_embeddings", self.tied))


_RECORDS = (
    Family("llama", biases=(("attention_bias", QKVO), ("mlp_bias", MLP))),
    Family("mistral", defaults=(("num_key_value_heads", 8),)),
    Family(
        "qwen2",
        per_layer_fields=("layer_types",),
        prefix_fields=("max_window_layers",),
        defaults=(("num_key_value_heads", 32),),
        biases=(("", QKVO[:3]),),
    ),
    Family(
        "qwen3",
        others=(*QKVO, *QK_NORMS, *PRE_NORMS),
        per_layer_fields=("layer_types",),
        prefix_fields=("max_window_layers",),
        defaults=(("num_key_value_heads", 32), ("head_dim", 128)),
        biases=(("attention_bias", QKVO),),
    ),
    Family(
        "gemma2",
        others=(*QKVO, "input_layernorm", "pre_feedforward_layernorm", *POST_NORMS),
        per_layer_fields=("layer_types",),
        defaults=(("num_key_value_heads", 4), ("head_dim", 256)),
        biases=(("attention_bias", QKVO),),
        tied=True,
        writes=POST_NORMS,
        norm_offset=1.0,
        post_norm="post_feedforward_layernorm",
    ),
    Family(
        "gemma3_text",
        others=(*QKVO, *QK_NORMS, "input_layernorm", "pre_feedforward_layernorm", *POST_NORMS),
        per_layer_fields=("layer_types",),
        defaults=(
            *(("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 256)),
            ("vocab_size", 262_208),
        ),
        biases=(("attention_bias", QKVO),),
        tied=True,
        writes=POST_NORMS,
        norm_offset=1.0,
        post_norm="post_feedforward_layernorm",
    ),
    Family(
        "phi3",
        others=("self_attn.qkv_proj", "self_attn.o_proj", *PRE_NORMS),
        rows=("mlp.gate_up_proj",),
        blocks=2,
    ),
    Family(
        "olmo2",
        others=(*QKVO, *QK_NORMS, *POST_NORMS),
        norm_per_head=False,
        biases=(("attention_bias", QKVO),),
        writes=(),  # its layers read the hidden state without a norm
        post_norm="post_feedforward_layernorm",
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS}

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
MODALITIES = ("vision_config", "audio_config", "text_config")


def family_of(config: Mapping[str, Any]) -> Family:
    """The record for a checkpoint's config.json. Raises InputError that lists what is supported."""
    model_type = config.get("model_type")
    supported = f"supported: {', '.join(sorted(FAMILIES))}"
    experts = next((field for field in EXPERTS if config.get(field)), None)
    if experts:
        raise InputError(
            f"model: model_type {model_type!r} is a mixture of experts (config field {experts}), whose neurons are "
            f"not all used for every token; it is refused rather than cut wrongly: give a dense model ({supported})"
        )
    modality = next((field for field in MODALITIES if config.get(field)), None)
    if modality:
        raise InputError(
            f"model: model_type {model_type!r} is more than a language model (config field {modality}); save its text "
            f"model as a checkpoint of its own and give that ({supported})"
        )
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise InputError(
        f"model: model_type {model_type!r} is not supported ({supported}); "
        "a family is one record in ptl/families.py and one line in tests/test_families.py"
    )
