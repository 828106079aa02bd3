"""What a plan comes to: sizes as prune rounds them, and iterations that would find nothing to remove."""

from ptl.config.schedule import Prune, Schedule
from ptl.model.dimensions import ModelDimensions
from ptl.preflight import planned

# 100 neurons of 1,000 parameters, and as much again beside them
DENSE = ModelDimensions(params=200_000, layers=4, width=100, params_per_neuron=1000, params_per_layer=40_000)
SCHEDULE = Schedule(iterations=4, target=0.3, recovery_tokens=0)


def after(prune, schedule=SCHEDULE):
    return [params for _, params in planned.sizes(DENSE, schedule, prune)]


def test_widths_are_rounded_down_as_prune_does():
    # cubic: 34,688, 52,500, 59,063 and 60,000 parameters are asked for
    assert after(Prune(width_multiple=1)) == [165_000, 147_000, 140_000, 140_000]
    assert after(Prune(width_multiple=8)) == [164_000, 140_000, 140_000, 140_000]


def test_iterations_that_would_remove_nothing_are_named():
    (warning,) = planned.idle_warnings(DENSE, SCHEDULE, Prune(width_multiple=8))
    assert "nothing is left to remove for iterations 3 and 4, which" in warning
    uniform = Schedule(iterations=4, target=0.32, cuts="uniform", recovery_tokens=0)
    assert planned.idle_warnings(DENSE, uniform, Prune(width_multiple=8)) == []


def test_of_layers_the_plan_is_what_is_asked_for():
    layers = Prune(target="layers")
    assert after(layers) == [165_313, 147_500, 140_938, 140_000]
    assert planned.idle_warnings(DENSE, SCHEDULE, layers) == []
