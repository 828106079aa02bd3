"""A language model of which one decoder layer at a time is in memory: what is scored may be larger than the machine.

The model is built without weights (on the meta device of torch) and the forward of each layer is replaced once by a
recorder, which keeps what the model gives its layers beside the hidden state (masks, position embeddings, whatever the
family needs). After that the layers run one by one on the hidden states of all batches. Shape letters: importance.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptl import checkpoint, pretrained, safefile
from ptl.data import IGNORED, Batch
from ptl.families import Family

LayerCall = tuple[Tensor, dict[str, Any]]  # hidden states [B, T, H] and the other arguments of a layer


class LayerwiseModel:
    """A checkpoint and the calibration batches that go through it, layer by layer.

    Memory: embeddings (while they are used), one layer, and the hidden states of the batches.
    """

    def __init__(self, folder: Path, family: Family, batches: Sequence[Batch]) -> None:
        from accelerate import init_empty_weights
        from accelerate.utils import set_module_tensor_to_device
        from transformers import AutoModelForCausalLM

        self.family = family
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.entries = checkpoint.contents(folder)
        self.config = pretrained.config(folder)
        dtype = safefile.dtypes()[self.entries["model.norm.weight"].dtype]
        with init_empty_weights(include_buffers=False):  # buffers follow from the config and are not in the file
            self.causal_lm: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=False)
        self.causal_lm.eval().requires_grad_(False)
        self.decoder = self.causal_lm.get_decoder()
        self.layers: nn.ModuleList = self.decoder.layers
        for name, _ in list(self.causal_lm.named_buffers()):
            set_module_tensor_to_device(self.causal_lm, name, self.device)
        self.batches = [_on_device(batch, self.device) for batch in batches]
        # What the decoder gives each layer beside the hidden states, by batch; known once `embed` has run
        self.layer_arguments: list[list[dict[str, Any]]] = [[] for _ in batches]

    def embed(self) -> list[Tensor]:
        """The hidden states before the first layer: [B, T, H] for each batch."""
        states = []
        with torch.no_grad(), self._loaded(self._embeddings()):
            for b, batch in enumerate(self.batches):
                with self._recording_layers() as calls:
                    self.decoder(**_inputs(batch))
                self.layer_arguments[b] = [arguments for _, arguments in calls]
                first_input, _ = calls[0]
                states.append(first_input)
        return states

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One layer with its weights, for as long as the block lasts."""
        layer = self.layers[index]
        with self._loaded({f"model.layers.{index}": layer}):
            yield layer

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, H] of a batch through a layer that is in memory."""
        output = self.layers[index](hidden, **self.layer_arguments[batch][index])
        return output[0] if isinstance(output, tuple) else output

    def tokens(self, batch: int) -> Tensor:
        """Non-padding tokens of each sequence: int64 [B]."""
        return self.batches[batch]["attention_mask"].sum(dim=1)

    def predicted(self, batch: int) -> Tensor:
        """Tokens of each sequence that count in `loss`: int64 [B]; the first token is predicted from nothing."""
        return (self.batches[batch]["labels"][:, 1:] != IGNORED).sum(dim=1)

    @property
    def num_sequences(self) -> int:
        """Sequences of all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Embeddings, last norm and output projection with their weights, for as long as the block lasts."""
        modules = self._embeddings()
        output = self.causal_lm.get_output_embeddings()
        tied = "lm_head.weight" not in self.entries
        if not tied:
            modules["lm_head"] = output
        with self._loaded(modules):
            if tied:
                output.weight = self.decoder.embed_tokens.weight
            yield
        if tied:
            output.weight = self.decoder.embed_tokens.weight  # without values again

    def loss(self, batch: int, row: int, hidden: Tensor) -> Tensor:
        """Summed loss of one sequence over its labels, from its last hidden state [1, T, H]; needs `head()`."""
        length = int(self.tokens(batch)[row])
        sequence = {name: tensor[row : row + 1, :length] for name, tensor in self.batches[batch].items()}
        with self._recording_layers(output=hidden[:, :length]):
            logits = self.causal_lm(**_inputs(sequence)).logits  # [1, length, vocabulary]
        predictions = logits[0, :-1].float()
        targets = sequence["labels"][0, 1:]
        return nn.functional.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")

    @contextmanager
    def _recording_layers(self, output: Tensor | None = None) -> Iterator[list[LayerCall]]:
        """Layers that compute nothing: each records its call and returns its input, or `output` where it is given."""
        calls: list[LayerCall] = []

        def record(hidden: Tensor, *_: Any, **arguments: Any) -> Tensor:
            calls.append((hidden, arguments))
            return hidden if output is None else output

        for layer in self.layers:
            layer.forward = record
        try:
            yield calls
        finally:
            for layer in self.layers:
                del layer.forward

    def _embeddings(self) -> dict[str, nn.Module]:
        """The modules around the layers, by the prefix of their tensors; the output projection is left to `head`."""
        return {"model.embed_tokens": self.decoder.embed_tokens, "model.norm": self.decoder.norm}

    @contextmanager
    def _loaded(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Modules, by the prefix of their tensors, with the weights of the files for as long as the block lasts."""
        from accelerate.utils import set_module_tensor_to_device

        for prefix, module in modules.items():
            for name in _parameter_names(module):
                value = safefile.read(self.entries[f"{prefix}.{name}"])
                # Emptying the GPU's cache after each tensor would cost more than reading it.
                set_module_tensor_to_device(module, name, self.device, value, dtype=value.dtype, clear_cache=False)
        try:
            yield
        finally:
            for module in modules.values():
                for name in _parameter_names(module):
                    set_module_tensor_to_device(module, name, "meta")


def layers_in_turn(
    model: LayerwiseModel, description: str, progress: bool, *, backwards: bool = False
) -> Iterator[tuple[int, nn.Module]]:
    """Number and module of one layer after the other, each with its weights only in its turn."""
    order = range(len(model.layers))
    if backwards:
        order = order[::-1]
    for i in tqdm(order, desc=description, disable=not progress):
        with model.layer(i) as layer:
            yield i, layer


def run_recording(model: LayerwiseModel, index: int, batch: int, hidden: Tensor, *parts: str) -> tuple[Tensor, ...]:
    """The layer's output [B, T, H], and the input [B, T, ...] of each of these parts of the layer."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for part in parts:

        def record(_module: nn.Module, arguments: tuple[Any, ...], part: str = part) -> None:
            inputs[part] = arguments[0]

        module = model.layers[index].get_submodule(part)
        handles.append(module.register_forward_pre_hook(record))
    try:
        output = model.run(index, batch, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return (output, *(inputs[part] for part in parts))


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _inputs(batch: Batch) -> dict[str, Any]:
    """The model's arguments for a batch."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def _parameter_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]
