from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptl.config.run import Gate
from ptl.errors import InputError
from ptl.evaluation import gate, paired

ON = Gate(enabled=True, margin=0.02, alpha=0.05)


def outcomes(right: int, n: int) -> list[int]:
    return [1] * right + [0] * (n - right)


@pytest.mark.parametrize(
    "correct, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_intervals(correct, n, low, high):
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    assert paired.wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_stays_within_0_and_1():
    assert paired.wilson(10, 10)[1] == 1.0
    assert paired.wilson(0, 10)[0] == 0.0


def test_mcnemar_is_the_exact_binomial_test():
    from scipy.stats import binomtest

    for regressions, improvements in [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (40, 21)]:
        n = regressions + improvements
        two_sided, worse = paired.mcnemar(regressions, improvements)
        assert two_sided == pytest.approx(binomtest(regressions, n).pvalue if n else 1.0)
        assert worse == pytest.approx(binomtest(regressions, n, alternative="greater").pvalue if n else 1.0)


@pytest.mark.parametrize(("improvements", "items"), [(0, 200), (1, 20), (6, 500), (40, 1319)])
def test_the_smallest_inferior_drop_is_where_the_verdict_changes(improvements, items):
    drop = paired.smallest_inferior_drop(improvements, items, 0.02, 0.05)
    regressions = round(drop * items) + improvements
    verdicts = [paired.verdict_of(count, improvements, items, 0.02, 0.05) for count in (regressions - 1, regressions)]
    assert verdicts[0] != "inferior" and verdicts[1] == "inferior"


def test_no_drop_is_shown_by_a_handful_of_items():
    assert paired.smallest_inferior_drop(0, 4, 0.0, 0.05) is None  # p of 4 regressions is 1/16
    assert paired.smallest_inferior_drop(0, 5, 0.0, 0.05) == 1.0  # 1/32


def test_bootstrap_covers_the_true_difference():
    rng = np.random.default_rng(1)
    misses = 0
    for trial in range(300):
        regressions, improvements, _ = rng.multinomial(500, (0.06, 0.03, 0.91))
        low, _ = paired.paired_bootstrap(int(regressions), int(improvements), 500, 0.05, seed=trial)
        misses += low > -0.03
    assert misses / 300 <= 0.088  # 5 % and three standard errors of 300 trials


@pytest.mark.parametrize(
    ("regressions", "improvements", "bounds"),
    [(10, 0, (-1.0, -0.6)), (0, 10, (0.6, 1.0)), (0, 0, (-0.1, 0.1))],
)
def test_the_bootstrap_adds_half_an_item_to_each_cell(regressions, improvements, bounds):
    """Exact 10 % and 90 % quantiles of ten multinomial draws, whose shares are 10.5, 0.5 and 1 twelfths."""
    assert paired.paired_bootstrap(regressions, improvements, 10, 0.1) == pytest.approx(bounds)


def test_paired_counts_and_verdicts():
    same = paired.paired(outcomes(480, 500), outcomes(480, 500), 0.02, 0.05)
    assert (same.regressions, same.improvements, same.difference, same.verdict) == (0, 0, 0.0, "not inferior")
    worse = paired.paired(outcomes(480, 500), outcomes(450, 500), 0.02, 0.05)
    assert (worse.regressions, worse.improvements, worse.verdict) == (30, 0, "inferior")
    assert worse.difference == pytest.approx(-0.06)
    few = paired.paired(outcomes(18, 20), outcomes(17, 20), 0.02, 0.05)
    assert few.verdict == "unclear"


def test_a_reference_that_cannot_fall_by_the_margin_proves_nothing_unless_the_candidate_is_better():
    none, few, many = (outcomes(right, 500) for right in (0, 10, 11))
    assert [paired.paired(same, same, 0.02, 0.05).verdict for same in (none, few, many)] == [
        "unclear",
        "unclear",
        "not inferior",
    ]
    assert paired.paired(none, outcomes(50, 500), 0.02, 0.05).verdict == "not inferior"


def test_no_change_on_a_few_items_proves_nothing():
    assert paired.paired(outcomes(9, 10), outcomes(9, 10), 0.02, 0.05).verdict == "unclear"


def alarms(changed, items):
    """Exact chances that a comparison with this many changed items, each a coin's toss, says different, inferior."""
    from scipy.stats import binom

    regressions = np.arange(changed + 1)
    chance = binom.pmf(regressions, changed, 0.5)
    p_worse, p_better = binom.sf(regressions - 1, changed, 0.5), binom.cdf(regressions, changed, 0.5)
    different = 2 * np.minimum(p_worse, p_better) <= ON.alpha
    inferior = (p_worse <= ON.alpha) & (2 * regressions - changed > ON.margin * items)
    return chance[different].sum(), chance[inferior].sum()


def test_the_level_is_exact_however_many_items_change():
    """A/A, without chance: given the number of items that changed, a false alarm's probability is at most alpha."""
    for items in (20, 200, 1319):
        assert max(max(alarms(changed, items)) for changed in range(items + 1)) <= ON.alpha
    for regressions, improvements, items in [(12, 3, 200), (13, 2, 200), (5, 0, 200), (40, 21, 1319), (60, 30, 1319)]:
        verdict = paired.verdict_of(
            regressions, improvements, items, ON.margin, ON.alpha
        )  # the code follows the rule that was counted
        p_worse = paired.mcnemar(regressions, improvements)[1]
        assert (verdict == "inferior") == (p_worse <= ON.alpha and regressions - improvements > ON.margin * items)


@pytest.mark.parametrize("n", [200, 500, 1319])
@pytest.mark.slow
def test_equal_models_are_called_different_at_most_as_often_as_alpha(n):
    """A/A, with chance: 1,000 pairs of sampled evaluations of one model whose items differ in difficulty.

    The exact probability is below alpha; the number of alarms in 1,000 pairs scatters about it, and must be one that a
    procedure of level alpha reaches with a probability above 1 in 1,000.
    """
    from scipy.stats import binom

    rng = np.random.default_rng(n)
    different = inferior = 0
    for _ in range(1000):
        chances = rng.beta(2, 1, size=n)
        first, second = ((rng.random(n) < chances).astype(int).tolist() for _ in range(2))
        compared = paired.paired(first, second, ON.margin, ON.alpha)
        different += compared.p_different <= ON.alpha
        inferior += compared.verdict == "inferior"
    changed = binom.pmf(np.arange(n + 1), n, 1 / 3)  # E 2p(1-p) = 1/3 for p of Beta(2, 1)
    exact = changed @ np.array([alarms(k, n) for k in range(n + 1)])
    assert (exact <= ON.alpha).all()
    most = binom.ppf(0.999, 1000, ON.alpha)  # 73
    assert max(different, inferior) <= most
    for count, probability in zip((different, inferior), exact, strict=True):
        assert binom.ppf(0.001, 1000, probability) <= count <= binom.ppf(0.999, 1000, probability)


def item(i, correct=1, digest="d"):
    return {"task": "t", "id": str(i), "prompt_digest": digest, "correct": correct}


def test_match_aligns_items_by_id():
    old, new = [item(1, 1), item(2, 0)], [item(2, 1), item(1, 1)]
    assert paired.match(old, new) == ([1, 0], [1, 1])


@pytest.mark.parametrize(
    "new, message",
    [([item(1)], "different items"), ([item(1), item(2, digest="e")], "prompts of t item 2"), ([], "no items")],
)
def test_match_refuses_other_items_and_other_prompts(new, message):
    with pytest.raises(InputError, match=message):
        paired.match([item(1), item(2)], new)


def test_goal_follows_the_plan_until_a_cap_holds_it():
    assert gate.goal(1000, 700, {}) == 700
    assert gate.goal(1000, 700, {"cap": 100, "rejections": 1, "stopped": False}) == 900
    assert gate.goal(1000, 950, {"cap": 100, "rejections": 1, "stopped": False}) == 950
    assert gate.goal(1000, 700, {"cap": 100, "rejections": 1, "stopped": True}) == 1000


def pair(right_before, right_after, n=500, margin=ON.margin):
    return paired.paired(outcomes(right_before, n), outcomes(right_after, n), margin, ON.alpha)


def test_gate_accepts_rejects_halves_and_stops():
    good, bad = pair(495, 494), pair(495, 450)
    given_ = {"parent_params": 1000, "target_params": 500, "smallest_cut": 50}
    accepted = gate.decide(ON, gate.State(), params=700, baseline=good, parent=good, **given_)
    assert (accepted.decision, accepted.keep, accepted.state) == ("accepted", "candidate", gate.State())
    rejected = gate.decide(ON, gate.State(), params=700, baseline=bad, parent=good, **given_)
    assert (rejected.decision, rejected.keep, rejected.state) == ("rejected", "parent", gate.State(150, 1, False))
    assert "against the baseline" in rejected.reason
    assert rejected.numbers["baseline"]["regressions"] == 45
    again = gate.decide(ON, rejected.state, params=850, baseline=good, parent=bad, **given_)
    assert again.state == gate.State(75, 2, False)
    assert "against the parent" in again.reason
    once = gate.State(75, 1)
    no_step = gate.decide(ON, once, params=925, baseline=bad, parent=bad, **given_ | {"smallest_cut": 40})
    assert no_step.state.stopped and "no smaller step left" in no_step.state.reason
    nothing = gate.decide(ON, gate.State(), params=700, baseline=bad, parent=bad, **given_ | {"smallest_cut": None})
    assert nothing.state.stopped and "nothing is left to cut" in nothing.reason
    third = gate.decide(ON, gate.State(150, 2), params=925, baseline=bad, parent=bad, **given_)
    assert third.state == gate.State(37, 3, True, "3 rejections in a row")
    recovered = gate.decide(ON, again.state, params=925, baseline=good, parent=good, **given_)
    assert recovered.state == gate.State(150, 0, False)
    reached = gate.decide(ON, gate.State(), params=500, baseline=good, parent=good, **given_)
    assert (reached.decision, reached.state) == ("accepted", gate.State(None, 0, True, "target reached"))
    nothing_cut = gate.decide(ON, gate.State(), params=1000, baseline=good, parent=good, **given_)
    assert (nothing_cut.decision, nothing_cut.state.stopped) == ("accepted", False)
    after = gate.decide(ON, reached.state, params=500, **given_ | {"parent_params": 500})
    assert (after.decision, after.keep) == ("stopped", "parent")


def test_without_the_gate_nothing_is_called_accepted():
    decided = gate.decide(Gate(), gate.State(), params=700, target_params=500)
    assert (decided.decision, decided.keep) == ("gate off", "candidate")
    assert decided.numbers == {"params": 700, "target_params": 500}  # no parent is known: nothing was compared with it


def test_strict_gate_rejects_what_is_not_shown():
    unclear = pair(18, 17, n=20)
    assert unclear.verdict == "unclear"
    given_ = {"params": 700, "parent_params": 1000, "target_params": 500, "baseline": unclear, "parent": unclear}
    assert gate.decide(ON, gate.State(), **given_).decision == "accepted"
    strict = ON.model_copy(update={"strict": True})
    assert gate.decide(strict, gate.State(), **given_).decision == "rejected"


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(1_000, 10**7),
    share=st.floats(0.01, 0.9),
    progress=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    losses=st.lists(st.integers(-20, 60), min_size=12, max_size=12),
    enabled=st.booleans(),
    strict=st.booleans(),
)
def test_loop_under_the_gate(start, share, progress, losses, enabled, strict):
    """A whole static loop: what goes on was accepted, no cut is planned beyond the target, stopping is for good."""
    rule = Gate(enabled=enabled, strict=strict)
    target = start - int(share * start)
    current, right, state = start, 400, gate.State()
    rejected_before, after_stop = 0, False
    for done, loss in zip(sorted(progress), losses, strict=False):
        wanted = gate.goal(current, start - int(done * (start - target)), state.dump())
        assert target <= wanted <= current
        if state.cap is not None:
            assert current - wanted <= state.cap
        candidate_right = max(0, min(500, right - loss))
        compared = {"baseline": pair(400, candidate_right), "parent": pair(right, candidate_right)}
        decided = gate.decide(rule, state, params=wanted, parent_params=current, target_params=target, **compared)
        assert not after_stop or decided.decision == "stopped"
        assert (decided.keep == "candidate") == (decided.decision in ("accepted", "gate off"))
        assert (decided.decision == "gate off") == (not enabled)
        if decided.keep == "candidate":
            assert decided.state.cap == (None if state.cap is None else 2 * state.cap if enabled else state.cap)
            if enabled:
                assert all(each.verdict != "inferior" for each in compared.values())
            current, right = wanted, candidate_right
            rejected_before = 0
        elif decided.decision == "rejected":
            assert enabled
            assert decided.state.cap == (current - wanted) // 2
            rejected_before += 1
        state, after_stop = decided.state, decided.state.stopped
        assert rejected_before <= Gate.max_rejections
        assert rejected_before < Gate.max_rejections or state.stopped
        assert current >= target
        assert current > target or state.stopped or not enabled


