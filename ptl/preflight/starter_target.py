"""How much `ptl init` removes, and what that leaves of the model: neurons of a dense one, experts of a mixture."""

from __future__ import annotations

from ptl.config.goal import FEWEST
from ptl.config.schedule import removal
from ptl.data.training_amount import PASSES, PER_PARAMETER
from ptl.errors import InputError
from ptl.model.dimensions import (
    ModelDimensions,
    experts_for,
    resolve_multiple,
    width_for,
    with_experts,
    with_width,
)
from ptl.units import billions

TARGET = 0.3  # share of the parameters
TARGET_STEP = 0.05


def chosen_target(before: ModelDimensions, tokens: float | None) -> tuple[float, str]:
    """The default, or as much less as rows of so many tokens can recover, and why it is less than TARGET."""
    target = default_target(before)
    reason = f", here at most half of the {'experts' if before.experts else 'FFNs'}" if target < TARGET else ""

    def out_of_reach() -> bool:
        removed = before.params - pruned_to(before, target)[0].params
        return tokens is not None and PER_PARAMETER * removed > PASSES * tokens

    while target > TARGET_STEP and out_of_reach():
        target = round(target - TARGET_STEP, 2)
        reason = f", here what {PASSES} passes over the rows can recover"
    return target, reason


def default_target(before: ModelDimensions) -> float:
    """0.3 of all parameters, but not more than half of the FFNs: in small models most parameters are embeddings.

    Of a mixture not more than half of the experts, nor those that each token needs.
    """
    most = _share_of_experts(before) if before.experts else _share_of_ffns(before) / 2
    return min(TARGET, max(TARGET_STEP, round(most // TARGET_STEP * TARGET_STEP, 2)))


def _share_of_ffns(dense: ModelDimensions) -> float:
    return dense.width * dense.params_per_neuron / dense.params


def _share_of_experts(mixture: ModelDimensions) -> float:
    """Share of the parameters that goes with half of the experts, or with all that a token can do without."""
    fewest = max(mixture.fewest_experts, mixture.experts - mixture.experts // 2)
    return 1 - with_experts(mixture, fewest).params / mixture.params


def pruned_to(before: ModelDimensions, target: float) -> tuple[ModelDimensions, int]:
    """The model at its target, and what its width is a multiple of. Raises InputError that names --target."""
    if target >= before.params or not (0 < target < 1 or target >= FEWEST):
        raise InputError(
            f"{target:g} is neither a share of the parameters to remove, between 0 and 1, nor a number of parameters "
            f"from {FEWEST} to the model's own {before.params:,}",
            field="--target",
            remedy="give for example 0.3",
        )
    goal = before.params - removal(before.params, target)
    if before.experts:
        return with_experts(before, _experts(before, target, goal)), 1
    width = _width(before, target, goal)
    return with_width(before, width), resolve_multiple(before.width, width, "auto")


def _experts(mixture: ModelDimensions, target: float, goal: int) -> int:
    """The experts of each layer at the target."""
    try:
        return experts_for(mixture, goal)
    except InputError as error:
        least = with_experts(mixture, mixture.fewest_experts)
        raise InputError(
            f"{target:g} cannot be reached: with the {least.experts} experts that a token needs the model has "
            f"{billions(least.params)} of its {billions(mixture.params)} parameters",
            field="--target",
            remedy=f"give less, for example {default_target(mixture):g}",
        ) from error


def _width(dense: ModelDimensions, target: float, goal: int) -> int:
    """The FFN width at the target."""
    try:
        return width_for(dense, goal, "auto")
    except InputError as error:
        in_ffn = _share_of_ffns(dense)
        raise InputError(
            f"{target:g} cannot be reached: only {in_ffn:.0%} of the {billions(dense.params)} parameters are in the "
            "FFNs, from which neurons are removed",
            field="--target",
            remedy=f"give less, for example {default_target(dense):g}",
        ) from error
