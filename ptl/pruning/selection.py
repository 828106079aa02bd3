"""What is removed: neurons, layers or experts by their scores, or what costs less measured loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ptl.config.schedule import Prune
from ptl.errors import InputError
from ptl.model.dimensions import ModelDimensions, experts_for, layers_for, resolve_multiple, width_for
from ptl.pruning.expert_scores import expert_scores
from ptl.pruning.importance import keep_highest, layer_scores, neuron_scores, num_redundant
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.scoring import NeuronScores
from ptl.pruning.surgery import Selection
from ptl.pruning.variant_losses import PrunedVariant, losses


@dataclass(frozen=True)
class SelectionTask:
    """One selection to be made, of a model that has more parameters than the goal."""

    model: LayerwiseModel
    dimensions: ModelDimensions  # of that model
    settings: Prune
    goal: int  # parameters to get down to
    seed: int  # of random scores


def check_goal(
    unit: str,  # one of CHOICES
    dimensions: ModelDimensions,
    settings: Prune,
    goal: int,  # parameters
) -> None:
    """Raise InputError for a goal that neurons, layers or experts alone cannot reach: before any text is read."""
    if unit == "neurons":
        _width(dimensions, settings, goal)
    elif unit == "layers":
        layers_for(dimensions, goal)
    elif unit == "experts":
        experts_for(dimensions, goal)


def neurons(task: SelectionTask) -> Selection:
    """Remove the lowest-scored neurons of each layer, or of each of its experts, as many in each.

    By budget, or below the threshold if that is fewer.
    """
    dimensions = task.dimensions
    settings = task.settings
    width = _width(dimensions, settings, task.goal)
    scores = neuron_scores(task.model, settings.criterion, task.seed)  # [F] of each layer, or [E, F]
    sigma = settings.sigma_neuron
    if sigma is not None:
        # One width serves all layers and experts: the one with the fewest redundant neurons decides.
        groups = [neurons for layer in scores for neurons in layer.view(-1, dimensions.width)]
        needed = dimensions.width - min(num_redundant(neurons, sigma) for neurons in groups)
        multiple, ranks = settings.width_multiple, settings.tensor_parallel
        step = resolve_multiple(dimensions.width, width, multiple, ranks, dimensions.least_multiple)
        needed += -needed % step  # up to the next multiple; beyond today's width all neurons stay
        width = max(width, needed)
    return _keep_neurons(range(dimensions.layers), scores, width)


def layers(task: SelectionTask) -> Selection:
    """Remove the lowest-scored layers: by budget, or below the threshold if that is fewer."""
    count = layers_for(task.dimensions, task.goal)
    scores = layer_scores(task.model, task.settings.layer_criterion)  # [layers]
    scores[list(task.dimensions.dense_layers)] = math.inf  # these stay: a layer with experts is many times larger
    sigma = task.settings.sigma_layer
    if sigma is not None:
        count = min(count, num_redundant(scores, sigma))
    kept = keep_highest(scores, task.dimensions.layers - count)
    return Selection(tuple(kept.tolist()), {})


def experts(task: SelectionTask) -> Selection:
    """Remove the lowest-scored experts of each layer, as many in each, and as many in each group of a layer."""
    number = experts_for(task.dimensions, task.goal)
    scores = expert_scores(task.model, task.settings.criterion, task.seed)
    groups = task.dimensions.expert_groups
    kept = {layer: _keep_of_groups(of_layer, number, groups) for layer, of_layer in scores.items()}
    return Selection(tuple(range(task.dimensions.layers)), {}, kept)


def _keep_of_groups(scores: Tensor, number: int, groups: int) -> Tensor:
    """The highest-scored experts, as many of each group; ascending int64 [number]."""
    size = len(scores) // groups  # of a group; its experts follow each other
    kept = [
        start + keep_highest(of_group, number // groups)
        for start, of_group in zip(range(0, len(scores), size), scores.split(size), strict=True)
    ]
    return torch.cat(kept)


def cheapest(task: SelectionTask) -> Selection:
    """Remove layers as long as the best one costs less loss per parameter than neurons do, then neurons to the goal.

    Greedy: after each removed layer everything is measured again. A layer is tried while at least half of one is still
    to be removed; its loss is measured without the layers removed before it.
    """
    scores = neuron_scores(task.model, task.settings.criterion, task.seed)
    kept = list(range(task.dimensions.layers))
    while (layer := _cheapest_layer(task, scores, kept)) is not None:
        kept.remove(layer)
    # Whole layers rarely hit the goal exactly: neurons close the gap.
    remaining = _with_layers(task.dimensions, len(kept))
    width = _width(remaining, task.settings, task.goal)
    if width == remaining.width:
        return Selection(tuple(kept), {})
    return _keep_neurons(kept, scores, width)


# By the unit that an iteration removes
CHOICES = {
    "neurons": neurons,
    "layers": layers,
    "auto": cheapest,
    "experts": experts,
}


def _cheapest_layer(
    task: SelectionTask,
    scores: NeuronScores,
    kept: list[int],  # layers that are not removed yet
) -> int | None:
    """Of the layers still kept the one whose removal costs the least loss per parameter.

    None where less than half a layer is still to be removed, or where neurons cost no more.
    """
    remaining = _with_layers(task.dimensions, len(kept))
    layer_params = remaining.params_per_layer
    excess = remaining.params - task.goal
    if excess < layer_params / 2 or remaining.layers == 1:
        return None

    # The reference, then each of the layers removed, and last as many parameters in neurons
    removed = frozenset(range(task.dimensions.layers)).difference(kept)
    variants = [PrunedVariant(removed)]
    variants += [PrunedVariant(removed | {layer}) for layer in kept]
    width = _width_like_a_layer(task, remaining)
    if width is not None:
        narrow = _keep_neurons(kept, scores, width)
        variants.append(PrunedVariant(removed, narrow.neurons))
    mean_losses = losses(task.model, variants).mean(dim=1)  # [variants]
    reference, *measured = mean_losses.tolist()

    # Loss per parameter, so that a layer and a few neurons compare
    costs = [(loss - reference) / layer_params for loss in measured[: len(kept)]]
    lowest_cost = min(costs)
    if width is not None:
        neuron_params = (remaining.width - width) * remaining.params_per_neuron
        if (measured[-1] - reference) / neuron_params <= lowest_cost:
            return None
    return kept[costs.index(lowest_cost)]


def _width_like_a_layer(task: SelectionTask, remaining: ModelDimensions) -> int | None:
    """The width that saves about as much as a layer; None where neurons cannot save that much."""
    # But not more than the goal asks for
    goal = max(task.goal, remaining.params - remaining.params_per_layer)
    with suppress(InputError):
        return _width(remaining, task.settings, goal)
    return None


def _keep_neurons(kept: Iterable[int], scores: NeuronScores, width: int) -> Selection:
    """These layers with their `width` highest-scored neurons, or with those of each of their experts."""
    highest = {layer: keep_highest(scores[layer], width) for layer in kept}
    return Selection(tuple(highest), highest)


def _width(dimensions: ModelDimensions, settings: Prune, goal: int) -> int:
    """The FFN width that the goal asks for. Raises InputError where neurons alone cannot reach it."""
    return width_for(dimensions, goal, settings.width_multiple, settings.tensor_parallel)


def _with_layers(dimensions: ModelDimensions, layers: int) -> ModelDimensions:
    """Sizes when only so many layers are left."""
    removed = dimensions.layers - layers
    # A neuron has as many parameters in every layer.
    per_neuron_and_layer = dimensions.params_per_neuron // dimensions.layers
    return dataclasses.replace(
        dimensions,
        params=dimensions.params - removed * dimensions.params_per_layer,
        layers=layers,
        params_per_neuron=per_neuron_and_layer * layers,
    )
