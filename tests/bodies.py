"""Sizes of models: of published ones, and of such as can be counted by hand."""

from pathlib import Path

import yaml

from ptl.model.dimensions import ModelDimensions

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
COUNTED = (
    "params",
    "params_per_layer",
    "params_per_neuron",
    "params_per_expert",
    "params_per_route",
)


def body(*, layers, width, experts=0, hidden=1, **fields):
    """`ModelDimensions` whose properties COUNTED have these values, by default 0; and with these fields."""
    counted = {name: fields.pop(name, 0) for name in COUNTED}
    params, in_layer, *of_all_layers = counted.values()
    neuron, expert, route = (number // layers for number in of_all_layers)
    neuron //= experts or 1
    parts = {(0, 1, 0): neuron, (0, 0, 0): (expert if experts else in_layer) - neuron * width}
    layer, of_expert = ({(0, 0, 0): in_layer - experts * expert}, parts) if experts else (parts, {})
    fields |= {"layer": layer, "outside": {(0, 0, 0): params - layers * in_layer}}
    fields |= {"experts": experts, "expert": of_expert, "route": {(0, 0, 0): route}}
    made = ModelDimensions(hidden=hidden, kv_heads=1, layers=layers, width=width, **fields)
    assert {name: getattr(made, name) for name in COUNTED} == counted
    return made
