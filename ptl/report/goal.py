"""Whether a run's final model reaches its goal in memory or speed: from the final checkpoint's own shapes and speed."""

from __future__ import annotations

from typing import Any

from ptl.evaluation import speed_rows
from ptl.report.result_rows import Row
from ptl.units import counted, memory_beside, times_beside


def outcome(goal: Row, final: Row | None, speed: Row) -> Row:
    """The goal, which is of the import step's record, with what was reached; empty without a goal.

    `final` is the row of the final checkpoint (None: it was not scored), `speed` what was measured of it.
    """
    if not goal or final is None:
        return dict(goal)
    if goal["kind"] == "memory":
        # Keys and values of a layer are as many as before: heads are not pruned.
        cached_numbers = goal["cached_numbers_per_layer"] * len(final["widths"])
        numbers = final["params"] + goal["sequences"] * goal["tokens"] * cached_numbers
        needed = numbers * goal["itemsize"]
        return {**goal, "final": needed, "reached": needed <= goal["bytes"]}
    flops = final["scores"]["flops_per_token"]
    measured = [row.times for row in speed_rows.rows(speed) if row.kind in speed_rows.PHASES]
    return {
        **goal,
        "final": flops,
        "reached": flops * goal["times"] <= goal["dense"],
        "measured": measured,  # times as fast, in prefill and decode at each batch size
    }


def sentence(goal: Row) -> str:
    """What was asked and what was reached; empty without a goal."""
    if not goal:
        return ""
    if "final" not in goal:
        return "Whether the goal is reached is not known: the final checkpoint was not scored."
    return _about_memory(goal) if goal["kind"] == "memory" else _about_speed(goal)


def _about_memory(goal: Row) -> str:
    cache = f"a KV cache for {counted(goal['sequences'], 'sequence')} of {goal['tokens']:,} tokens"
    needed, dense, excess = (
        memory_beside(number, goal["memory"])
        for number in (goal["final"], goal["dense"], max(0, goal["final"] - goal["bytes"]))
    )
    # Both sizes may be the same when rounded.
    too_much = "" if goal["reached"] else f" ({excess} too much)"
    return (
        f"{_said(goal['reached'])}: the final model needs {needed}{too_much} for weights and {cache} in "
        f"{goal['dtype']}, the dense one {dense}; the goal is {goal['memory']}."
    )


def _about_speed(goal: Row) -> str:
    times = times_beside(goal["dense"] / goal["final"], goal["times"])
    forecast = f"{_said(goal['reached'])} by FLOPs per token: {times} times; the goal is {goal['times']:g} times"
    measured: list[Any] = goal["measured"]
    if not measured:
        return f"{forecast}. Speed was not measured."
    enough = sum(value >= goal["times"] for value in measured)
    span = f"{min(measured):.2f} to {max(measured):.2f} times"
    return f"{forecast}. Measured: {span}, enough in {enough} of {len(measured)} measurements of prefill and decode."


def _said(reached: bool) -> str:
    return "Goal reached" if reached else "Goal not reached"
