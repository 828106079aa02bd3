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


# 10 experts of 10,000 parameters, of which a token meets 2; a router of 100 for each
MIXTURE = ModelDimensions(
    params=201_000,
    layers=4,
    width=100,
    params_per_neuron=1000,
    params_per_layer=40_000,
    experts=10,
    experts_per_token=2,
    params_per_expert=10_100,
    params_per_route=100,
    fewest_experts=2,
)


def test_whole_experts_go_as_prune_removes_them():
    # cubic: 34,862, 52,762, 59,358 and 60,300 parameters are asked for
    after = [sizes for _, sizes in planned.dimensions_after(MIXTURE, SCHEDULE, Prune(target="experts"))]
    assert [sizes.experts for sizes in after] == [6, 4, 4, 4]
    assert [sizes.params for sizes in after] == [160_600, 140_400, 140_400, 140_400]
    assert [sizes.active_params for sizes in after] == [120_600, 120_400, 120_400, 120_400]


def test_neurons_of_experts_go_by_eights():
    after = [sizes for _, sizes in planned.dimensions_after(MIXTURE, SCHEDULE, Prune(width_multiple=1))]
    assert [sizes.width for sizes in after] == [64, 40, 40, 32]
    assert [sizes.active_params for sizes in after] == [113_800, 109_000, 109_000, 107_400]
    (warning,) = planned.idle_warnings(MIXTURE, SCHEDULE, Prune(width_multiple=1))
    assert warning.startswith("multiples of 8 neurons, the least that experts can have") and "lower it" not in warning
    (warning,) = planned.idle_warnings(MIXTURE, SCHEDULE, Prune(width_multiple=16))
    assert "prune.width_multiple=16 rounds" in warning and "lower it" in warning


def test_iterations_for_which_an_expert_is_too_large_are_named():
    (warning,) = planned.idle_warnings(MIXTURE, SCHEDULE, Prune(target="experts"))
    assert "one of the 10 experts in every layer is more than" in warning and "for iterations 3 and 4, which" in warning
    uniform = Schedule(iterations=3, target=0.3, cuts="uniform", recovery_tokens=0)
    assert planned.idle_warnings(MIXTURE, uniform, Prune(target="experts")) == []
