"""Weights, Adam's state and config pruned together; what every family has in common is in test_families.py."""

import json
import weakref

import pytest
import torch
from tiny_models import build, save

from ptl.model import checkpoint, dimensions, safetensors_io
from ptl.model.families import FAMILIES
from ptl.pruning.surgery import Selection, Surgery, prune_config, write_pruned

LLAMA = FAMILIES["llama"]
KEPT = torch.tensor([0, 2, 3])
SELECTION = Selection((0, 2), {0: KEPT, 2: KEPT + 1})


def test_other_tensors_move_or_go(tmp_path):
    tensor, surgery = torch.rand(6), Surgery(save(build("llama"), tmp_path), LLAMA, SELECTION)
    for name, new in {
        "model.layers.2.mlp.down_proj.bias": "model.layers.1.mlp.down_proj.bias",
        "model.norm.weight": "model.norm.weight",
        "step": "step",
        "model.layers.1.input_layernorm.weight": None,
        "exp_avg.model.layers.1.mlp.up_proj.weight": None,
        "model.layers.0.self_attn.rotary_emb.inv_freq": None,
    }.items():
        pruned = surgery.of(name, tensor.shape)
        assert (pruned and (pruned.name, pruned.values(tensor))) == (new and (new, tensor)), name


def test_counts_and_lists_of_layers_in_the_config():
    whole, window = "full_attention", "sliding_attention"
    config = {"model_type": "qwen2", "num_hidden_layers": 6, "intermediate_size": 8}
    config |= {"max_window_layers": 3, "layer_types": [whole] * 3 + [window] * 3}
    pruned = config | {
        "num_hidden_layers": 4,
        "max_window_layers": 2,
        "layer_types": [whole, whole, window, window],
    }
    assert prune_config(config, FAMILIES["qwen2"], Selection((0, 2, 3, 5), {})) == pruned
    for leading, layers, kept in (
        *((3, (0, 3, 4), 1), (3, (0, 2, 4), 2), (3, (3, 4, 5), 0)),
        # more than there are: all, and as many above the depth
        *((6, (0, 2, 3, 5), 4), (28, (0, 2, 3, 5), 26), (1, (0, 2, 3, 5), 1)),
    ):
        pruned = prune_config(
            config | {"max_window_layers": leading}, FAMILIES["qwen2"], Selection(layers, {})
        )
        assert pruned["max_window_layers"] == kept, (leading, layers)


@pytest.mark.parametrize(
    ("listed", "step", "layers", "dense"),
    [([1, 4], 1, (0, 1, 3, 4), [1, 3]), ([], 2, (0, 1, 3, 5), [0]), ([5], 2, (0, 1, 3, 5), [0, 3])],
)
def test_layers_of_a_mixture_stay_of_their_kind(listed, step, layers, dense):
    plain = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 1}
    config = plain | {
        "mlp_only_layers": listed,
        "decoder_sparse_step": step,
        "max_window_layers": 0,
    }
    pruned = prune_config(config, FAMILIES["qwen3_moe"], Selection(layers, {}))
    assert (pruned["mlp_only_layers"], pruned["decoder_sparse_step"]) == (dense, 1)
    assert prune_config(config, FAMILIES["qwen3_moe"], Selection(tuple(range(6)), {})) == config
    # It lists none, and keeps to its fields.
    assert prune_config(plain, FAMILIES["qwen3_moe"], Selection((0, 1), {})) == plain | {
        "num_hidden_layers": 2
    }
    # their number is written where the file leaves it out
    experts = Selection((0, 1), {}, {0: KEPT, 1: KEPT})
    assert prune_config(plain, FAMILIES["qwen3_moe"], experts)["num_experts"] == 3


def test_a_shard_of_removed_layers_disappears_from_the_index(tmp_path):
    source, pruned = save(build("llama"), tmp_path / "source", "8KB"), tmp_path / "pruned"
    write_pruned(source, pruned, LLAMA, Selection((0,), {}))
    index = json.loads((pruned / checkpoint.INDEX).read_text())
    files = {path.name for path in pruned.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) < len(
        checkpoint.shards(source)
    )
    assert index["metadata"]["total_size"] == 4 * dimensions.static_cost(pruned).params
    # others can read them
    assert {(pruned / name).stat().st_mode & 0o777 for name in files} == {0o644}


def test_memory_is_one_tensor_whatever_the_size(tmp_path, monkeypatch):
    """No two tensors of the file are alive at once while it is pruned."""
    source = save(build("llama"), tmp_path / "source")
    alive, most, read = weakref.WeakSet(), [], safetensors_io.read_tensor

    def watched(entry):
        tensor = read(entry)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(safetensors_io, "read_tensor", watched)
    write_pruned(source, tmp_path / "pruned", LLAMA, SELECTION)
    assert len(most) > 15 and max(most) <= 2
