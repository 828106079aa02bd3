"""Other ways to choose what goes of hidden size, FFN and KV heads: as many as by ptl's rule, with our recovery.

    pip install --no-deps torch-pruning   # for its arms alone
    python benchmarks/depth.py measure --shares 0.65 0.75 --arms "one-shot, width" "one-shot, width, minitron"

minitron: means over a sequence of what the norms on the residual stream, neurons and KV heads give, and their L2 norm
over the sequences (arXiv 2407.14679, section 2.2). norm: L2 norms of the weights. Both go with ptl's surgery.
torch-pruning: its dependency graph, group magnitude and surgery, of neurons and hidden size; before that, of KV heads
those with the least norms go. torch-pruning magnitude and taylor: of neurons alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loops import Cut, Subject
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.config.schedule import Prune, Unit
from ptl.data.sequences import calibration_batches
from ptl.model import checkpoint
from ptl.model.axes import head_size
from ptl.model.dimensions import ModelDimensions, model_dimensions
from ptl.model.families import family_of
from ptl.pruning.layerwise import UnitScores
from ptl.pruning.prune import prune_checkpoint, select_units
from ptl.pruning.surgery import write_pruned


def by(kind: str, subject: Subject, prune: Prune, seed: int) -> Cut:
    """One cut of the dense model to the sizes that ptl's own rule chooses, as `loops.run` asks for it."""

    def cut(src: Path, dst: Path, unit: Unit, goal: int, end: int) -> int:
        with tempfile.TemporaryDirectory() as name:
            ours = Path(name) / "ours"
            settings = {"unit": unit, "goal": goal, "end": end, "seed": seed, "chat": subject.chat}
            prune_checkpoint(src, ours, prune, subject.calibration, **settings)
            sizes = model_dimensions(ours, family_of(checkpoint.read_config(src)))
        tokenizer = AutoTokenizer.from_pretrained(src)
        batches = calibration_batches(subject.calibration, tokenizer, seed, subject.chat)
        if kind == "torch-pruning":
            _torch_pruning(src, dst, sizes)
        elif kind in OF_NEURONS:
            _torch_pruning_of_neurons(
                src, dst, sizes.width, batches if kind.endswith("taylor") else []
            )
        else:
            _write(src, dst, KINDS[kind](src, batches, seed), sizes)
        return 0

    return cut


def _write(src: Path, dst: Path, scores: UnitScores, sizes: ModelDimensions) -> None:
    family = family_of(checkpoint.read_config(src))
    write_pruned(src, dst, family, select_units(scores, model_dimensions(src, family), sizes))


def _blank(src: Path) -> tuple[Any, UnitScores]:
    model = AutoModelForCausalLM.from_pretrained(src).eval()
    config = model.config
    layers = range(config.num_hidden_layers)
    scores = UnitScores(
        [torch.zeros(config.intermediate_size) for _ in layers],
        torch.zeros(config.hidden_size),
        [torch.zeros(config.num_key_value_heads) for _ in layers],
    )
    return model, scores


@torch.no_grad()
def _minitron(src: Path, batches: Any, _seed: int) -> UnitScores:
    model, scores = _blank(src)

    def add(total: Tensor, values: Tensor) -> None:
        """Take in what one sequence gives: [1, T, units], or [1, T, units, numbers of each]."""
        sizes = values.norm(dim=-1) if values.dim() == 4 else values.abs()
        total.add_(sizes.mean(dim=(0, 1)).square())

    def norm(_module: Any, _inputs: Any, output: Tensor) -> None:
        add(scores.hidden, output)

    with ExitStack() as hooks:
        for i, layer in enumerate(model.model.layers):
            kv_heads = len(scores.kv_heads[i])
            readers = {
                layer.mlp.down_proj: lambda _m, x, i=i: add(scores.neurons[i], x[0]),
                layer.self_attn.o_proj: lambda _m, x, i=i, n=kv_heads: add(
                    scores.kv_heads[i], x[0].unflatten(-1, (n, -1))
                ),
            }
            for module, hook in readers.items():
                hooks.enter_context(module.register_forward_pre_hook(hook))
            for module in (layer.input_layernorm, layer.post_attention_layernorm):
                hooks.enter_context(module.register_forward_hook(norm))
        for sequence in _sequences(batches):
            model(input_ids=sequence)
    return scores


def _sequences(batches: Any) -> Iterator[Tensor]:
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield ids[: mask.sum()][None]


