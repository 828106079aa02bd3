"""A language model of which one decoder layer at a time is in memory: what is scored may be larger than the machine.

The model is built without weights (on the meta device of torch) and the forward of each layer is replaced once by a
recorder, which keeps what the model gives its layers besides the hidden state (masks, position embeddings, whatever the
family needs). After that the layers run one by one on the hidden states of all batches, or backwards for the gradients
of the loss. Shape letters: importance.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptl.data.sequences import IGNORED, Batch
from ptl.model import axes, checkpoint, pretrained, safetensors_io
from ptl.model.experts import read_parameter
from ptl.model.families import Family

Arguments = dict[str, Any]  # keyword arguments of a module
States = list[Tensor]  # hidden states [B, T, H] of each batch
ROWS = 256  # of a weight that are converted at once: they stay in the processor's cache
NeuronScores = list[Tensor]  # float32 [F] of each layer, or [E, F] where it has E experts


class LayerwiseModel:
    """A checkpoint and the calibration batches that go through it, layer by layer.

    Memory: embeddings (while they are used), one layer, and the hidden states of the batches.
    """

    def __init__(self, folder: Path, family: Family, batches: Sequence[Batch]) -> None:
        from accelerate.utils import set_module_tensor_to_device

        self.family = family
        self.entries = checkpoint.contents(folder)
        # As from_pretrained: in the config's dtype whatever is stored, but for what the architecture keeps in float32
        stored = safetensors_io.dtypes()[self.entries["model.norm.weight"].dtype]
        causal_lm = pretrained.skeleton(
            folder, pretrained.config(folder).dtype or stored, buffers=True
        )
        pretrained.for_generation(causal_lm).eval().requires_grad_(False)
        self.config = causal_lm.config
        kept_in_float32 = tuple(causal_lm._get_dtype_plan(causal_lm.dtype))  # parts of names
        for name, tensor in (*causal_lm.named_parameters(), *causal_lm.named_buffers()):
            if any(map(name.__contains__, kept_in_float32)):
                tensor.data = tensor.data.float()
        # Weights stay on the meta device until a layer is used; buffers and batches are small.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for name in dict(causal_lm.named_buffers()):
            # A router's correction is a buffer that is in the files.
            value = safetensors_io.read_tensor(self.entries[name]) if name in self.entries else None
            set_module_tensor_to_device(causal_lm, name, self.device, value)
        self.causal_lm = causal_lm
        self.decoder = causal_lm.get_decoder()
        self.layers: nn.ModuleList = self.decoder.layers
        self.batches: list[Batch] = []
        for batch in batches:
            on_device = {name: tensor.to(self.device) for name, tensor in batch.items()}
            self.batches.append(on_device)
        # What the decoder gives each layer besides the hidden states, by batch; known once `embed` has run
        self.layer_arguments: dict[int, list[Arguments]] = {}

    def embed(self) -> States:
        """The hidden states before the first layer: [B, T, H] for each batch."""
        states = []
        with torch.no_grad(), self._loaded(self._embeddings()):
            for b, batch in enumerate(self.batches):
                # Runs the whole decoder except its layers.
                with self._recording_layers() as calls:
                    self.decoder(**_inputs(batch))
                self.layer_arguments[b] = [arguments for _, arguments in calls]
                first_input, _ = calls[0]  # [B, T, H]
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
        # Layers of older families return a tuple.
        return output[0] if isinstance(output, tuple) else output

    def tokens(self, batch: int) -> Tensor:
        """Non-padding tokens of each sequence: int64 [B]."""
        return self.batches[batch]["attention_mask"].sum(dim=1)

    @property
    def residual_scale(self) -> float:
        """By which what an MLP gives is multiplied before it is added to the residual stream."""
        field = self.family.residual_scale
        return float(getattr(self.config, field)) if field else 1.0

    @property
    def num_sequences(self) -> int:
        """Sequences of all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Embeddings, last norm and output projection with their weights, for as long as the block lasts."""
        modules = self._embeddings()
        embeddings = self.decoder.embed_tokens
        output = self.causal_lm.get_output_embeddings()
        tied = checkpoint.OUTPUT_LAYER not in self.entries
        if not tied:
            modules["lm_head"] = output
        with self._loaded(modules):
            # Loading replaces a parameter, and so unties the two modules.
            if tied:
                output.weight = embeddings.weight
            yield
        if tied:
            output.weight = embeddings.weight  # on the meta device again

    def loss(self, batch: int, row: int, hidden: Tensor) -> Tensor:
        """Summed loss of one sequence over its labels, from its last hidden state [1, T, H]; needs `head()`."""
        length = int(self.tokens(batch)[row])
        names = ("input_ids", "attention_mask", "labels")
        # [1, length]
        sequence = {name: self.batches[batch][name][row : row + 1, :length] for name in names}
        # The last layer returns these states, and the model continues with its norm and its head.
        with self._recording_layers(output=hidden[:, :length]):
            result = self.causal_lm(**_inputs(sequence))
        predictions = result.logits[0, :-1].float()  # [length - 1, vocabulary]
        targets = sequence["labels"][0, 1:]  # [length - 1]
        return nn.functional.cross_entropy(
            predictions, targets, ignore_index=IGNORED, reduction="sum"
        )

    @contextmanager
    def _recording_layers(
        self, output: Tensor | None = None
    ) -> Iterator[list[tuple[Tensor, Arguments]]]:
        """Layers that compute nothing: each records its call and returns its input, or `output` where it is given."""
        # hidden states [B, T, H], and what a layer gets besides them
        calls: list[tuple[Tensor, Arguments]] = []

        def record(hidden: Tensor, *_: Any, **arguments: Any) -> Tensor:
            calls.append((hidden, arguments))
            return hidden if output is None else output

        for layer in self.layers:
            layer.forward = record
        try:
            yield calls
        finally:
            # Without the attribute of the instance, the method of the class is used again.
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
            for name, parameter in module.named_parameters():
                value = read_parameter(
                    self.entries, f"{prefix}.{name}", self.family.experts, parameter
                )
                # clearing the cache would take longer than the transfer
                set_module_tensor_to_device(module, name, self.device, value, clear_cache=False)
        try:
            yield
        finally:
            for module in modules.values():
                for name in dict(module.named_parameters()):
                    set_module_tensor_to_device(module, name, "meta")


def layers_in_turn(
    model: LayerwiseModel,
    description: str,  # of the progress bar
    *,
    backwards: bool = False,
) -> Iterator[tuple[int, nn.Module]]:
    """Number and module of one layer after the other, each with its weights only in its turn."""
    order = range(len(model.layers))
    for i in tqdm(order[::-1] if backwards else order, desc=description):
        with model.layer(i) as layer:
            yield i, layer


def run_with_activations(
    model: LayerwiseModel, index: int, batch: int, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output [B, T, H], its neurons' activations [B, T, F], and what their products are added up in.

    That is the layer's output, or in families with a norm after down_proj what this norm reads [B, T, H].
    """
    family = model.family
    parts = [family.down_projection]  # reads the activations
    if family.post_norm:
        parts.append(family.post_norm)  # reads the MLP's output
    inputs: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0])

    with ExitStack() as hooks:
        for part in parts:
            module = model.layers[index].get_submodule(part)
            hooks.enter_context(module.register_forward_pre_hook(record))
        output = model.run(index, batch, hidden)
    activations, *before_norm = inputs  # in the order in which the layer runs its parts
    return output, activations, before_norm[0] if before_norm else output


