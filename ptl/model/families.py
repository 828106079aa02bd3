"""Where layers, MLPs and config fields are found: one record per model_type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ptl.errors import InputError
from ptl.model.experts import Experts

ConfigJson = Mapping[str, Any]  # the content of a checkpoint's config.json
# A tensor of a decoder layer, whatever precedes `layers.` (names in the optimizer state begin with `exp_avg.`);
# fused experts are neither a weight nor a bias
IN_LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<part>.+?)(?:\.(?P<kind>weight|bias))?$")
ROTARY = re.compile(r"^(?:.*\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")  # in old files; it is recomputed

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QKVO = (*QKV, "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
LATENT = tuple(f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
LATENT_QUERIES = tuple(f"self_attn.{name}" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj"))
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """How one architecture names the parts that are pruned.

    Tensor names are relative to a decoder layer, as in the checkpoint: `<prefix>layers.<i>.<name>.weight`.
    `other_parts`, `up_projections` and `down_projection` together are all the tensors of a layer: a checkpoint with
    more or fewer is refused. In a mixture of experts `experts` takes the place of the latter two, but for layers that
    have one MLP in place of experts.
    """

    model_type: str  # as config.json names it
    other_parts: tuple[str, ...] = (*QKVO, *PRE_NORMS)  # parts without a neuron dimension
    # [fused_projections * intermediate, hidden]; their biases are pruned alike
    up_projections: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    fused_projections: int = 1  # projections stacked in one tensor: 2 where gate and up are fused
    down_projection: str = "mlp.down_proj"  # [hidden, intermediate]; its bias stays
    # Parts with biases, by the config field that switches them on ("": they always have them)
    biases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    biases_by_default: tuple[str, ...] = ()  # of these fields, those that are true where config.json leaves them out
    per_layer_fields: tuple[str, ...] = ()  # config lists with one entry per layer
    prefix_fields: tuple[str, ...] = ()  # config counts of leading layers, for example those with full attention
    tied: bool = False  # default of tie_word_embeddings
    norm_offset: float = 0.0  # what the norms add to their weight: 1 in Gemma
    norm_per_head: bool = True  # q_norm and k_norm: of each head, or of all heads together
    defaults: tuple[tuple[str, int], ...] = ()  # of sizes that config.json leaves out, as in transformers
    post_norm: str = ""  # the norm between `down_projection` and the residual stream, where there is one
    residual_scale: str = ""  # config field by which what `down_projection` gives is multiplied
    experts: Experts | None = None  # of a mixture of experts
    latent_attention: bool = False  # keys and values are computed from a few latent numbers (MLA)
    vectors: tuple[str, ...] = ()  # tensors that are neither a weight nor a bias
    # Parts that only some models of the family have: config field, parts where it is set, parts where it is not
    optional_parts: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = ()
    extra_layers: str = ""  # config field that counts layers after the last one, which guess further tokens (MTP)

    def parts(self, config: ConfigJson, has_experts: bool) -> tuple[str, ...]:
        """Every part of a layer, but not its experts and their router."""
        parts = self.other_parts
        filled = self.with_defaults(config)
        for field, where_set, where_not in self.optional_parts:
            parts += where_set if filled.get(field) else where_not
        if self.experts and has_experts:
            return (*parts, *self.experts.shared)
        return (*parts, *self.up_projections, self.down_projection)

    def biases_of(self, config: ConfigJson, has_experts: bool) -> list[str]:
        """Those of a layer's parts that have a bias."""
        parts = self.parts(config, has_experts)
        return [part for part in self.biased_parts(config) if part in parts]

    def with_defaults(self, config: ConfigJson) -> dict[str, Any]:
        """The config with the sizes that it leaves out."""
        return dict(self.defaults) | dict(config)

    def dense_layers(self, config: ConfigJson, depth: int) -> tuple[int, ...]:
        """The layers of a mixture of experts that have one MLP in place of experts."""
        if self.experts is None:
            return ()
        filled = self.with_defaults(config)
        return tuple(layer for layer in range(depth) if not self.experts.are_in(layer, filled))

    def config_field(self, size: str) -> str:
        """The field of config.json that holds a size, by its name in sizes.Sizes."""
        if self.experts is None:
            return size
        names = {
            "intermediate_size": self.experts.width,
            "num_experts": self.experts.counts[0],
            "dense_intermediate_size": "intermediate_size",
        }
        return names.get(size, size)

    def biased_parts(self, config: ConfigJson) -> list[str]:
        """The parts of a layer that have a bias."""
        biased: dict[str, None] = {}  # in order, each once: InternLM3 has two names for a field
        for field, parts in self.biases:
            if not field or config.get(field, field in self.biases_by_default):
                biased |= dict.fromkeys(parts)
        return list(biased)

    def has_neurons(self, part: str, kind: str) -> bool:
        """Whether a dimension of the part's `weight` or `bias` counts the FFN neurons."""
        if part == self.down_projection:
            return kind == "weight"  # the bias is that of the hidden state
        return part in self.up_projections

    def is_read(self, name: str, config: ConfigJson) -> bool:
        """Whether a tensor of a checkpoint is part of the model as transformers loads it.

        Rotary buffers of old files are not, nor are layers after the last one (MTP).
        """
        match = IN_LAYER.match(name)
        is_extra = bool(self.extra_layers and match and int(match["layer"]) >= config["num_hidden_layers"])
        return not (is_extra or ROTARY.match(name))

    def is_tied(self, config: ConfigJson) -> bool:
        """Whether the output layer is the embeddings."""
        return bool(config.get("tie_word_embeddings", self.tied))


