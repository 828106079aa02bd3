"""The straightforward way to do one neuron iteration, with everything in memory; see prune_scale.py."""

import json
from pathlib import Path

import torch


def prune_in_memory(src, dst, batches, remove):
    """Load the model, score every layer in one forward pass, cut the modules, save."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(src, dtype="auto").eval()
    layers = model.model.layers
    scores = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]

    def watch(i, norms):
        def hook(_module, inputs):
            scores[i] = torch.maximum(
                scores[i], (inputs[0].float().abs() * norms).flatten(0, 1).amax(dim=0)
            )

        return hook

    for i, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            watch(i, layer.mlp.down_proj.weight.float().norm(dim=0))
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
        for layer, score in zip(layers, scores, strict=True):
            kept = (
                torch.sort(score, descending=True, stable=True)
                .indices[: len(score) - remove]
                .sort()
                .values
            )
            mlp = layer.mlp
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight = torch.nn.Parameter(linear.weight[kept])
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, kept].contiguous())
    model.config.intermediate_size -= remove
    model.save_pretrained(dst)
    return json.loads((Path(dst) / "config.json").read_text())["intermediate_size"]