@torch.no_grad()
def _norm(src: Path, _batches: Any, _seed: int) -> UnitScores:
    model, scores = _blank(src)
    scores.hidden.add_(model.model.embed_tokens.weight.square().sum(dim=0))
    for i, layer in enumerate(model.model.layers):
        # [H, F] and [H, heads]
        down, out = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
        scores.hidden.add_(down.square().sum(dim=1) + out.square().sum(dim=1))
        scores.neurons[i].add_(down.square().sum(dim=0))
        scores.kv_heads[i].add_(
            out.square().sum(dim=0).unflatten(0, (len(scores.kv_heads[i]), -1)).sum(dim=1)
        )
    return scores


def _random(src: Path, _batches: Any, seed: int) -> UnitScores:
    _, scores = _blank(src)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*scores.neurons, scores.hidden, *scores.kv_heads):
        tensor.uniform_(generator=generator)
    return scores


def _torch_pruning(src: Path, dst: Path, sizes: ModelDimensions) -> None:
    """Magnitude: neurons and hidden size to the same numbers, each by the root modules that their groups begin with."""
    import torch_pruning as tp

    class RmsNorm(tp.pruner.function.LayernormPruner):
        """As its own of layer norms, for modules that have a weight and no more."""

        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            kept = sorted(set(range(len(layer.weight))) - set(idxs))
            layer.weight = torch.nn.Parameter(layer.weight.data[kept])
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return len(layer.weight)

        prune_in_channels, get_in_channels = prune_out_channels, get_out_channels

    with tempfile.TemporaryDirectory() as name:
        fewer = replace(
            model_dimensions(src, family_of(checkpoint.read_config(src))), kv_heads=sizes.kv_heads
        )
        _write(src, Path(name), _norm(src, None, 0), fewer)
        model = AutoModelForCausalLM.from_pretrained(name).eval()
    width, hidden = model.config.intermediate_size, model.config.hidden_size
    ratios = {layer.mlp.gate_proj: 1 - (sizes.width + 0.5) / width for layer in model.model.layers}
    ratios[model.model.embed_tokens] = 1 - (sizes.hidden + 0.5) / hidden
    attention = [part for layer in model.model.layers for part in _projections(layer.self_attn)]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.zeros(1, 8, dtype=torch.long),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=attention,
        forward_fn=lambda it, ids: it(input_ids=ids, use_cache=False).logits,
        root_module_types=[torch.nn.Embedding, torch.nn.Linear],
        customized_pruners={type(model.model.norm): RmsNorm()},
    )
    pruner.step()
    head = head_size(model.config)  # which a config without it derives from the hidden size
    model.config.update(
        {"intermediate_size": sizes.width, "hidden_size": sizes.hidden, "head_dim": head}
    )
    assert model.model.embed_tokens.embedding_dim == sizes.hidden
    model.save_pretrained(dst)
    checkpoint.copy_companions(src, dst)


def _torch_pruning_of_neurons(src: Path, dst: Path, width: int, batches: Any) -> None:
    """The FFN alone, by its group magnitude, or by its group Taylor on the gradients of the batches that there are."""
    import torch_pruning as tp

    model = AutoModelForCausalLM.from_pretrained(src).eval()
    model.config.use_cache = False
    for batch in batches:
        model(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        ).loss.backward()
    importance = (
        tp.importance.GroupTaylorImportance if batches else tp.importance.GroupMagnitudeImportance
    )
    outer = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    inner = {
        id(module)
        for layer in model.model.layers
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj)
    }
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.zeros(1, 8, dtype=torch.long),
        importance=importance(),
        pruning_ratio=1 - (width + 0.5) / model.config.intermediate_size,  # it rounds the rest down
        ignored_layers=[module for module in outer if id(module) not in inner],
        forward_fn=lambda it, ids: it(input_ids=ids, use_cache=False).logits,
    )
    pruner.step()
    assert {layer.mlp.gate_proj.out_features for layer in model.model.layers} == {width}
    model.config.update({"intermediate_size": width, "use_cache": True})
    model.save_pretrained(dst)
    checkpoint.copy_companions(src, dst)


def _projections(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


KINDS: dict[str, Callable[[Path, Any, int], UnitScores]] = {
    "minitron": _minitron,
    "norm": _norm,
    "random": _random,
}
OF_NEURONS = ("torch-pruning magnitude", "torch-pruning taylor")
PEERS = {name: partial(by, name) for name in (*KINDS, "torch-pruning", *OF_NEURONS)}
