"""Sizes of a checkpoint and what a goal in parameters means for it: torch-free, so that bad targets fail early."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ptl.errors import InputError
from ptl.model import checkpoint, shapes, text_tower
from ptl.model.families import IN_LAYER, ConfigJson, Family
from ptl.model.sizes import Sizes, read_sizes
from ptl.model.tensor_checks import check_tensors

Multiple = int | Literal["auto"]  # of the setting prune.width_multiple
MULTIPLES = (128, 64, 8, 1)  # FFN widths that matrix units and quantized formats like, best first
MIN_STEPS = 8  # a multiple is taken by default where the width holds at least as many of it
# Neurons of an expert: torch multiplies all experts at once (grouped_mm) where each row of them is whole 16 bytes.
EXPERT_MULTIPLE = 8


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a checkpoint, read from the headers of its shards and its config."""

    params: int  # tied tensors count once
    layers: int  # decoder layers
    width: int  # FFN neurons in each layer, or in each expert
    params_per_neuron: int  # of one channel in every layer together, and in every expert
    params_per_layer: int  # of the smallest layer that can be removed
    # Of a mixture of experts; 0 in a dense model
    experts: int = 0  # in each layer that has experts
    experts_per_token: int = 0  # that each token is sent to
    params_per_expert: int = 0  # of one expert in every layer together, its row of the router included
    params_per_route: int = 0  # of these, what the routers have
    fewest_experts: int = 0  # that each layer can have
    expert_groups: int = 1  # of each layer, from which as many experts go
    dense_layers: tuple[int, ...] = ()  # layers that have one MLP in place of experts; they are not removed
    narrowable: bool = True  # whether neurons can be pruned

    @property
    def removable_layers(self) -> int:
        """Layers that may be removed, though not all of them."""
        return self.layers - len(self.dense_layers)

    @property
    def least_multiple(self) -> int:
        """What every pruned width must be a multiple of, whatever the settings say."""
        return EXPERT_MULTIPLE if self.experts else 1

    @property
    def active_params(self) -> int:
        """Parameters that a token meets: all but those of the experts that it is not sent to."""
        if not self.experts:
            return self.params
        unused = self.experts - self.experts_per_token
        return self.params - unused * (self.params_per_expert - self.params_per_route)


def model_dimensions(folder: Path, family: Family) -> ModelDimensions:
    """Measure a checkpoint without loading it, of a multimodal one its text model.

    Raises InputError that names an impossible field of config.json, a missing, extra or misshapen tensor, or dtypes
    that cannot be pruned.
    """
    config = text_tower.read_config(folder)
    sizes = read_sizes(config, family, f"{folder}/config.json")
    checkpoint.check_no_adapter(folder)
    contents = text_tower.contents(folder)
    entries = {name: entry for name, entry in contents.items() if family.is_read(name, config)}
    check_tensors(folder, config, family, sizes, entries)
    tied = family.is_tied(config)
    if tied:
        checkpoint.check_tied(entries)

    # A neuron has a row or a column in several tensors of every layer.
    params_by_layer = dict.fromkeys(range(sizes.num_hidden_layers), 0)
    params_per_neuron = 0
    for name, entry in entries.items():
        match = IN_LAYER.match(name)
        if match is None:
            continue
        params = math.prod(entry.shape)
        params_by_layer[int(match["layer"])] += params
        if family.has_neurons(match["part"], match["kind"]):
            params_per_neuron += params // sizes.intermediate_size
    if family.experts:
        params_per_neuron = _params_per_expert_neuron(sizes)
    for layer in sizes.dense_layers:
        del params_by_layer[layer]
    return ModelDimensions(
        params=checkpoint.count_params(entries, tied),
        layers=sizes.num_hidden_layers,
        width=sizes.intermediate_size,
        params_per_neuron=params_per_neuron,
        params_per_layer=min(params_by_layer.values()),
        experts=sizes.num_experts,
        experts_per_token=sizes.num_experts_per_tok,
        params_per_expert=_params_per_expert(sizes),
        params_per_route=sizes.expert_layers * sizes.params_per_route,
        fewest_experts=sizes.fewest_experts,
        expert_groups=sizes.n_group,
        dense_layers=sizes.dense_layers,
        narrowable=sizes.narrowable,
    )


