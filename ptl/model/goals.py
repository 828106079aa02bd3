"""What a model of some size needs, and the largest pruned one that needs little enough. Torch-free.

Everything follows from config.json: the weights are not read. Neurons and experts are taken evenly from all layers.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptl.model import shapes, text_tower
from ptl.model.families import ConfigJson, Family, family_of
from ptl.model.sizes import Sizes, read_sizes

# What is removed, by its name in sizes.Sizes
UNITS = {"neurons": "intermediate_size", "layers": "num_hidden_layers", "experts": "num_experts"}


@dataclass(frozen=True)
class Needs:
    """What a model needs, as far as its shapes say it."""

    params: int
    flops_per_token: int  # forward, products with the weights, as of cost.StaticCost
    cached_numbers: int  # keys and values of one token in all layers, each layer's in full

    def memory(self, sequences: int, tokens: int, itemsize: int) -> int:
        """Bytes of the weights and of a KV cache for so many sequences of so many tokens."""
        return (self.params + sequences * tokens * self.cached_numbers) * itemsize


@dataclass(frozen=True)
class Dense:
    """A model that is to be pruned, as its config.json says it."""

    config: ConfigJson
    family: Family
    sizes: Sizes
    context: int | None  # tokens, where its config limits them

    def needs(self, removed: int = 0, unit: str = "neurons") -> Needs:
        """What is needed once so many neurons or experts of every layer, or so many layers, are removed."""
        field = UNITS[unit]
        sizes = dataclasses.replace(self.sizes, **{field: getattr(self.sizes, field) - removed})
        params, products = shapes.count(self.config, self.family, sizes)
        cached_numbers = sizes.num_hidden_layers * sizes.cached_numbers
        return Needs(params, 2 * products, cached_numbers)

    def smallest(self, unit: str) -> Needs:
        """What is needed without any neuron, with one layer, or with as many experts as each token is sent to."""
        return self.needs(self._most(unit), unit)

    def _most(self, unit: str) -> int:
        """How many neurons or experts of every layer, or layers, can be removed."""
        # Of a mixture's layers those that have experts go, but for one.
        fewest = {"neurons": 0, "layers": len(self.sizes.dense_layers) + 1, "experts": self.sizes.fewest_experts}
        number: int = getattr(self.sizes, UNITS[unit])
        return number - fewest[unit]

    def largest(self, unit: str, reached: Callable[[Needs], bool]) -> Needs | None:
        """What the largest pruned model that reaches a goal needs; None where none does."""
        if not reached(self.smallest(unit)):
            return None
        step = self.sizes.n_group if unit == "experts" else 1
        steps = self._most(unit) // step
        # Each further neuron, layer or expert needs less: the fewest that must go are found by halving.
        fewest = bisect_left(range(steps), True, key=lambda number: reached(self.needs(number * step, unit)))
        return self.needs(fewest * step, unit)


def dense_model(folder: Path) -> Dense:
    """A checkpoint, of a multimodal one its text model, or its config.json alone. Raises InputError as read_sizes."""
    config = text_tower.read_config(folder)
    family = family_of(config)
    sizes = read_sizes(config, family, f"{folder}/config.json")
    return Dense(config, family, sizes, config.get("max_position_embeddings"))
