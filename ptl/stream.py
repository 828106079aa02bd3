"""A language model of which one decoder layer at a time is in memory: what is scored may be larger than the machine.

The model is built without weights (on the meta device of torch) and the forward of each layer is replaced once by a
recorder, which keeps what the model gives its layers beside the hidden state (masks, position embeddings, whatever the
family needs). After that the layers run one by one on the hidden states of all batches. Shape letters: importance.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptl import checkpoint, pretrained, safefile
from ptl.data import IGNORED, Batch
from ptl.families import Family


class LayerwiseModel:
    """A checkpoint and the calibration batches that go through it, layer by layer.

    Memory: embeddings (while they are used), one layer, and the hidden states of the batches.
    """

    def __init__(self, folder: Path, family: Family, batches: Sequence[Batch]) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.family = family
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.entries = checkpoint.contents(folder)
        self.dtype = safefile.read(self.entries["model.norm.weight"]).dtype
        with init_empty_weights(include_buffers=False):  # buffers follow from the config and are not in the file
            self.model: Any = AutoModelForCausalLM.from_config(
                pretrained.config(folder), dtype=self.dtype, trust_remote_code=False
            )
        self.model.eval().requires_grad_(False)
        self.layers: nn.ModuleList = self.model.get_decoder().layers
        self.batches = [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches]
        self.calls: list[list[dict[str, Any]]] = [[] for _ in batches]  # of each batch: each layer's other arguments
        for name, buffer in self.model.named_buffers():
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent)._buffers[leaf] = buffer.to(self.device)

    def embed(self) -> list[Tensor]:
        """The hidden states before the first layer: [B, T, H] for each batch."""
        states = []
        with torch.no_grad(), self._outer(head=False):
            for index, batch in enumerate(self.batches):
                seen: list[tuple[Tensor, dict[str, Any]]] = []
                self._around(batch, None, seen, head=False)
                self.calls[index] = [kwargs for _, kwargs in seen]
                states.append(seen[0][0])
        return states

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One layer with its weights, for as long as the block lasts."""
        layer = self.layers[index]
        self._fill(layer, f"model.layers.{index}.")
        try:
            yield layer
        finally:
            layer.to("meta")

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, H] of a batch through a layer that is in memory."""
        output = self.layers[index](hidden, **self.calls[batch][index])
        return output[0] if isinstance(output, tuple) else output

    def tokens(self, batch: int) -> Tensor:
        """Non-padding tokens of each sequence: int64 [B]."""
        return self.batches[batch]["attention_mask"].sum(dim=1)

    def predicted(self, batch: int) -> Tensor:
        """Tokens of each sequence that count in `loss`: int64 [B]; the first token is predicted from nothing."""
        return (self.batches[batch]["labels"][:, 1:] != IGNORED).sum(dim=1)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Embeddings, last norm and output projection with their weights, for as long as the block lasts."""
        with self._outer(head=True):
            yield

    def loss(self, batch: int, row: int, hidden: Tensor) -> Tensor:
        """Summed loss of one sequence over its labels, from its last hidden state [1, T, H]; needs `head()`."""
        length = int(self.tokens(batch)[row])
        one = {name: tensor[row : row + 1, :length] for name, tensor in self.batches[batch].items()}
        logits = self._around(one, hidden[:, :length], [], head=True).logits
        wanted = one["labels"][0, 1:]
        return nn.functional.cross_entropy(logits[0, :-1].float(), wanted, ignore_index=IGNORED, reduction="sum")

    def _around(
        self, batch: Batch, last: Tensor | None, seen: list[tuple[Tensor, dict[str, Any]]], *, head: bool
    ) -> Any:
        """Run everything but the layers: each records its input, and with `last` gives that as its output."""

        def record(hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
            seen.append((hidden, kwargs))
            return hidden if last is None else last

        for layer in self.layers:
            layer.forward = record
        try:
            run = self.model if head else self.model.get_decoder()
            return run(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward

    @contextmanager
    def _outer(self, head: bool) -> Iterator[None]:
        decoder = self.model.get_decoder()
        filled = [decoder.embed_tokens, decoder.norm]
        self._fill(decoder.embed_tokens, "model.embed_tokens.")
        self._fill(decoder.norm, "model.norm.")
        if head:
            output = self.model.get_output_embeddings()
            if "lm_head.weight" in self.entries:
                self._fill(output, "lm_head.")
            else:
                output.weight = decoder.embed_tokens.weight
            filled.append(output)
        try:
            yield
        finally:
            for module in filled:
                buffers = dict(module.named_buffers(recurse=False))
                module.to("meta")
                module._buffers.update(buffers)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module its weights from the files."""
        for name, _ in list(module.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            value = safefile.read(self.entries[prefix + name]).to(self.device)
            module.get_submodule(parent)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
