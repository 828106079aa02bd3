from dataclasses import asdict
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from test_paired import compared

from ptl.config.run import Gate
from ptl.evaluation import gate, paired
from ptl.evaluation.gate import State

ON = Gate(enabled=True, margin=0.02, alpha=0.05)
GOOD, BAD = compared(495, 494), compared(495, 450)


def decide(
    state,
    params,
    baseline=GOOD,
    parent=GOOD,
    *,
    rule=ON,
    parent_params=1000,
    target=500,
    smallest_cut=50,
):
    sizes = {
        "params": params,
        "target_params": target,
        "parent_params": parent_params,
        "smallest_cut": smallest_cut,
    }
    return gate.decide(rule, state, baseline=baseline, parent=parent, **sizes)


def test_goal_follows_the_plan_until_a_cap_holds_it():
    assert [gate.goal(1000, planned, {}) for planned in (700, 1000, 1200)] == [700, 1000, 1000]
    assert [gate.goal(1000, planned, {"cap": 100}) for planned in (700, 899, 900, 950)] == [
        900,
        900,
        900,
        950,
    ]
    assert gate.goal(1000, 700, asdict(State(100, 1, stopped=True))) == 1000


def test_what_is_accepted_is_kept_until_the_target_is_reached():
    accepted = decide(State(), 501)
    assert (accepted.decision, accepted.keep, accepted.state) == ("accepted", "candidate", State())
    assert accepted.reason == f"{paired.describe(GOOD)} against the baseline"
    assert (
        accepted.numbers["baseline"]["regressions"] == 1
        and accepted.numbers["parent_params"] == 1000
    )
    for params in (500, 499):
        reached = decide(State(75, 2), params)
        assert (reached.decision, reached.state) == (
            "accepted",
            State(150, 0, True, "target reached"),
        )
        after = decide(reached.state, 500, BAD, parent_params=500)
        assert (after.decision, after.keep, after.state) == ("stopped", "parent", reached.state)
    assert decide(State(150, 2), 925).state == State(300)
    assert decide(State(), 1000).state == State()  # nothing was cut


def test_a_rejection_halves_the_cut_and_three_stop_the_loop():
    rejected = decide(State(), 699, BAD)
    assert (rejected.decision, rejected.keep, rejected.state) == (
        "rejected",
        "parent",
        State(150, 1),
    )
    assert rejected.reason.startswith(
        f"{paired.describe(BAD)} against the baseline; next cut at most 150 "
    )
    assert (rejected.numbers["baseline"]["regressions"], rejected.numbers["smallest_cut"]) == (
        45,
        50,
    )
    again = decide(rejected.state, 850, GOOD, BAD)
    assert again.state == State(75, 2) and "against the parent" in again.reason
    third = decide(again.state, 925, BAD, BAD)
    assert (
        third.state == State(37, 3, True, "3 rejections in a row")
        and "against the baseline" in third.reason
    )


def test_a_step_that_cannot_be_halved_stops_the_loop():
    for params, smallest_cut, cap, stopped in [
        *((900, 50, 50, False), (900, 51, 50, True), (901, 50, 49, True)),
        # None: nothing is left to cut
        *((998, 0, 1, False), (999, 0, 0, True), (700, None, 150, True)),
    ]:
        decided = decide(State(), params, BAD, smallest_cut=smallest_cut)
        assert (decided.decision, decided.state.rejections) == ("rejected", 1)
        assert (decided.state.cap, decided.state.stopped) == (cap, stopped), params
        assert ("no smaller step left" in (decided.state.reason or "")) == stopped


def test_no_gate_calls_anything_accepted_and_a_strict_one_rejects_what_is_not_shown():
    decided = gate.decide(Gate(), State(), params=400, target_params=500)
    assert (decided.decision, decided.keep, decided.state) == ("gate off", "candidate", State())
    # no parent is known: nothing was compared with it
    assert decided.numbers == {"params": 400, "target_params": 500}
    unclear, strict = compared(18, 17, n=20), Gate(enabled=True, strict=True)
    assert unclear.verdict == "unclear"
    for pairs in ((unclear, GOOD), (GOOD, unclear)):
        decisions = [decide(State(), 700, *pairs, rule=rule).decision for rule in (ON, strict)]
        assert decisions == ["accepted", "rejected"]


@settings(max_examples=50, deadline=None)
@given(step=st.integers(1, 10_000), first=st.integers(1, 300), rest=st.integers(1, 300))
def test_after_a_rejection_every_cut_is_smaller_than_the_one_before(step, first, rest):
    """Cuts are rounded up to whole steps, as widths are rounded down: no candidate is tried twice, and it ends."""
    parent = (first + rest) * step
    target, state, cuts = parent - first * step, State(), []
    while "no smaller step left" not in (state.reason or ""):
        state = State(state.cap, 0)  # so that rejections alone do not stop the loop
        wanted = parent - gate.goal(parent, target, asdict(state))
        cuts.append(-(-wanted // step) * step)
        decided = decide(
            state,
            parent - cuts[-1],
            BAD,
            BAD,
            parent_params=parent,
            target=target,
            smallest_cut=step,
        )
        assert decided.keep == "parent"
        state = decided.state
    assert cuts[0] == first * step and all(later < earlier for earlier, later in pairwise(cuts))
    assert cuts[-1] == step