def sequences(model: LayerwiseModel, batch: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows [T, ...] of one sequence after the other in these tensors [B, T, ...], without its padding."""
    for row, length in enumerate(model.tokens(batch)):
        yield tuple(tensor[row, :length] for tensor in tensors)


def _inputs(batch: Batch) -> Arguments:
    """The model's arguments for a batch."""
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "use_cache": False,
    }


# Of a layer i, a batch b and its hidden states [B, T, H]: the layer's output, the values by which the loss is
# differentiated, and what makes of these derivatives each sequence's first-order change of the loss, as a layer's
# scores are shaped
Observed = tuple[Tensor, list[Tensor], Callable[[Sequence[Tensor]], Iterable[Tensor]]]
Observe = Callable[[LayerwiseModel, int, int, Tensor], Observed]


@dataclass(frozen=True)
class UnitScores:
    """Scores of all that may be removed; empty: that is not scored."""

    neurons: NeuronScores
    # of the residual stream's dimensions: float32 [H]
    hidden: Tensor = field(default_factory=lambda: torch.zeros(0))
    # of each layer, of its KV heads: float32 [KV heads]
    kv_heads: list[Tensor] = field(default_factory=list)
    # by the layer's number: float32 [E]
    experts: Mapping[int, Tensor] = field(default_factory=dict)
    layers: Tensor = field(default_factory=lambda: torch.zeros(0))  # float32 [layers]