ATTENTION_BIAS = ("attention_bias", QKVO)
MLP_BIAS = ("mlp_bias", MLP)
SHARED_EXPERTS = tuple(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down"))
DEEPSEEK_EXPERTS = Experts(
    ("n_routed_experts", "num_local_experts"),
    width="moe_intermediate_size",
    router_vector="mlp.gate.e_score_correction_bias",
    router_loss=False,
    grouped=True,
    shared=SHARED_EXPERTS,
    shared_width="n_shared_experts",
    dense_fields=("first_k_dense_replace",),
)
QWEN_DENSE_FIELDS = ("mlp_only_layers", "decoder_sparse_step")
GEMMA2 = Family(
    "gemma2",
    other_parts=(*QKVO, "input_layernorm", "pre_feedforward_layernorm", *POST_NORMS),
    per_layer_fields=("layer_types",),
    defaults=(("num_key_value_heads", 4), ("head_dim", 256)),
    biases=(ATTENTION_BIAS,),
    tied=True,
    norm_offset=1.0,
    post_norm="post_feedforward_layernorm",
)
LLAMA = Family("llama", biases=(ATTENTION_BIAS, MLP_BIAS))
MISTRAL = Family(
    "mistral",
    per_layer_fields=("layer_types",),  # transformers reads a file that has them as ministral
    defaults=(
        *(("hidden_size", 4096), ("intermediate_size", 14_336), ("num_hidden_layers", 32)),
        *(("num_attention_heads", 32), ("num_key_value_heads", 8), ("vocab_size", 32_000)),
    ),
)
OLMO2 = Family(
    "olmo2",
    other_parts=(*QKVO, *QK_NORMS, *POST_NORMS),
    norm_per_head=False,
    biases=(ATTENTION_BIAS,),
    post_norm="post_feedforward_layernorm",
)
_RECORDS = (
    LLAMA,
    MISTRAL,
    replace(MISTRAL, model_type="ministral"),
    Family(
        "ministral3",
        defaults=(
            *(("hidden_size", 4096), ("intermediate_size", 14_336), ("num_hidden_layers", 34), ("head_dim", 128)),
            *(("num_attention_heads", 32), ("num_key_value_heads", 8), ("vocab_size", 131_072)),
        ),
    ),
    Family(
        "qwen2",
        per_layer_fields=("layer_types",),
        prefix_fields=("max_window_layers",),
        defaults=(("num_key_value_heads", 32),),
        biases=(("", QKV),),
    ),
    Family(
        "qwen3",
        other_parts=(*QKVO, *QK_NORMS, *PRE_NORMS),
        per_layer_fields=("layer_types",),
        prefix_fields=("max_window_layers",),
        defaults=(("num_key_value_heads", 32), ("head_dim", 128)),
        biases=(ATTENTION_BIAS,),
    ),
    Family(
        "gemma",
        defaults=(("num_key_value_heads", 16), ("head_dim", 256)),
        biases=(ATTENTION_BIAS,),
        tied=True,
        norm_offset=1.0,
    ),
    GEMMA2,
    replace(
        GEMMA2,
        model_type="gemma3_text",
        other_parts=(*GEMMA2.other_parts, *QK_NORMS),
        defaults=(
            *(("hidden_size", 2304), ("intermediate_size", 9216), ("num_hidden_layers", 26), ("head_dim", 256)),
            *(("num_attention_heads", 8), ("num_key_value_heads", 4), ("vocab_size", 262_208)),
        ),
    ),
    Family(
        "phi3",
        other_parts=("self_attn.qkv_proj", "self_attn.o_proj", *PRE_NORMS),
        up_projections=("mlp.gate_up_proj",),
        fused_projections=2,
    ),
    OLMO2,
    replace(OLMO2, model_type="olmo3", per_layer_fields=("layer_types",)),
    replace(
        OLMO2,
        model_type="exaone4",
        norm_per_head=True,
        biases=(),
        per_layer_fields=("layer_types",),
        defaults=(("num_key_value_heads", 32),),
    ),
    replace(
        LLAMA,
        model_type="smollm3",
        per_layer_fields=("no_rope_layers", "layer_types"),
        defaults=(("num_key_value_heads", 4),),
        tied=True,
    ),
    replace(LLAMA, model_type="granite", residual_scale="residual_multiplier"),
    Family(
        "seed_oss",
        biases=(("attention_bias", QKV), ("attention_out_bias", QKVO[-1:]), MLP_BIAS),
        biases_by_default=("attention_bias",),
        defaults=(("num_key_value_heads", 8), ("head_dim", 128)),
    ),
    Family(
        "ernie4_5",
        biases=(("use_bias", (*QKVO, *MLP)),),
        defaults=(("num_key_value_heads", 2), ("head_dim", 128)),
        tied=True,
    ),
    Family(
        "helium",
        biases=(("attention_bias", QKV), MLP_BIAS),
        defaults=(("num_key_value_heads", 20), ("head_dim", 128)),
    ),
    replace(
        LLAMA,
        model_type="internlm3",
        biases=(ATTENTION_BIAS, MLP_BIAS, ("qkv_bias", QKVO), ("bias", MLP)),  # the latter in files on the hub
        defaults=(("num_key_value_heads", 2), ("head_dim", 128)),
    ),
    Family(
        "cwm",
        per_layer_fields=("layer_types",),
        biases=(MLP_BIAS,),
        defaults=(("num_key_value_heads", 8), ("head_dim", 128)),
    ),
    Family(
        "glm4",
        other_parts=(*QKVO, *PRE_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        up_projections=("mlp.gate_up_proj",),
        fused_projections=2,
        biases=(("attention_bias", QKV),),
        biases_by_default=("attention_bias",),
        defaults=(("num_key_value_heads", 2), ("head_dim", 128)),
        post_norm="post_mlp_layernorm",
    ),
    Family(
        "cohere2",
        other_parts=(*QKVO, "input_layernorm"),  # attention and MLP read the same norm
        per_layer_fields=("layer_types",),
        biases=(ATTENTION_BIAS,),
        tied=True,
    ),
    Family(
        "qwen2_moe",
        per_layer_fields=("layer_types",),
        prefix_fields=("max_window_layers",),
        defaults=(
            *(("num_key_value_heads", 16), ("moe_intermediate_size", 1408), ("shared_expert_intermediate_size", 5632)),
            *(("num_experts", 60), ("num_experts_per_tok", 4)),
        ),
        biases=(("qkv_bias", QKV),),
        biases_by_default=("qkv_bias",),
        experts=Experts(
            ("num_experts",),
            width="moe_intermediate_size",
            shared=(*(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")), "mlp.shared_expert_gate"),
            shared_width="shared_expert_intermediate_size",
            dense_fields=QWEN_DENSE_FIELDS,
        ),
    ),
    Family(
        "gpt_oss",
        vectors=("self_attn.sinks",),
        per_layer_fields=("layer_types",),
        defaults=(
            *(("num_key_value_heads", 8), ("head_dim", 64), ("intermediate_size", 2880)),
            *(("num_local_experts", 128), ("num_experts_per_tok", 4)),
        ),
        biases=(ATTENTION_BIAS,),
        biases_by_default=("attention_bias",),
        experts=Experts(
            ("num_local_experts", "num_experts"),
            router_part="mlp.router",
            router_vector="mlp.router.bias",
            transposed=True,
        ),
    ),
    Family(
        "deepseek_v3",
        other_parts=(*LATENT, "self_attn.o_proj", *PRE_NORMS),
        optional_parts=(("q_lora_rank", LATENT_QUERIES, ("self_attn.q_proj",)),),
        prefix_fields=("first_k_dense_replace",),
        defaults=(
            *(("num_key_value_heads", 128), ("moe_intermediate_size", 2048), ("n_routed_experts", 256)),
            *(("num_experts_per_tok", 8), ("n_shared_experts", 1), ("n_group", 8), ("topk_group", 4)),
            *(("q_lora_rank", 1536), ("kv_lora_rank", 512), ("qk_rope_head_dim", 64), ("qk_nope_head_dim", 128)),
            *(("v_head_dim", 128), ("head_dim", 64), ("first_k_dense_replace", 3)),
        ),
        biases=(("attention_bias", (LATENT[0], "self_attn.o_proj", LATENT_QUERIES[0])),),
        experts=DEEPSEEK_EXPERTS,
        latent_attention=True,
        extra_layers="num_nextn_predict_layers",
    ),
    Family(
        "glm4_moe",
        optional_parts=(("use_qk_norm", QK_NORMS, ()),),
        prefix_fields=("first_k_dense_replace",),
        defaults=(
            *(("num_key_value_heads", 8), ("moe_intermediate_size", 1408), ("n_routed_experts", 128)),
            *(("num_experts_per_tok", 8), ("n_shared_experts", 1), ("n_group", 1), ("topk_group", 1)),
            ("first_k_dense_replace", 1),
        ),
        biases=(("attention_bias", QKV),),
        experts=DEEPSEEK_EXPERTS,
        extra_layers="num_nextn_predict_layers",
    ),
    Family(
        "qwen3_moe",
        other_parts=(*QKVO, *QK_NORMS, *PRE_NORMS),
        prefix_fields=("max_window_layers",),
        defaults=(
            *(("num_key_value_heads", 4), ("moe_intermediate_size", 768)),
            *(("num_experts", 128), ("num_experts_per_tok", 8)),
        ),
        biases=(ATTENTION_BIAS,),
        experts=Experts(
            ("num_experts", "num_local_experts"), width="moe_intermediate_size", dense_fields=QWEN_DENSE_FIELDS
        ),
    ),
    Family(
        "olmoe",
        other_parts=(*QKVO, *QK_NORMS, *PRE_NORMS),
        norm_per_head=False,
        defaults=(("num_experts", 64), ("num_experts_per_tok", 8)),
        biases=(ATTENTION_BIAS,),
        experts=Experts(("num_experts", "num_local_experts")),
    ),
    Family(
        "mixtral",
        defaults=(("num_key_value_heads", 8), ("num_local_experts", 8), ("num_experts_per_tok", 2)),
        experts=Experts(("num_local_experts", "num_experts"), block="block_sparse_moe", projections=("w1", "w3", "w2")),
    ),
)
FAMILIES = {family.model_type: family for family in _RECORDS}

# Multimodal model_types whose text model the import takes out (text_tower.py), and that model's default model_type
TEXT_TOWERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# Config fields of mixtures of experts and of other models that are no language models
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")
MODALITIES = ("vision_config", "audio_config", "text_config")
# Families that many people ask for and that are built otherwise: why, and what to prune in their place
_GEMMA_3N = (
    "its layers have an embedding table each and several hidden states (AltUp), which no score of a neuron covers",
    "prune a Gemma 3 (gemma3 or gemma3_text)",
)
_QWEN_3_5 = (
    "three of four layers have linear attention (Gated DeltaNet) with tensors that ptl does not know",
    "prune a Qwen 3 (qwen3)",
)
_GEMMA_4 = (
    "its layers differ in the size of their heads, share keys and values, and some have an embedding table each",
    "prune a Gemma 3 (gemma3 or gemma3_text)",
)
_OTHER_EXPERTS = "prune a mixture of experts of the type qwen3_moe, qwen2_moe, glm4_moe, olmoe or mixtral"
REFUSED = {
    "gemma4": _GEMMA_4,
    "gemma4_text": _GEMMA_4,
    "gemma3n": _GEMMA_3N,
    "gemma3n_text": _GEMMA_3N,
    "qwen3_5": _QWEN_3_5,
    "qwen3_5_text": _QWEN_3_5,
    "qwen3_next": (
        "it is a mixture of experts with a shared expert, and three of four layers have linear attention "
        "(Gated DeltaNet) with tensors that ptl does not know",
        _OTHER_EXPERTS,
    ),
    "deepseek_v2": (
        "it is a mixture of experts whose router chooses groups of experts in another way than that of DeepSeek V3, "
        "which ptl does not know",
        _OTHER_EXPERTS,
    ),
}
SUPPORTED = f"supported: {', '.join(sorted(FAMILIES.keys() | TEXT_TOWERS.keys()))}"


def family_of(config: ConfigJson) -> Family:
    """The record for a checkpoint's config.json. Raises InputError that lists what is supported."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        reason, remedy = REFUSED[model_type]
        raise InputError(f"model_type {model_type!r} is not supported: {reason}", field="model", remedy=remedy)
    _check_experts(config)
    _check_text_only(config)
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise InputError(
        f"model_type {model_type!r} is not supported ({SUPPORTED})",
        field="model",
        remedy="a family is one record in ptl/model/families.py and one entry of VARIANTS in tests/tiny_models.py",
    )


def _check_experts(config: ConfigJson) -> None:
    """Raise InputError for an unknown mixture of experts, also where it is the text model of a multimodal one."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family and family.experts:
        return
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for expert_field in EXPERTS:
            if part.get(expert_field):
                raise InputError(
                    f"model_type {config.get('model_type')!r} is a mixture of experts (config field {expert_field}), "
                    "whose layout ptl does not know; it is refused rather than pruned wrongly",
                    field="model",
                    remedy=f"give a model of a known type ({SUPPORTED})",
                )


def _check_text_only(config: ConfigJson) -> None:
    """Raise InputError for a multimodal model, which has not been imported."""
    model_type = config.get("model_type")
    by_hand = f"save its text model as a checkpoint of its own and give that ({SUPPORTED})"
    for modality in MODALITIES:
        if config.get(modality):
            raise InputError(
                f"model_type {model_type!r} is more than a language model (config field {modality})",
                field="model",
                remedy="run `ptl import-model`, which saves its text model" if model_type in TEXT_TOWERS else by_hand,
            )
