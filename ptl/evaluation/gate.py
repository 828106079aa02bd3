"""The gate: accept or reject the candidate of an iteration, or stop the loop. Pure functions.

The statistics behind a verdict are in ptl/evaluation/paired.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ptl.config.run import Gate
from ptl.evaluation import retention
from ptl.evaluation.paired import Paired, describe
from ptl.evaluation.retention import Retained

REACHED = "target reached"
# the decision on every iteration of a run without the gate
GATE_OFF: Literal["gate off"] = "gate off"


@dataclass(frozen=True)
class State:
    """What an accepted model carries to the next iteration, as a dict in `Pointer.gate`; {} there is the start."""

    cap: int | None = None  # most parameters that the next iteration may remove; none: as planned
    rejections: int = 0  # in a row
    stopped: bool = False  # nothing more is tried: later steps pass their input through
    reason: str = ""  # why it stopped


@dataclass(frozen=True)
class Decision:
    """The decision on one iteration, and the state that the next one begins with."""

    decision: Literal["accepted", "rejected", "stopped", "gate off"]
    reason: str  # for a reader
    numbers: dict[str, Any]  # what it was decided by: sizes in parameters, and the two comparisons
    state: State  # for the next iteration

    @property
    def keep(self) -> Literal["candidate", "parent"]:
        """Which model the next iteration gets."""
        return "candidate" if self.decision in ("accepted", GATE_OFF) else "parent"


def goal(current_params: int, planned_goal: int, state: Mapping[str, Any]) -> int:
    """Parameters to prune the current model to: as planned, but no more than the cap away from it."""
    carried = State(**state)
    if carried.stopped:
        return current_params
    # After a rejection the step is half of the one that was rejected, at most.
    if carried.cap is not None:
        planned_goal = max(planned_goal, current_params - carried.cap)
    return min(current_params, planned_goal)


def decide(
    settings: Gate,
    state: State,
    *,
    params: int,  # of the candidate
    target_params: int,  # to end the loop with
    parent_params: int | None = None,
    baseline: Paired | None = None,  # the candidate against the dense model
    parent: Paired | None = None,  # the candidate against its parent
    retained: Retained | None = None,  # the candidate against the dense model, on held-out text
    # parameters that can be pruned from the parent next, at least; none: nothing can
    smallest_cut: int | None = 1,
) -> Decision:
    """The decision on a candidate that was pruned from its parent, the last accepted model.

    When the gate is enabled it needs `parent_params`, `baseline` and `parent`.
    A rejected candidate halves the cut for the next iteration; after `max_rejections` in a row, or when half the cut is
    below the smallest, the loop stops with the parent: a smaller step would be rounded up to one that was just
    rejected. An accepted candidate doubles that limit: one early rejection does not hold the whole run.
    """
    numbers: dict[str, Any] = {"params": params, "target_params": target_params}
    if state.stopped:
        return Decision("stopped", "the loop had stopped: nothing was tried", numbers, state)
    # every iteration runs: the last ones may train without a cut left to make
    if not settings.enabled:
        return Decision(GATE_OFF, "the gate is off", numbers, state)
    assert baseline is not None and parent is not None and parent_params is not None, (
        "the gate needs the parent"
    )
    # Both must hold: many small losses against the parent add up to a large one against the dense model.
    pairs = {"baseline": baseline, "parent": parent}
    numbers |= {
        "parent_params": parent_params,
        **{name: asdict(pair) for name, pair in pairs.items()},
    }
    worse = [
        f"{describe(pair)} against the {name}"
        for name, pair in pairs.items()
        if pair.fails(settings.strict)
    ]
    if settings.retention and retained:
        numbers["retention"] = asdict(retained)
        if retained.fails(settings.retention, settings.strict):
            worse.append(f"{retention.describe(retained)}, and {settings.retention:g} is tolerated")
    if worse:
        numbers["smallest_cut"] = smallest_cut
        after = _state_after_rejection(settings, state, parent_params - params, smallest_cut)
        consequence = (
            f"{after.reason}: stopped"
            if after.stopped
            else f"next cut at most {after.cap:,} parameters"
        )
        return Decision("rejected", f"{worse[0]}; {consequence}", numbers, after)
    reason = f"{describe(baseline)} against the baseline"
    cap = None if state.cap is None else 2 * state.cap
    if params > target_params:
        return Decision("accepted", reason, numbers, State(cap))
    # Smaller than the target is not asked for.
    return Decision(
        "accepted", f"{reason}; {REACHED}", numbers, State(cap, stopped=True, reason=REACHED)
    )


def _state_after_rejection(
    settings: Gate,
    state: State,
    removed: int,  # parameters that the rejected candidate had less than its parent
    smallest_cut: int | None,  # parameters; none: nothing can be removed
) -> State:
    """Half of the `removed` parameters are the next cap; the loop stops where that is no smaller step."""
    rejections = state.rejections + 1
    cap = removed // 2
    reason = ""  # why the loop stops
    if rejections >= settings.max_rejections:
        reason = f"{rejections} rejections in a row"
    elif smallest_cut is None:
        reason = "no smaller step left (nothing is left to cut)"
    elif cap < max(1, smallest_cut):
        reason = f"no smaller step left (the smallest cut is {smallest_cut:,} parameters)"
    return State(cap, rejections, stopped=bool(reason), reason=reason)