def first_order_scores(model: LayerwiseModel, _seed: int, *, observe: Observe) -> NeuronScores:
    """Mean over the sequences of the size of the loss's first-order change when a neuron is zeroed."""
    return width_scores(model, observe=observe, masked=False).neurons


@torch.enable_grad()
def width_scores(model: LayerwiseModel, *, observe: Observe, masked: bool = True) -> UnitScores:
    """The same of neurons, dimensions of the residual stream and KV heads, in the same two sweeps.

    Source: Molchanov et al. 2019, arXiv 1906.10771. A dimension is zeroed in all that is written to the stream, the
    embeddings and what attention and MLP of each layer give; a KV head in what its query heads give.
    Runs backwards layer by layer, each forward pass done again. Host memory: the hidden states of every layer, that is
    (layers + 1) x tokens x hidden size. A GPU holds one layer, and the states of one batch.
    """
    inputs = _states_before_layers(model)
    last_states = inputs.pop()
    gradients = _loss_gradients(model, last_states)  # [B, T, H] of each batch, in host memory
    _scale_sources(model, gradients)
    # changes of the loss by a dimension, of each batch: [B, H]
    of_stream = [torch.zeros(())] * len(gradients)
    neurons, kv_heads = [], []
    for i, layer in layers_in_turn(model, "taylor, back", backwards=True):
        total, of_groups = torch.zeros(()), torch.zeros(())
        for b, states in enumerate(inputs.pop()):
            hidden = states.to(model.device).detach().requires_grad_()  # [B, T, H]
            with _masks(layer, hidden, model.config if masked else None) as masks:
                output, values, changes = observe(model, i, b, hidden)
            by_input, *slopes = torch.autograd.grad(
                output, (hidden, *masks, *values), gradients[b].to(model.device)
            )
            gradients[b] = by_input.cpu()
            for change in changes(slopes[len(masks) :]):
                total = total + change.abs().cpu()
            if masked:
                stream, heads = slopes[:2]  # [B, 1, H] and [B, 1, KV heads, 1]
                of_stream[b] = of_stream[b] + stream.flatten(1).float().cpu()
                of_groups = of_groups + heads.flatten(1).float().abs().sum(dim=0).cpu()
                if i == 0:  # what the embeddings write
                    of_stream[b] = of_stream[b] + (states.float() * gradients[b].float()).sum(dim=1)
        neurons.append(total / model.num_sequences)
        kv_heads.append(of_groups / model.num_sequences)
    of_dimensions = sum(
        (change.abs().sum(dim=0) for change in of_stream if masked), torch.zeros(())
    )
    return UnitScores(neurons[::-1], of_dimensions / model.num_sequences, kv_heads[::-1])


