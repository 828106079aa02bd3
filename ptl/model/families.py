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
IN_LAYER = re.compile(
    r"^(?P<prefix>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<part>.+?)(?:\.(?P<kind>weight|bias))?$"
)
# in old files; it is recomputed
ROTARY = re.compile(r"^(?:.*\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Family:
    """How one architecture names the parts that are pruned; all else is read from transformers' own model.

    Tensor names are relative to a decoder layer, as in the checkpoint: `<prefix>layers.<i>.<name>.weight`. In a mixture
    of experts `experts` takes the place of the projections, but for layers that have one MLP in place of experts.
    """

    model_type: str  # as config.json names it
    # Gate and up, or one tensor with both: [2 * intermediate, hidden] together; their biases are pruned alike
    up_projections: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down_projection: str = "mlp.down_proj"  # [hidden, intermediate]; its bias stays
    norm_offset: float = 0.0  # what the norms add to their weight: 1 in Gemma
    # whether embeddings are multiplied by the root of the hidden size
    scaled_embeddings: bool = False
    # the norm between `down_projection` and the residual stream, where there is one
    post_norm: str = ""
    residual_scale: str = ""  # config field by which what `down_projection` gives is multiplied
    experts: Experts | None = None  # of a mixture of experts
    # Whether vLLM or llama.cpp load it only with a hidden size of all its heads together, whatever head_dim says
    square: bool = False
    # config field that counts layers after the last one, which guess further tokens (MTP)
    extra_layers: str = ""

    @property
    def width_field(self) -> str:
        """The field of config.json that holds the number of neurons of each layer, or of each expert."""
        return self.experts.width if self.experts else "intermediate_size"

    def is_read(self, name: str, config: ConfigJson) -> bool:
        """Whether a tensor of a checkpoint is part of the model as transformers loads it.

        Rotary buffers of old files are not, nor are layers after the last one (MTP).
        """
        match = IN_LAYER.match(name)
        is_extra = bool(
            self.extra_layers and match and int(match["layer"]) >= config["num_hidden_layers"]
        )
        return not (is_extra or ROTARY.match(name))


PHI3 = Family("phi3", up_projections=("mlp.gate_up_proj",), square=True)
OLMO2 = Family("olmo2", post_norm="post_feedforward_layernorm", square=True)
GEMMA = Family("gemma", norm_offset=1.0, scaled_embeddings=True)
GEMMA2 = replace(GEMMA, model_type="gemma2", post_norm="post_feedforward_layernorm")
QWEN2 = Family("qwen2", square=True)
DEEPSEEK = Family(
    "deepseek_v3",
    experts=Experts(
        ("n_routed_experts", "num_local_experts"),
        width="moe_intermediate_size",
        router_vector="mlp.gate.e_score_correction_bias",
    ),
    extra_layers="num_nextn_predict_layers",
)
_RECORDS = (
    Family("llama"),
    Family("mistral"),  # transformers reads a file with layer_types as ministral
    Family("ministral"),
    Family("ministral3"),
    QWEN2,
    replace(QWEN2, model_type="qwen3", square=False),
    GEMMA,
    GEMMA2,
    replace(GEMMA2, model_type="gemma3_text"),
    PHI3,
    OLMO2,
    replace(OLMO2, model_type="olmo3"),
    replace(OLMO2, model_type="exaone4"),
    Family("smollm3"),
    Family("granite", residual_scale="residual_multiplier", square=True),
    Family("seed_oss"),
    Family("ernie4_5"),
    Family("helium"),
    Family("internlm3"),
    Family("cwm"),
    replace(PHI3, model_type="glm4", post_norm="post_mlp_layernorm"),
    Family("cohere2", square=True),
    replace(
        QWEN2,
        model_type="qwen2_moe",
        experts=Experts(("num_experts",), width="moe_intermediate_size", lists_dense_layers=True),
    ),
    Family(
        "qwen3_moe",
        experts=Experts(
            ("num_experts", "num_local_experts"),
            width="moe_intermediate_size",
            lists_dense_layers=True,
        ),
    ),
    Family(
        "gpt_oss",
        experts=Experts(
            ("num_local_experts", "num_experts"),
            router_part="mlp.router",
            router_vector="mlp.router.bias",
            transposed=True,
        ),
    ),
    DEEPSEEK,
    replace(DEEPSEEK, model_type="glm4_moe"),
    Family("olmoe", experts=Experts(("num_experts", "num_local_experts"))),
    Family(
        "mixtral",
        experts=Experts(
            ("num_local_experts", "num_experts"),
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        ),
    ),
)
FAMILIES = {family.model_type: family for family in _RECORDS}

# Multimodal model_types whose text model the import takes out (text_tower.py), and that model's default model_type
TEXT_TOWERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
SUPPORTED = f"supported: {', '.join(sorted(FAMILIES.keys() | TEXT_TOWERS.keys()))}"


def family_of(config: ConfigJson) -> Family:
    """The record for a checkpoint's config.json. Raises InputError that lists what is supported."""
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    problem = f"model_type {model_type!r} is not supported ({SUPPORTED})"
    remedy = "give another; a family is one record in ptl/model/families.py and an entry of tests/variants.yaml"
    if model_type in TEXT_TOWERS:
        remedy = (
            "it is more than a language model: run `ptl import-model`, which saves its text model"
        )
    raise InputError(problem, field="model", remedy=remedy)