def test_one_early_rejection_does_not_hold_the_whole_run():
    """The defect: all later iterations could remove half of the rejected one at most, here 350 of 800 in all."""
    good, bad, current, state = pair(495, 495), pair(495, 400), 2000, gate.State()
    for i in range(1, 9):
        wanted = gate.goal(current, 2000 - 100 * i, state.dump())
        compared = {"baseline": bad, "parent": bad} if i == 1 else {"baseline": good, "parent": good}
        decided = gate.decide(ON, state, params=wanted, parent_params=current, target_params=1200, **compared)
        current, state = wanted if decided.keep == "candidate" else current, decided.state
    assert current == 1200 and state.reason == gate.REACHED


class Patient(Gate):
    """A gate that hardly ever stops the loop."""

    max_rejections: ClassVar[int] = 1000


@given(step=st.integers(1, 10_000), first=st.integers(1, 300), rest=st.integers(1, 300))
def test_after_a_rejection_every_cut_is_smaller_than_the_one_before(step, first, rest):
    """Cuts are rounded up to whole steps, as widths are rounded down: no candidate is tried twice, and it ends."""
    rule = Patient(enabled=True)
    parent = (first + rest) * step
    bad, state, cuts = pair(495, 400), gate.State(), []
    while not state.stopped:
        wanted = parent - gate.goal(parent, parent - first * step, state.dump())
        cuts.append(-(-wanted // step) * step)
        given_ = {"params": parent - cuts[-1], "parent_params": parent, "target_params": parent - first * step}
        decided = gate.decide(rule, state, **given_, baseline=bad, parent=bad, smallest_cut=step)
        assert decided.keep == "parent"
        state = decided.state
    assert cuts[0] == first * step and all(later < earlier for earlier, later in pairwise(cuts))
    assert cuts[-1] == step and "no smaller step left" in state.reason


@settings(max_examples=100, deadline=None)
@given(
    regressions=st.integers(0, 100),
    improvements=st.integers(0, 100),
    margins=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
)
def test_a_larger_margin_never_turns_acceptance_into_rejection(regressions, improvements, margins):
    before = [1] * regressions + [0] * improvements + [1] * 300
    after = [0] * regressions + [1] * improvements + [1] * 300
    order = ["inferior", "unclear", "not inferior"]
    small, large = (paired.paired(before, after, margin, 0.05) for margin in sorted(margins))
    assert order.index(small.verdict) <= order.index(large.verdict)
    for strict in (False, True):
        rule = Gate(enabled=True, strict=strict)
        kept = [
            gate.decide(rule, gate.State(), params=9, parent_params=10, target_params=5, baseline=p, parent=p).keep
            for p in (small, large)
        ]
        assert kept != ["candidate", "parent"]