@contextmanager
def _masks(layer: nn.Module, hidden: Tensor, config: Any) -> Iterator[tuple[Tensor, ...]]:
    """Ones by which a layer multiplies what it writes to the residual stream, and what its KV heads give.

    [B, 1, H] and [B, 1, KV heads, 1]; `hidden` [B, T, H] goes through the layer. Without a config there are none.
    """
    if config is None:
        yield ()
        return
    attention: Any = layer.self_attn
    ones = partial(torch.ones, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
    stream = ones(len(hidden), 1, hidden.shape[-1])
    heads = ones(len(hidden), 1, axes.kv_heads(config), 1)

    def write(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        return (output[0] * stream, *output[1:]) if isinstance(output, tuple) else output * stream

    def read(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        by_head = arguments[0].unflatten(-1, (heads.shape[2], -1))  # [B, T, KV heads, numbers]
        return ((by_head * heads).flatten(-2),)

    with ExitStack() as hooks:
        writers: list[Any] = [attention, layer.mlp]
        for module in writers:
            hooks.enter_context(module.register_forward_hook(write))
        hooks.enter_context(attention.o_proj.register_forward_pre_hook(read))
        yield stream, heads


@torch.no_grad()
def mean_loss(model: LayerwiseModel) -> float:
    """The loss of a predicted token on the model's batches."""
    states = model.embed()
    for i, _ in layers_in_turn(model, "loss of a candidate"):
        states = [model.run(i, b, hidden) for b, hidden in enumerate(states)]
    total = 0.0
    with model.head():
        for b, hidden in enumerate(states):
            total += sum(
                float(model.loss(b, row, hidden[row : row + 1])) for row in range(len(hidden))
            )
    return total / sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in model.batches)


@torch.no_grad()
def _states_before_layers(model: LayerwiseModel) -> list[States]:
    """Hidden states [B, T, H] before each layer and after the last one, of each batch, in host memory."""
    inputs = [[states.cpu() for states in model.embed()]]
    for i, _ in layers_in_turn(model, "taylor, forwards"):
        outputs = []
        for b, states in enumerate(inputs[-1]):
            # A batch at a time on the GPU, where there is one
            output = model.run(i, b, states.to(model.device))
            outputs.append(output.cpu())
        inputs.append(outputs)
    return inputs


def _loss_gradients(model: LayerwiseModel, last_states: States) -> States:
    """Gradient of the summed loss by the last hidden states: [B, T, H] of each batch on the host, zero at padding."""
    gradients = []
    with model.head():
        for b, states in enumerate(last_states):
            # One sequence at a time: logits are as large as the vocabulary.
            rows: list[Tensor] = []
            for row in range(len(states)):
                # [1, T, H]
                hidden = states[row : row + 1].to(model.device).detach().requires_grad_()
                loss = model.loss(b, row, hidden)
                (gradient,) = torch.autograd.grad(loss, hidden)
                rows.append(gradient.cpu())
            gradients.append(torch.cat(rows))
    return gradients


def _scale_sources(model: LayerwiseModel, gradients: States) -> None:
    """Give the sequences of every source the same mean size of their gradients [B, T, H], in place.

    Prose, of which each token surprises the model, would otherwise outweigh answers that it is sure of many times,
    whatever their shares of the sequences.
    """
    sources = torch.cat([batch["source"].cpu() for batch in model.batches])  # [sequences]
    # [sequences]
    sizes = torch.cat([gradient.float().flatten(1).norm(dim=1) for gradient in gradients])
    means = torch.bincount(sources, sizes) / torch.bincount(sources)  # [sources]
    means = means[sources]  # [sequences]
    factors = means.max() / means.where(means > 0, 1.0)
    for gradient, its in zip(
        gradients, factors.split([len(each) for each in gradients]), strict=True
    ):
        gradient *= its[:, None, None]


def column_norms(weight: Tensor) -> Tensor:
    """Norm of each column of a down_proj [H, F]: float32 [F]."""
    squares = torch.zeros(weight.shape[1], device=weight.device)  # [F]
    for rows in weight.split(ROWS):
        row_squares = rows.float().square()  # [ROWS, F]
        squares += row_squares.sum(dim=0)
    return squares.sqrt_()
