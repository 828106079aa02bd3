"""What the criteria for neurons share, of dense models and of experts. Shape letters: importance.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ptl.pruning.layerwise import LayerwiseModel, States, layers_in_turn

ROWS = 256  # of a weight that are converted at once: they stay in the processor's cache
NeuronScores = list[Tensor]  # float32 [F] of each layer, or [E, F] where it has E experts
# Of a layer i, a batch b, its hidden states [B, T, H] and the gradient of the loss by the layer's output: that by its
# input, and each sequence's first-order change of the loss, as a layer's scores are shaped
Backwards = Callable[[LayerwiseModel, int, int, Tensor, Tensor], tuple[Tensor, Iterable[Tensor]]]


@torch.enable_grad()
def first_order_scores(model: LayerwiseModel, _seed: int, *, backwards: Backwards) -> NeuronScores:
    """Mean over the sequences of the size of the loss's first-order change when a neuron is zeroed.

    Source: Molchanov et al. 2019, arXiv 1906.10771.
    Runs backwards layer by layer, each forward pass done again. Host memory: the hidden states of every layer, that is
    (layers + 1) x tokens x hidden size. A GPU holds one layer, and the states of one batch.
    """
    inputs = _inputs_of_layers(model)
    last_states = inputs.pop()
    gradients = _loss_gradients(model, last_states)  # [B, T, H] of each batch, in host memory
    scores = []
    for i, _ in layers_in_turn(model, "taylor, back", backwards=True):
        total = torch.zeros(())
        for b, states in enumerate(inputs.pop()):
            hidden = states.to(model.device).detach().requires_grad_()  # [B, T, H]
            gradient, changes = backwards(model, i, b, hidden, gradients[b].to(model.device))
            gradients[b] = gradient.cpu()
            for change in changes:
                total = total + change.abs().cpu()
        scores.append(total / model.num_sequences)
    return scores[::-1]


@torch.no_grad()
def _inputs_of_layers(model: LayerwiseModel) -> list[States]:
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
                hidden = states[row : row + 1].to(model.device).detach().requires_grad_()  # [1, T, H]
                loss = model.loss(b, row, hidden)
                (gradient,) = torch.autograd.grad(loss, hidden)
                rows.append(gradient.cpu())
            gradients.append(torch.cat(rows))
    return gradients


def column_norms(weight: Tensor) -> Tensor:
    """Norm of each column of a down_proj [H, F]: float32 [F]."""
    squares = torch.zeros(weight.shape[1], device=weight.device)  # [F]
    for rows in weight.split(ROWS):
        row_squares = rows.float().square()  # [ROWS, F]
        squares += row_squares.sum(dim=0)
    return squares.sqrt_()
