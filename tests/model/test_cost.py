import pytest

from ptl.model import dimensions

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [
    {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
]


def saved(folder, tie, kind="llama", **shape):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=97, num_hidden_layers=3, tie_word_embeddings=tie, pad_token_id=0, **shape
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_flops_agree_with_torchs_counter(tmp_path, kind, tie, shape):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = saved(tmp_path, tie, kind, **shape)
    static = dimensions.static_cost(tmp_path)
    model.set_attn_implementation("eager")
    for length in (1, 7):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
        assert counter.get_total_flops() == length * (static.flops_per_token + length * static.attention_flops)


@pytest.mark.parametrize("tie", [True, False])
def test_static_costs_by_hand(tmp_path, tie):
    model = saved(tmp_path, tie, **SHAPES[0])
    static = dimensions.static_cost(tmp_path)
    attention = 32 * 32 * 2 + 32 * 16 * 2
    layer = attention + 3 * 32 * 88 + 2 * 32
    assert static.params == 97 * 32 * (1 if tie else 2) + 3 * layer + 32
    assert static.params == sum(p.numel() for p in model.parameters())
    assert static.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert static.flops_per_token == 2 * (3 * (attention + 3 * 32 * 88) + 97 * 32)
    assert static.kv_bytes_per_token == 2 * 3 * 2 * 8 * 4  # keys and values, layers, KV heads, head_dim, float32
    assert static.widths == [88] * 3


def test_kv_bytes_are_those_of_a_real_cache(tmp_path):
    import torch

    model = saved(tmp_path, True, **SHAPES[0])
    with torch.inference_mode():
        out = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert held == 5 * dimensions.static_cost(tmp_path).kv_bytes_per_token
