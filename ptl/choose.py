"""What goes: neurons by their scores, layers by their scores, or whichever costs less measured loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ptl import importance
from ptl.anatomy import ModelDimensions, layers_for, resolve_multiple, width_for
from ptl.config import Prune
from ptl.errors import InputError
from ptl.measure import Variant, losses
from ptl.stream import LayerwiseModel
from ptl.surgery import Selection


@dataclass(frozen=True)
class SelectionTask:
    """One cut to be chosen: the model's sizes, the rules, and the number of parameters to get down to."""

    body: ModelDimensions
    settings: Prune
    goal: int
    seed: int
    stream: Callable[[], LayerwiseModel]  # made when first needed: some cuts are nothing


def neurons(task: SelectionTask) -> Selection:
    """The lowest-scored neurons of each layer, as many in each: by budget, or below the threshold if that is fewer."""
    every = tuple(range(task.body.layers))
    width = _width(task.settings, task.body, task.goal)
    if width == task.body.width:
        return Selection(every, {})
    scores = importance.neuron_scores(task.stream(), task.settings.criterion, task.seed)
    if task.settings.sigma_neuron is not None:
        needed = task.body.width - min(importance.num_redundant(layer, task.settings.sigma_neuron) for layer in scores)
        step = resolve_multiple(task.body.width, task.settings.width_multiple, task.settings.tensor_parallel)
        width = min(max(width, needed + -needed % step), task.body.width)
    return Selection(every, {i: importance.keep_highest(layer, width) for i, layer in enumerate(scores)})


def layers(task: SelectionTask) -> Selection:
    """The lowest-scored layers: by budget, or below the threshold if that is fewer."""
    count = layers_for(task.body, task.goal)
    if count == 0:
        return Selection(tuple(range(task.body.layers)), {})
    scores = importance.layer_scores(task.stream(), task.settings.layer_criterion)
    if task.settings.sigma_layer is not None:
        count = min(count, importance.num_redundant(scores, task.settings.sigma_layer))
    kept = importance.keep_highest(scores, task.body.layers - count)
    return Selection(tuple(kept.tolist()), {})


def cheapest(task: SelectionTask) -> Selection:
    """Layers as long as the best one costs less loss per parameter than neurons do, then neurons to the goal.

    Greedy: after each removed layer everything is measured again. A layer is tried while at least half of one must go;
    its loss is measured with the layers before it gone.
    """
    if task.goal >= task.body.params:
        return Selection(tuple(range(task.body.layers)), {})
    stream = task.stream()
    scores = importance.neuron_scores(stream, task.settings.criterion, task.seed)
    removed: frozenset[int] = frozenset()
    while True:
        rest = _without(task.body, len(removed))
        if rest.params - task.goal < rest.params_per_layer / 2 or rest.layers == 1:
            break
        by_layer = [Variant(removed | {i}) for i in range(task.body.layers) if i not in removed]
        as_many = max(task.goal, rest.params - rest.params_per_layer)
        by_neurons = _narrowed(task, scores, rest, as_many, removed)
        variants = [Variant(removed), *by_layer, *([by_neurons] if by_neurons else [])]
        measured = losses(stream, variants).mean(dim=1).tolist()
        cost = [(loss - measured[0]) / rest.params_per_layer for loss in measured[1 : len(by_layer) + 1]]
        best = min(range(len(by_layer)), key=cost.__getitem__)
        if by_neurons:
            width = len(next(iter(by_neurons.neurons.values())))
            if (measured[-1] - measured[0]) / ((rest.width - width) * rest.params_per_neuron) <= cost[best]:
                break
        removed = by_layer[best].skipped
    kept = tuple(i for i in range(task.body.layers) if i not in removed)
    rest = _without(task.body, len(removed))
    width = _width(task.settings, rest, task.goal)
    if width == rest.width:
        return Selection(kept, {})
    return Selection(kept, {i: importance.keep_highest(scores[i], width) for i in kept})


CHOICES: dict[str, Callable[[SelectionTask], Selection]] = {"neurons": neurons, "layers": layers, "auto": cheapest}


def _width(settings: Prune, body: ModelDimensions, goal: int) -> int:
    return width_for(body, goal, settings.width_multiple, settings.tensor_parallel)


def _without(body: ModelDimensions, count: int) -> ModelDimensions:
    """Sizes after `count` layers are gone."""
    return dataclasses.replace(
        body,
        params=body.params - count * body.params_per_layer,
        layers=body.layers - count,
        params_per_neuron=body.params_per_neuron // body.layers * (body.layers - count),
    )


def _narrowed(
    task: SelectionTask, scores: importance.Scores, rest: ModelDimensions, goal: int, removed: frozenset[int]
) -> Variant | None:
    """The cut by neurons that saves about as much as a layer; None where the neurons do not suffice."""
    try:
        width = _width(task.settings, rest, goal)
    except InputError:
        return None
    kept = {i: importance.keep_highest(layer, width) for i, layer in enumerate(scores) if i not in removed}
    return Variant(removed, kept)