def dimensions_of_config(config: ConfigJson, family: Family, source: str) -> ModelDimensions:
    """The same sizes from config.json alone, for a model whose weights are not here; `source` is named in errors."""
    sizes = read_sizes(config, family, source)
    params, _ = shapes.count(config, family, sizes)
    wider, _ = shapes.count(config, family, replace(sizes, intermediate_size=sizes.intermediate_size + 1))
    deeper, _ = shapes.count(config, family, replace(sizes, num_hidden_layers=sizes.num_hidden_layers + 1))
    return ModelDimensions(
        params=params,
        layers=sizes.num_hidden_layers,
        width=sizes.intermediate_size,
        params_per_neuron=_params_per_expert_neuron(sizes) if family.experts else wider - params,
        params_per_layer=deeper - params,
        experts=sizes.num_experts,
        experts_per_token=sizes.num_experts_per_tok,
        params_per_expert=_params_per_expert(sizes),
        params_per_route=sizes.expert_layers * sizes.params_per_route,
        fewest_experts=sizes.fewest_experts,
        expert_groups=sizes.n_group,
        dense_layers=sizes.dense_layers,
        narrowable=sizes.narrowable,
    )


def _params_per_expert_neuron(sizes: Sizes) -> int:
    """Parameters of one neuron of every expert in every layer together."""
    return sizes.expert_layers * sizes.num_experts * sizes.params_per_expert_neuron


def _params_per_expert(sizes: Sizes) -> int:
    """Parameters of one expert in every layer together, its row of the router included; 0 in a dense model."""
    return sizes.expert_layers * (sizes.params_per_expert + sizes.params_per_route)


def resolve_multiple(
    width: int,
    remaining: int,  # neurons that are left of it, before rounding
    multiple: Multiple,
    tensor_parallel: int = 1,
    least: int = 1,  # what is always a divisor, for each of the ranks
) -> int:
    """What the FFN width is rounded down to: `auto` takes 128, 64, 8 or 1 for each of the tensor-parallel ranks.

    The remaining neurons decide, not the width: a loop and its control, which come to a size from different widths,
    round it alike. Raises InputError when the ranks do not divide the width.
    """
    if width % tensor_parallel:
        raise InputError(
            f"{tensor_parallel} does not divide the FFN width {width}",
            field="prune.tensor_parallel",
            remedy="give the number of GPUs that the model is really split over",
        )
    if multiple != "auto":
        return math.lcm(multiple, least * tensor_parallel)
    for candidate in MULTIPLES:
        step = candidate * tensor_parallel
        # A wide multiple of a narrow FFN would leave only a few widths to choose from.
        if step % (least * tensor_parallel) == 0 and width % step == 0 and remaining // step >= MIN_STEPS:
            return step
    return least * tensor_parallel


def width_for(
    dimensions: ModelDimensions,
    goal: int,  # parameters
    multiple: Multiple,
    tensor_parallel: int = 1,
) -> int:
    """The largest uniform FFN width with at most `goal` parameters, rounded down to the multiple, never above today's.

    Raises InputError when fewer neurons than one multiple would be left.
    """
    # A width that is not pruned need not be a multiple.
    if goal >= dimensions.params:
        return dimensions.width
    per_neuron = dimensions.params_per_neuron
    width = dimensions.width - math.ceil((dimensions.params - goal) / per_neuron)
    step = resolve_multiple(dimensions.width, width, multiple, tensor_parallel, dimensions.least_multiple)
    width -= width % step
    if width < step:
        without_ffn = dimensions.params - dimensions.width * per_neuron
        least = without_ffn + step * per_neuron
        raise InputError(
            f"{goal:,} parameters cannot be reached by neurons: "
            f"all but the FFNs are {without_ffn:,}, and "
            f"prune.width_multiple={step} needs at least {least:,}",
            field="schedule.target",
            remedy="let schedule.target remove less, or lower prune.width_multiple",
        )
    return width


