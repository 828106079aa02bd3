"""Sizes of models that can be counted by hand."""

from ptl.model.dimensions import ModelDimensions


def body(
    *,
    params,
    layers,
    width,
    params_per_neuron,
    params_per_layer,
    experts=0,
    params_per_expert=0,
    params_per_route=0,
    **fields,
):
    """`ModelDimensions` whose properties have these values."""
    slope = params_per_neuron // layers // max(1, experts)  # of the width, in a layer or in one of its experts
    in_layer, in_expert = params_per_layer, params_per_expert // layers
    terms = {(0, 1, 0): slope, (0, 0, 0): (in_expert if experts else in_layer) - slope * width}
    made = ModelDimensions(
        hidden=1,
        width=width,
        groups=1,
        layers=layers,
        layer={(0, 0, 0): in_layer - experts * in_expert} if experts else terms,
        outside={(0, 0, 0): params - layers * in_layer},
        experts=experts,
        expert=terms if experts else {},
        route={(0, 0, 0): params_per_route // layers},
        **fields,
    )
    counted = (
        made.params,
        made.params_per_layer,
        made.params_per_neuron,
        made.params_per_expert,
        made.params_per_route,
    )
    assert counted == (params, params_per_layer, params_per_neuron, params_per_expert, params_per_route)
    return made
