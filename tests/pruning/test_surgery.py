"""Cutting weights, Adam's moments and config together; what every family has in common is in test_families.py."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import batches, build, logits, save
from transformers import AutoModelForCausalLM

from ptl.model import checkpoint, dimensions
from ptl.model.families import FAMILIES
from ptl.pruning.surgery import Selection, prune_config, pruned_tensor, write_pruned

LLAMA = FAMILIES["llama"]
ALL = tuple(range(4))
KEPT = torch.tensor([0, 2, 3])
CUT = Selection((0, 2), {0: KEPT, 2: KEPT + 1})


def prune_tensor(name, tensor, family, selection):
    """New name and value of a tensor; None where its layer goes."""
    pruned = pruned_tensor(name, tensor.shape, family, selection)
    return None if pruned is None else (pruned.name, pruned.values(tensor))


@pytest.mark.parametrize("moment", ["", "exp_avg.", "exp_avg_sq."])
def test_rows_and_columns_of_a_tensor_and_of_its_moments(moment):
    tensor = torch.arange(30.0).view(6, 5)
    name = f"{moment}model.layers.2.mlp.gate_proj.weight"
    new, rows = prune_tensor(name, tensor, LLAMA, CUT)
    assert new == f"{moment}model.layers.1.mlp.gate_proj.weight" and torch.equal(rows, tensor[[1, 3, 4]])
    _, columns = prune_tensor(f"{moment}model.layers.0.mlp.down_proj.weight", tensor.t(), LLAMA, CUT)
    assert torch.equal(columns, tensor.t()[:, [0, 2, 3]]) and columns.is_contiguous()


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("model.layers.2.mlp.down_proj.bias", "model.layers.1.mlp.down_proj.bias"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("step", "step"),
    ],
)
def test_other_tensors_only_move(name, new):
    tensor = torch.rand(6)
    assert prune_tensor(name, tensor, LLAMA, CUT) == (new, tensor)


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.3.mlp.up_proj.weight"])
def test_tensors_of_removed_layers_go(name):
    assert prune_tensor(name, torch.rand(6, 2), LLAMA, CUT) is None
    assert prune_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.rand(2), LLAMA, CUT) is None


def test_both_blocks_of_a_fused_tensor_are_cut():
    fused = torch.arange(20.0).view(10, 2)  # gate rows 0-4, up rows 5-9
    _, cut = prune_tensor("model.layers.0.mlp.gate_up_proj.weight", fused, FAMILIES["phi3"], CUT)
    assert torch.equal(cut, fused[[0, 2, 3, 5, 7, 8]])


def test_config_counts_of_leading_layers():
    config = {"num_hidden_layers": 6, "intermediate_size": 8, "max_window_layers": 3, "layer_types": list("aaabbb")}
    cut = prune_config(config, FAMILIES["qwen2"], Selection((0, 2, 4, 5), {}))
    assert cut == {
        "num_hidden_layers": 4,
        "intermediate_size": 8,
        "max_window_layers": 2,
        "layer_types": list("aabb"),
    }
    beyond = prune_config({**config, "max_window_layers": 28}, FAMILIES["qwen2"], Selection((0, 5), {}))
    assert beyond["max_window_layers"] >= beyond["num_hidden_layers"]


def test_adam_moments_are_cut_with_the_weights(tmp_path):
    model = build("llama")
    source = save(model, tmp_path / "source")
    names = [name for name, _ in model.named_parameters()]
    # each moment is a known function of its weight, so that after the cut it must still be
    state = {f"exp_avg.{name}": p.detach() * 2 for name, p in model.named_parameters()}
    state |= {f"exp_avg_sq.{name}": p.detach() ** 2 for name, p in model.named_parameters()}
    checkpoint.write_shard(source / checkpoint.STATE, state | {"step": torch.tensor(7.0)})
    write_pruned(source, tmp_path / "cut", LLAMA, Selection((0, 1, 3), dict.fromkeys((0, 1, 3), KEPT)))
    weights = dict(checkpoint.tensors(tmp_path / "cut/model.safetensors"))
    after = dict(checkpoint.tensors(tmp_path / "cut" / checkpoint.STATE))
    assert after.pop("step") == 7 and len(after) == 2 * len(weights) < 2 * len(names)
    for name, weight in weights.items():
        assert torch.equal(after[f"exp_avg.{name}"], weight * 2)
        assert torch.equal(after[f"exp_avg_sq.{name}"], weight**2)


def test_a_shard_of_removed_layers_disappears_from_the_index(tmp_path):
    source = save(build("llama"), tmp_path / "source", "8KB")
    write_pruned(source, tmp_path / "cut", LLAMA, Selection((0,), {}))
    index = json.loads((tmp_path / "cut" / checkpoint.INDEX).read_text())
    files = {path.name for path in (tmp_path / "cut").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) < len(checkpoint.shards(source))
    assert index["metadata"]["total_size"] == 4 * dimensions.static_cost(tmp_path / "cut").params


def test_weight_files_can_be_read_by_others(tmp_path):
    write_pruned(save(build("llama"), tmp_path / "source"), tmp_path / "cut", LLAMA, Selection(ALL, {}))
    assert (tmp_path / "cut/model.safetensors").stat().st_mode & 0o777 == 0o644


LOADED_ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([[3, 9, 4, 1, 7]])
out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
with torch.no_grad():
    torch.save({"generated": out, "logits": model(ids).logits}, sys.argv[2])
"""


@pytest.mark.slow
def test_a_new_process_loads_it_and_generates_with_the_cache(tmp_path):
    write_pruned(save(build("llama"), tmp_path / "source"), tmp_path / "cut", LLAMA, CUT)
    subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, tmp_path / "cut", tmp_path / "out.pt"], check=True, capture_output=True
    )
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    there = torch.load(tmp_path / "out.pt")
    ids = torch.tensor([[3, 9, 4, 1, 7]])
    generated = here.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(there["generated"], generated)
    torch.testing.assert_close(there["logits"], here(ids).logits, rtol=1e-5, atol=1e-5)


def test_memory_is_one_tensor_whatever_the_size(tmp_path, monkeypatch):
    """No two tensors of the file are alive at once while it is cut."""
    import weakref

    from ptl.model import safetensors_io

    source = save(build("llama"), tmp_path / "source")
    alive, most, read = weakref.WeakSet(), [], safetensors_io.read_tensor

    def watched(entry):
        tensor = read(entry)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(safetensors_io, "read_tensor", watched)
    write_pruned(source, tmp_path / "cut", LLAMA, CUT)
    assert len(most) > 15 and max(most) <= 2
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "cut"), batches()[0]).shape
