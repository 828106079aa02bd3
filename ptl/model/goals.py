"""What a model of some size needs, and the largest pruned one that needs little enough. Torch-free.

Everything follows from config.json: the weights are not read. Neurons and experts are taken evenly from all layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptl.model import shapes, text_tower
from ptl.model.dimensions import ModelDimensions, _has_neurons, dimensions_of, with_experts, with_width
from ptl.model.families import family_of
from ptl.model.shapes import ModelShapes

# What is removed
UNITS = {"neurons": "width", "layers": "layers", "experts": "experts"}


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

    model: ModelShapes
    dimensions: ModelDimensions
    context: int | None  # tokens, where its config limits them

    def needs(self, removed: int = 0, unit: str = "neurons") -> Needs:
        """What is needed once so many neurons or experts of every layer, or so many layers, are removed."""
        dense = self.dimensions
        layers = self.model.layers()
        first = next(layer for i, layer in enumerate(layers) if i not in dense.dense_layers)
        active = dense.experts_per_token / dense.experts if dense.experts else 1
        matrices = {name: shape for name, shape in first.items() if len(shape) > 1 and not name.endswith("_bias")}
        neurons = {name: shape for name, shape in matrices.items() if _has_neurons(self.model.family, name)}
        width = shapes.count(neurons) // dense.width * active
        if unit == "neurons":
            params = with_width(dense, dense.width - removed).params
            products = removed * width * dense.removable_layers
        elif unit == "experts":
            params = with_experts(dense, dense.experts - removed).params
            products = removed * dense.removable_layers * self.model.config.hidden_size
        else:
            params = dense.params - removed * dense.params_per_layer
            products = removed * (shapes.count(matrices) - shapes.count(neurons) + width * dense.width)
        cached = self.model.cached_numbers
        if unit == "layers":
            cached -= removed * cached // dense.layers
        return Needs(params, 2 * (self.model.matrix_params - round(products)), cached)

    def smallest(self, unit: str) -> Needs:
        """What is needed without any neuron, with one layer, or with as many experts as each token is sent to."""
        return self.needs(self._most(unit), unit)

    def _most(self, unit: str) -> int:
        fewest = {
            "neurons": 0,
            "layers": len(self.dimensions.dense_layers) + 1,
            "experts": self.dimensions.fewest_experts,
        }
        return getattr(self.dimensions, UNITS[unit]) - fewest[unit]

    def largest(self, unit: str, reached: Callable[[Needs], bool]) -> Needs | None:
        """What the largest pruned model that reaches a goal needs; None where none does."""
        if not reached(self.smallest(unit)):
            return None
        step = self.dimensions.expert_groups if unit == "experts" else 1
        fewest = bisect_left(range(self._most(unit) // step), True, key=lambda n: reached(self.needs(n * step, unit)))
        return self.needs(fewest * step, unit)


def dense_model(folder: Path) -> Dense:
    """A checkpoint, of a multimodal one its text model, or its config.json alone. Raises InputError as read_sizes."""
    config = text_tower.read_config(folder)
    model = shapes.of_config(config, family_of(config), f"config.json in {folder}")
    return Dense(model, dimensions_of(model), config.get("max_position_embeddings"))
