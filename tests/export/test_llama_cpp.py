"""What llama.cpp fixes by architecture: fields of published checkpoints, and what a pruned or other one may have."""

import json
import re

import pytest

from ptl.export import llama_cpp
from ptl.model import pretrained
from ptl.model.families import FAMILIES
from ptl.pruning.surgery import Selection, prune_config

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 4096}
LLAMA3 = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072} | {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
OLMO2 = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 3584} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 42,
}
GEMMA2_27B = GEMMA2 | {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144}
GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
OLMO3 = {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "sliding_window": 4096} | {
    "rope_scaling": YARN | {"factor": 8.0, "attention_factor": 1.2079441541679836},
}
SMOLLM3 = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
EXAONE4 = {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "num_hidden_layers": 64}
MINISTRAL3 = {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}
GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
GEMMA = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
COHERE2 = {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], "rotary_pct": 1.0}
GLM4 = {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 0.5}
QWEN3_MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
OLMOE = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "rms_norm_eps": 1e-5}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
WINDOWED = ["sliding_attention"] * 2 + ["full_attention"] * 30


def reasons(config, biases=(), tied=None):
    config = {name: value for name, value in config.items() if value is not ...}
    family = FAMILIES[config["model_type"]]
    return " | ".join(llama_cpp.differences(config, family.is_tied(config) if tied is None else tied, biases))


