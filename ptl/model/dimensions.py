"""Sizes of a checkpoint that pruning changes, what it costs, and what a goal in parameters means for them."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ptl.errors import InputError
from ptl.model import axes, checkpoint, shapes
from ptl.model.axes import HIDDEN, KV_HEADS, NEURONS
from ptl.model.checkpoint import OUTPUT_LAYER
from ptl.model.experts import BIASES, DOWN, FUSED
from ptl.model.families import Family, family_of
from ptl.model.shapes import LAYERS, ModelShapes

Multiple = int | Literal["auto"]  # of the setting prune.width_multiple
MULTIPLES = (128, 64, 8, 1)  # FFN widths that matrix units and quantized formats like, best first
MIN_STEPS = 8  # a multiple is taken by default where the width holds at least as many of it
# Neurons of an expert: torch multiplies all experts at once (grouped_mm) where each row of them is whole 16 bytes.
EXPERT_MULTIPLE = 8


# A number of parameters as a sum of products of widths: what multiplies hidden^a * neurons^b * kv_heads^c, by (a, b, c)
Terms = Mapping[tuple[int, int, int], int]


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a checkpoint, by its config.json; with other widths, layers or experts, those of a pruned one."""

    hidden: int  # dimensions of the residual stream
    width: int  # FFN neurons in each layer, or in each expert
    kv_heads: int  # KV heads in each layer, each with its query heads
    layers: int  # decoder layers
    layer: Terms  # parameters of a layer that can be removed, without its experts
    # of all else: embeddings, last norm, output layer, layers that stay; tied tensors count once
    outside: Terms
    heads_per_kv_head: int = 1  # query heads
    head_size: int = 1  # numbers of what a head gives
    # "hidden" and "kv", where they cannot be pruned: why
    fixed: Mapping[str, str] = field(default_factory=dict)
    # whether some runtime needs a hidden size of all heads together, as of Family
    square: bool = False
    # Of a mixture of experts; 0 in a dense model
    experts: int = 0  # in each layer that has experts
    expert: Terms = field(default_factory=dict)  # of one of them, its row of the router included
    route: Terms = field(default_factory=dict)  # of that row
    experts_per_token: int = 0  # that each token is sent to
    fewest_experts: int = 0  # that each layer can have
    expert_groups: int = 1  # of each layer, from which as many experts go
    # layers that have one MLP in place of experts; they are not removed
    dense_layers: tuple[int, ...] = ()
    narrowable: bool = True  # whether neurons can be pruned

    def _count(self, terms: Terms) -> int:
        return sum(
            number * self.hidden**a * self.width**b * self.kv_heads**c
            for (a, b, c), number in terms.items()
        )

    @property
    def params(self) -> int:
        """Of the whole model."""
        return self._count(self.outside) + self.removable_layers * self.params_per_layer

    @property
    def params_per_layer(self) -> int:
        """Of a layer that can be removed."""
        return self._count(self.layer) + self.experts * self._count(self.expert)

    @property
    def params_per_neuron(self) -> int:
        """Of one channel in every layer together, and in every expert."""
        return replace(self, width=self.width + 1).params - self.params

    @property
    def params_per_expert(self) -> int:
        """Of one expert in every layer together, its row of the router included."""
        return self.removable_layers * self._count(self.expert)

    @property
    def params_per_route(self) -> int:
        """Of these, what the routers have."""
        return self.removable_layers * self._count(self.route)

    @property
    def removable_layers(self) -> int:
        """Layers that may be removed, though not all of them."""
        return self.layers - len(self.dense_layers)

    @property
    def heads(self) -> int:
        """Query heads of each layer."""
        return self.kv_heads * self.heads_per_kv_head

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
    """Measure a checkpoint without loading its weights. Raises InputError as `shapes.of_checkpoint`."""
    return dimensions_of(shapes.of_checkpoint(folder, family))