def with_width(dimensions: ModelDimensions, width: int) -> ModelDimensions:
    """Sizes when only so many neurons are left in each layer, or in each expert."""
    removed = (dimensions.width - width) * dimensions.params_per_neuron
    params_per_expert = dimensions.params_per_expert
    if dimensions.experts:
        params_per_expert -= removed // dimensions.experts
    return replace(
        dimensions,
        params=dimensions.params - removed,
        width=width,
        params_per_layer=dimensions.params_per_layer - removed // dimensions.layers,
        params_per_expert=params_per_expert,
    )


def smallest_cuts(
    dimensions: ModelDimensions,
    multiple: Multiple,
    tensor_parallel: int = 1,
) -> dict[str, int]:
    """Parameters that the smallest step of `neurons`, `layers` or `experts` removes.

    A unit that cannot shrink is left out.
    """
    smallest: dict[str, int] = {}
    if dimensions.removable_layers > 1:
        smallest["layers"] = dimensions.params_per_layer
    if dimensions.experts > dimensions.fewest_experts:
        smallest["experts"] = dimensions.expert_groups * dimensions.params_per_expert
    if not dimensions.narrowable:
        return smallest
    with contextlib.suppress(InputError):  # fewer neurons than one multiple would be left
        width = width_for(dimensions, dimensions.params - 1, multiple, tensor_parallel)
        smallest["neurons"] = dimensions.params - with_width(dimensions, width).params
    return smallest


def check_unit(experts: int, narrowable: bool, unit: str) -> None:
    """Raise InputError for a unit of removal that a model with so many experts in each layer does not have."""
    if not experts and unit == "experts":
        raise InputError(
            "a dense model has no experts",
            field="prune.target",
            remedy="set prune.target=neurons, or give a mixture of experts",
        )
    if not narrowable and unit not in ("experts", "layers"):
        raise InputError(
            f"{unit!r} would prune neurons inside of experts, which ptl does only where every layer has experts, "
            "none of them is shared by their width, and they have no biases",
            field="prune.target",
            remedy="set prune.target=experts, or prune.target=layers",
        )


def experts_for(
    dimensions: ModelDimensions,
    goal: int,  # parameters
) -> int:
    """The most experts in each layer with which the model has at most `goal` parameters.

    Raises InputError where fewer would be left than each token is sent to, or than its groups of experts need.
    """
    excess = max(0, dimensions.params - goal)
    number = dimensions.experts - math.ceil(excess / dimensions.params_per_expert)
    number -= number % dimensions.expert_groups
    if number < dimensions.fewest_experts:
        least = with_experts(dimensions, dimensions.fewest_experts)
        groups = f" in {dimensions.expert_groups} groups (n_group)" if dimensions.expert_groups > 1 else ""
        raise InputError(
            f"{goal:,} parameters cannot be reached by experts: each token is sent to {dimensions.experts_per_token} "
            f"of them (num_experts_per_tok), and with the {least.experts} that this needs{groups} the model has "
            f"{least.params:,}",
            field="schedule.target",
            remedy=f"let schedule.target remove less, or prune {'neurons or ' if dimensions.narrowable else ''}layers",
        )
    return number


def with_experts(dimensions: ModelDimensions, number: int) -> ModelDimensions:
    """Sizes when only so many experts are left in each layer."""
    removed = (dimensions.experts - number) * dimensions.params_per_expert
    return replace(
        dimensions,
        params=dimensions.params - removed,
        params_per_neuron=dimensions.params_per_neuron // dimensions.experts * number,
        params_per_layer=dimensions.params_per_layer - removed // dimensions.removable_layers,
        experts=number,
    )


def layers_for(dimensions: ModelDimensions, goal: int) -> int:
    """How many layers must be removed to reach the goal. Raises InputError when none would be left."""
    count = max(0, math.ceil((dimensions.params - goal) / dimensions.params_per_layer))
    if count >= dimensions.removable_layers:
        of_experts = " with experts" if dimensions.dense_layers else ""
        raise InputError(
            f"{goal:,} parameters would remove {count} of {dimensions.removable_layers} layers{of_experts}",
            field="schedule.target",
            remedy=f"let schedule.target remove less, or prune {'neurons' if dimensions.narrowable else 'experts'}",
        )
    return count