COMPUTED_ALIKE = {
    "mistral-without-a-window": MISTRAL | {"sliding_window": None},
    "mistral-with-a-window-as-long-as-its-context": MISTRAL | {"sliding_window": 32768},
    "phi3-without-a-window": PHI3 | {"sliding_window": None},
    "llama-3.1": LLAMA3,
    "qwen2": QWEN2 | {"use_sliding_window": False, "sliding_window": 131072},
    "qwen2-with-yarn": QWEN2 | {"rope_scaling": YARN},
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "gemma2-9b": GEMMA2,
    "gemma2-27b": GEMMA2_27B | {"num_hidden_layers": 46},
    "gemma3": GEMMA3,
    "olmo3": OLMO3,
    "olmo3-without-some-layers": OLMO3 | {"layer_types": WINDOWED},
    "smollm3": SMOLLM3,
    "exaone4-32b": EXAONE4,
    "exaone4-1.2b": EXAONE4 | {"num_hidden_layers": 30, "sliding_window": None, "layer_types": WINDOWED[2:]},
    "ministral3": MINISTRAL3,
    "granite": GRANITE,
    "gemma": GEMMA,
    "cohere2": COHERE2,
    "glm4": GLM4,
    "qwen3-30b-a3b": QWEN3_MOE | {"head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
    "olmoe-1b-7b": OLMOE,
    "mixtral-8x7b": MIXTRAL | {"sliding_window": None},
}


def without_layer(config, layer):
    """The config of the pruned model, whose config.json may leave out the number of layers."""
    layers = pretrained.config_with_defaults(config).num_hidden_layers
    family = FAMILIES[config["model_type"]]
    kept = tuple(i for i in range(layers) if i != layer)
    return prune_config(config | {"num_hidden_layers": layers}, family, Selection(kept, {}, {}))


@pytest.mark.parametrize("config", COMPUTED_ALIKE.values(), ids=COMPUTED_ALIKE.keys())
def test_layers_are_bound_to_their_places_where_the_rules_say_so(config):
    """Some layer of the published models cannot be removed if and only if there are rules."""
    layers = pretrained.config_with_defaults(config).num_hidden_layers
    rules = llama_cpp.layer_rules(config["model_type"], layers)
    refused = [reasons(without_layer(config, layer)) for layer in range(layers)]
    assert any(refused) == bool(rules)
    # Each reason is of a field that a rule names.
    fields = {field for rule in rules for field in re.findall(r"\((\w+)\)", rule)}
    assert all(any(field in reason for field in fields) for reason in refused if reason)
    assert all(any(field in reason for reason in refused) for field in fields)


def test_layers_that_are_all_alike_may_go():
    assert llama_cpp.layer_rules("gemma3_text", 5) == []
    assert llama_cpp.layer_rules("gemma3_text", 6) == ["full attention in one of 6 layers, the last (layer_types)"]
    assert llama_cpp.layer_rules("exaone4", 63) == llama_cpp.layer_rules("unknown", 64) == []


@pytest.mark.parametrize("config", COMPUTED_ALIKE.values(), ids=COMPUTED_ALIKE.keys())
def test_checkpoints_that_llama_cpp_computes_alike_are_let_through(config):
    assert reasons(config) == ""


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(MISTRAL | {"sliding_window": 4096}, "sliding_window is 4096", id="mistral-0.1"),
        pytest.param(MISTRAL, "sliding_window is 4096", id="mistral-s-default-window"),
        pytest.param(PHI3 | {"sliding_window": 2047}, "from token 2048 on", id="phi3-mini-4k"),
        pytest.param(
            QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "layer_types": WINDOWED},
            "sliding_window is 4096",
            id="qwen2-with-windows",
        ),
        pytest.param(OLMO2 | {"sliding_window": 4096}, "which transformers ignores", id="olmo2-with-a-window"),
        pytest.param(
            GEMMA2 | {"query_pre_attn_scalar": 224},
            "query_pre_attn_scalar is 224, and for 42 layers it takes 256",
            id="gemma2-with-another-scale",
        ),
        pytest.param(
            GEMMA2_27B | {"num_hidden_layers": 44},
            "query_pre_attn_scalar is 144, and for 44 layers it takes 128",
            id="gemma2-27b-without-some-layers",
        ),
        pytest.param(
            GEMMA2 | {"num_hidden_layers": 46},
            "query_pre_attn_scalar is 256, and for 46 layers it takes 224",
            id="gemma2-of-as-many-layers-as-the-27b",
        ),
        pytest.param(
            GEMMA2 | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
            "layer_types",
            id="gemma2-without-some-layers",
        ),
        pytest.param(
            GEMMA2 | {"final_logit_softcapping": None}, "final_logit_softcapping is None", id="gemma2-uncapped"
        ),
        pytest.param(GEMMA2 | {"tie_word_embeddings": False}, "tie_word_embeddings is false", id="gemma2-untied"),
        pytest.param(GEMMA2 | {"hidden_activation": "relu"}, "the activation is relu", id="gemma2-with-relu"),
        pytest.param(
            GEMMA3 | {"sliding_window_pattern": 2}, "layer_types .* one of 6 layers", id="gemma3-of-pattern-two"
        ),
        pytest.param(GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0", id="gemma3-capped"),
        pytest.param(LLAMA3 | {"hidden_act": "gelu"}, "the activation is gelu", id="llama-with-gelu"),
        pytest.param(
            LLAMA3 | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            "rope_type is llama3",
            id="qwen2-with-llama-s-rope",
        ),
        pytest.param(
            QWEN2 | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic", id="dynamic-rope"
        ),
        pytest.param(
            QWEN2 | {"rope_scaling": YARN | {"attention_factor": 1.5}}, "attention_factor", id="yarn-s-factor"
        ),
        pytest.param(QWEN2 | {"head_dim": 64}, "head_dim is 64", id="qwen2-with-another-head-size"),
        pytest.param(OLMO2 | {"tie_word_embeddings": True}, "tie_word_embeddings is true", id="olmo2-tied"),
        pytest.param(GEMMA3 | {"architectures": ["Gemma3TextModel"]}, "architectures is", id="an-embedding-model"),
        pytest.param(
            SMOLLM3 | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
            "no_rope_layers is not its pattern",
            id="smollm3-without-some-layers",
        ),
        pytest.param(
            EXAONE4 | {"num_hidden_layers": 63},
            "sliding_window is 4096 with 63 layers, but it has windows with 64 layers alone",
            id="exaone4-32b-without-a-layer",
        ),
        pytest.param(
            MINISTRAL3 | {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 1.0, "rope_theta": 1e6}},
            "mscale and mscale_all_dim other than 1",
            id="ministral3-with-another-mscale",
        ),
        pytest.param(MINISTRAL3 | {"sliding_window": 4096}, "sliding_window is 4096", id="ministral3-with-a-window"),
        pytest.param(
            GRANITE | {"rope_scaling": LLAMA3["rope_scaling"]}, "rope_type is llama3", id="granite-with-llama-s-rope"
        ),
        pytest.param(
            GEMMA | {"rope_theta": 1e6}, "rope_theta is 1000000.0, but it always uses 10000", id="gemma-theta"
        ),
        pytest.param(COHERE2 | {"rotary_pct": ...}, "lacks rotary_pct", id="cohere2-without-rotary-pct"),
        pytest.param(
            COHERE2 | {"num_hidden_layers": 2, "layer_types": WINDOWED[1:3]}, "layer_types", id="cohere2-without-layers"
        ),
        pytest.param(
            GLM4 | {"head_dim": 100, "rope_scaling": YARN | {"truncate": False}}, "truncate", id="glm4-truncate"
        ),
        pytest.param(QWEN3_MOE | {"norm_topk_prob": False}, "norm_topk_prob is False", id="qwen3-moe-not-normalized"),
        pytest.param(QWEN3_MOE | {"mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]", id="qwen3-moe-dense-layer"),
        pytest.param(QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2", id="qwen3-moe-every-other"),
        pytest.param(
            QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 4096},
            "sliding_window is 4096",
            id="qwen3-moe-window",
        ),
        pytest.param(OLMOE | {"norm_topk_prob": True}, "norm_topk_prob is True", id="olmoe-normalized"),
        pytest.param(OLMOE | {"clip_qkv": 8.0}, "clip_qkv is 8.0, but it always uses None", id="olmoe-clipped"),
        pytest.param(OLMOE | {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06", id="olmoe-with-another-epsilon"),
        pytest.param(OLMOE | {"num_key_value_heads": 4}, "num_key_value_heads is 4", id="olmoe-with-groups"),
        pytest.param(MIXTRAL | {"sliding_window": 4096}, "sliding_window is 4096", id="mixtral-with-a-window"),
        pytest.param(QWEN3 | {"architectures": None}, "architectures is None", id="no-class"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_named(config, reason):
    assert re.search(reason, reasons(config))


def test_biases_that_llama_cpp_has_no_place_for_are_named():
    every = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    assert reasons(LLAMA3, every) == "" == reasons(QWEN2, every[:1])
    assert "no biases for mlp.down_proj, self_attn.o_proj of this" in reasons(QWEN2, every)
    for config in (QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3):
        assert "no biases for self_attn.q_proj" in reasons(config, every[:1])


def test_a_family_that_was_not_compared_is_named():
    assert llama_cpp.ARCHITECTURES.keys() <= FAMILIES.keys()
    for model_type in FAMILIES.keys() - llama_cpp.ARCHITECTURES.keys():
        assert reasons({"model_type": model_type}) == f"model_type {model_type} has not been compared with it"


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_longrope_names_the_context_to_serve_with(name, tmp_path):
    longrope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    config = PHI3 | {name: longrope, "original_max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (note,) = llama_cpp.context_notes(tmp_path)
    assert "--ctx-size 4096" in note and "--max-model-len 4096" in note
    (tmp_path / "config.json").write_text(json.dumps(PHI3 | {name: YARN}))
    assert llama_cpp.context_notes(tmp_path) == []