def dimensions_of(model: ModelShapes) -> ModelDimensions:
    """What pruning changes in a model: counted in its first layer that can be removed, and times such layers."""
    layers, experts, config = model.layers(), model.family.experts, model.config
    of_names = axes.of_config(model.content, model.family)
    widths = axes.sizes(config, model.family)

    def terms(names: Iterable[str], parts: int = 1) -> Terms:
        """The parameters of these tensors, or of one of so many equal parts of them."""
        found: Counter[tuple[int, int, int]] = Counter()
        for name in names:
            kinds = of_names[name]
            powers = (kinds.count(HIDDEN), kinds.count(NEURONS), kinds.count(KV_HEADS))
            found[powers] += model.tensors[name].numel() // math.prod(
                widths[kind] for kind in kinds if kind
            )
        return {powers: number // parts for powers, number in found.items()}

    dense_layers = tuple(i for i, layer in enumerate(layers) if experts and DOWN not in layer)
    removable = [i for i in range(len(layers)) if i not in dense_layers]
    names = {part: f"{LAYERS}{removable[0]}.{part}" for part in layers[removable[0]]}
    counted = {f"{LAYERS}{i}.{part}" for i in removable for part in names} | (
        {OUTPUT_LAYER} if model.tied else set()
    )
    mixture: dict[str, Any] = {}
    if experts:
        router = [
            name for part, name in names.items() if experts.is_router(part.removesuffix(".weight"))
        ]
        of_experts = [name for part, name in names.items() if part in (*FUSED, *BIASES)]
        number = len(model.tensors[names[DOWN]])
        mixture = {
            "experts": number,
            "expert": terms([*of_experts, *router], number),
            "route": terms(router, number),
            "experts_per_token": config.num_experts_per_tok,
            "fewest_experts": shapes.fewest_experts(config),
            "expert_groups": getattr(config, "n_group", 1),
            # Not where a shared expert has the width too, or where layers and experts differ.
            "narrowable": not any(
                (dense_layers, experts.transposed, getattr(config, "n_shared_experts", 0))
            ),
        }
        names = {part: name for part, name in names.items() if name not in (*of_experts, *router)}
    return ModelDimensions(
        hidden=widths[HIDDEN],
        width=widths[NEURONS],
        kv_heads=widths[KV_HEADS],
        layers=len(layers),
        layer=terms(names.values()),
        outside=terms(model.tensors.keys() - counted),
        heads_per_kv_head=config.num_attention_heads // widths[KV_HEADS],
        head_size=axes.value_size(config),
        fixed=axes.fixed(of_names, model.content, config),
        square=model.family.square,
        dense_layers=dense_layers,
        **mixture,
    )


def resolve_multiple(
    width: int,
    remaining: int,  # neurons that are left of it, before rounding
    multiple: Multiple,
    least: int = 1,  # what is always a divisor
) -> int:
    """What the FFN width, or a hidden size, is rounded down to: `auto` takes 128, 64, 8 or 1.

    The remaining neurons decide, not the width: a loop and its control, which come to a size from different widths,
    round it alike.
    """
    if multiple != "auto":
        return math.lcm(multiple, least)
    steps = (math.lcm(size, least) for size in MULTIPLES)
    # A wide multiple of a narrow FFN would leave only a few widths to choose from.
    return next(
        (step for step in steps if width % step == 0 and remaining // step >= MIN_STEPS), least
    )


def width_for(dimensions: ModelDimensions, goal: int, multiple: Multiple) -> int:
    """The largest uniform FFN width with at most `goal` parameters, rounded down to the multiple, never above today's.

    Raises InputError when fewer neurons than one multiple would be left.
    """
    # A width that is not pruned need not be a multiple.
    if goal >= dimensions.params:
        return dimensions.width
    per_neuron = dimensions.params_per_neuron
    width = dimensions.width - math.ceil((dimensions.params - goal) / per_neuron)
    step = resolve_multiple(dimensions.width, width, multiple, dimensions.least_multiple)
    width -= width % step
    if width < step:
        least = replace(dimensions, width=step)
        raise InputError(
            f"{goal:,} parameters cannot be reached by neurons: prune.width_multiple={step} needs at least "
            f"{least.params:,}",
            field="schedule.target",
            remedy="let schedule.target remove less, or lower prune.width_multiple",
        )
    return width


def smallest_cuts(dimensions: ModelDimensions, multiple: Multiple) -> dict[str, int]:
    """Parameters that the smallest step of `neurons`, `width`, `layers` or `experts` removes.

    A unit that cannot shrink is left out. Of width a small step is one of the FFN.
    """
    smallest: dict[str, int] = {}
    if dimensions.removable_layers > 1:
        smallest["layers"] = dimensions.params_per_layer
    if dimensions.experts > dimensions.fewest_experts:
        smallest["experts"] = dimensions.expert_groups * dimensions.params_per_expert
    if dimensions.narrowable:
        with contextlib.suppress(InputError):  # fewer neurons than one multiple would be left
            width = width_for(dimensions, dimensions.params - 1, multiple)
            smallest["neurons"] = dimensions.params - replace(dimensions, width=width).params
    of_width = "neurons" if dimensions.narrowable else "experts"
    if of_width in smallest:
        smallest["width"] = smallest[of_width]
    return smallest


def check_unit(experts: int, narrowable: bool, unit: str, repair: int) -> None:
    """Raise InputError for what a model with so many experts in each layer does not have to remove or to repair."""
    if experts and repair:
        raise InputError("experts are not repaired", field="prune.repair", remedy="set it to 0")
    if not experts and unit == "experts":
        raise InputError(
            "a dense model has no experts",
            field="prune.target",
            remedy="set prune.target=auto, or give a mixture of experts",
        )
    if not narrowable and unit not in ("experts", "layers", "width"):
        raise InputError(
            f"{unit!r} would prune neurons inside of experts, which ptl does only where every layer has experts, "
            "none of them is shared by their width, and they have no biases",
            field="prune.target",
            remedy="set prune.target=auto with prune.criterion=taylor, or prune.target=experts or layers",
        )


def experts_for(dimensions: ModelDimensions, goal: int) -> int:
    """The most experts in each layer with which the model has at most `goal` parameters.

    Raises InputError where fewer would be left than each token is sent to, or than its groups of experts need.
    """
    excess = max(0, dimensions.params - goal)
    number = dimensions.experts - math.ceil(excess / dimensions.params_per_expert)
    number -= number % dimensions.expert_groups
    if number < dimensions.fewest_experts:
        least = replace(dimensions, experts=dimensions.fewest_experts)
        raise InputError(
            f"{goal:,} parameters cannot be reached by experts: each token needs {least.experts} of them in each "
            f"layer, and the model then has {least.params:,}",
            field="schedule.target",
            remedy="let schedule.target remove less, or set another prune.target",
        )
    return number


def layers_for(dimensions: ModelDimensions, goal: int) -> int:
    """How many layers must be removed to reach the goal. Raises InputError when none would be left."""
    count = max(0, math.ceil((dimensions.params - goal) / dimensions.params_per_layer))
    if count >= dimensions.removable_layers:
        raise InputError(
            f"{goal:,} parameters would remove {count} of {dimensions.removable_layers} layers that can go",
            field="schedule.target",
            remedy="let schedule.target remove less, or set another prune.target",
        )
    return count


@dataclass(frozen=True)
class StaticCost:
    """What a checkpoint costs, as far as its shapes say it."""

    params: int  # tied tensors count once
    # that a token meets: without the experts that it is not sent to; all in a dense model
    active_params: int
    bytes: int  # of the weight files
    flops_per_token: int  # forward, products with the weights
    # of context; layers with a sliding window hold no more than their window
    kv_bytes_per_token: int
    hidden_size: int  # dimensions of the residual stream
    widths: list[int]  # FFN width of each layer, or of each of its experts
    kv_heads: int  # of each layer
    experts: int  # in each layer; 0: a dense model


def static_cost(folder: Path) -> StaticCost:
    """Measure a checkpoint folder without loading its weights. Raises InputError as `shapes.of_checkpoint`."""
    model = shapes.of_checkpoint(folder, family_of(checkpoint.read_config(folder)))
    dimensions = dimensions_of(model)
    dense_width = getattr(model.config, "intermediate_size", 0)
    return StaticCost(
        params=dimensions.params,
        active_params=dimensions.active_params,
        bytes=sum(path.stat().st_size for path in checkpoint.shards(folder)),
        flops_per_token=2 * model.matrix_params,  # multiply and add
        kv_bytes_per_token=model.cached_numbers * checkpoint.itemsize(folder),
        hidden_size=dimensions.hidden,
        widths=[
            dense_width if layer in dimensions.dense_layers else dimensions.width
            for layer in range(dimensions.layers)
        ],
        kv_heads=dimensions.kv_heads,
        experts=dimensions.experts,
    )
