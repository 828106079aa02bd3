import json
import math
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest

from ptl.errors import InputError
from ptl.evaluation import evaluate, paired

MARGIN, ALPHA = 0.02, 0.05


def outcomes(right, n):
    return [1] * right + [0] * (n - right)


def compared(before, after, n=500, margin=MARGIN):
    """Two models that solve the first items of a benchmark, one this many and the other that many."""
    return paired.paired(paired.Outcomes(outcomes(before, n), outcomes(after, n)), margin, ALPHA)


# ---- the statistics


def test_wilson_matches_published_intervals_and_has_the_confidence_that_is_asked_for():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    assert paired.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert paired.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert paired.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert (paired.wilson(0, 20)[0], paired.wilson(20, 20)[1]) == (0.0, 1.0)
    z, share, n = 1.6448536269514722, 0.3, 20
    centre, half = share + z**2 / 2 / n, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    bounds = [(centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert paired.wilson(6, 20, 0.9) == pytest.approx(bounds, abs=1e-12)


def test_mcnemar_is_the_exact_binomial_test():
    for counts in [(0, 0), (1, 0), (0, 1), (5, 5), (12, 3), (3, 12), (40, 21)]:
        regressions, n = counts[0], sum(counts)
        at_least = [Fraction(sum(math.comb(n, k) for k in range(count, n + 1)), 2**n) for count in range(n + 1)]
        two_sided = min(1, 2 * at_least[max(counts)])
        assert paired.mcnemar(*counts) == pytest.approx((float(two_sided), float(at_least[regressions])), rel=1e-9)


def exact_bounds(regressions, improvements, items, alpha):
    """Quantiles of improvements - regressions of multinomial draws, half an item added to each of four cells."""
    worse, better = ((count + 0.5) / (items + 2) for count in (regressions, improvements))
    item, chances = np.array([worse, 1 - worse - better, better]), np.ones(1)
    for _ in range(items):
        chances = np.convolve(chances, item)
    cumulated = chances.cumsum()  # of -items, ..., items
    return [int(np.searchsorted(cumulated, share)) - items for share in (alpha, 1 - alpha)]


def test_the_bootstrap_has_the_bounds_of_the_multinomial_distribution():
    for table in [(10, 0, 10, 0.1), (0, 10, 10, 0.1), (0, 0, 10, 0.1), (14, 3, 200, 0.05), (2, 30, 500, 0.025)]:
        bounds = [bound / table[2] for bound in exact_bounds(*table)]
        assert paired.paired_bootstrap(*table) == pytest.approx(bounds), table
    uncached, many = paired.paired_bootstrap.__wrapped__, (400_000, 200_000, 10_000_000, 0.05)
    assert uncached(*many) == uncached(*many)  # in every process


def test_all_numbers_of_a_comparison():
    reference, candidate = [1] * 120 + [0] * 80, [0] * 14 + [1] * 106 + [1] * 3 + [0] * 77
    low, high = exact_bounds(14, 3, 200, ALPHA)
    expected = {"items": 200, "reference": 0.6, "candidate": 0.545, "regressions": 14, "improvements": 3}
    expected |= {"difference": -0.055, "low": low / 200, "high": high / 200, "verdict": "inferior"}
    # 680 + 136 + 17 + 1 ways of 14 and more out of 17
    expected |= {"p_different": pytest.approx(2 * 834 / 2**17), "p_worse": pytest.approx(834 / 2**17)}
    pair = paired.paired(paired.Outcomes(reference, candidate), MARGIN, ALPHA)
    assert asdict(pair) == {**expected, "margin": MARGIN, "alpha": ALPHA, "samples": 1}


def test_only_strictly_an_unclear_comparison_fails():
    pair = compared(480, 480)
    for verdict, expected in {
        "not inferior": (False, False),
        "unclear": (False, True),
        "inferior": (True, True),
    }.items():
        judged = replace(pair, verdict=verdict)
        assert (judged.fails(strict=False), judged.fails(strict=True)) == expected, verdict


# ---- the verdict, at its boundaries


def test_the_verdict_at_its_boundaries():
    # A fall by the margin is not yet more than the margin; a p of exactly alpha, 1/32, is significant.
    assert [paired.verdict_of(count, 0, 500, 0.02, 0.05) for count in (10, 11)] == ["unclear", "inferior"]
    assert [paired.verdict_of(5, 0, 100, 0.0, p) for p in (1 / 32 - 1e-9, 1 / 32)] == ["unclear", "inferior"]
    # A bound of exactly the margin shows nothing, nor does no change on a few items.
    low, _ = paired.paired_bootstrap(0, 0, 500, 0.05)
    assert [paired.verdict_of(0, 0, 500, m, 0.05) for m in (-low, -low + 1e-9)] == ["unclear", "not inferior"]
    assert low < 0 and compared(9, 9, n=10).verdict == "unclear"


def test_a_reference_that_cannot_fall_by_the_margin_proves_nothing_unless_the_candidate_is_better():
    assert [compared(right, right).verdict for right in (0, 10, 11)] == ["unclear", "unclear", "not inferior"]
    lows = [compared(0, right).low for right in range(12)]
    assert 0.0 in lows and lows[0] < 0 < lows[-1]
    verdicts = [compared(0, right).verdict for right in range(12)]
    assert verdicts == ["not inferior" if low > 0 else "unclear" for low in lows]


def test_the_smallest_inferior_drop():
    # More than 4 and p = 1/32; p = 9/256 (6 of 7: 8/128); more than 10 after 6 improvements; more than 26.38 after 40.
    for improvements, items, regressions in [(0, 200, 5), (1, 20, 7), (6, 500, 17), (40, 1319, 67)]:
        drop = paired.smallest_inferior_drop(improvements, items, 0.02, 0.05)
        assert drop == (regressions - improvements) / items
    # No drop is shown by a handful of items.
    assert paired.smallest_inferior_drop(0, 4, 0.0, 0.05) is None  # p of 4 regressions is 1/16
    assert paired.smallest_inferior_drop(0, 5, 0.0, 0.05) == 1.0  # 1/32


def test_equal_models_are_called_inferior_or_different_at_most_as_often_as_alpha():
    """A/A, counted: however many items change, each by a coin's toss, the chance of a false alarm is at most alpha."""
    items = 30
    for changed in range(items + 1):
        inferior = different = 0
        for regressions in range(changed + 1):
            ways = math.comb(changed, regressions)
            verdict = paired.verdict_of(regressions, changed - regressions, items, 0.0, ALPHA)
            inferior += ways * (verdict == "inferior")
            different += ways * (paired.mcnemar(regressions, changed - regressions)[0] <= ALPHA)
        assert max(inferior, different) <= ALPHA * 2**changed


# ---- items.jsonl


def item(i, correct=1, task="t", digest="d"):
    return {"task": task, "id": str(i), "prompt_digest": digest, "correct": correct}


def test_longer_answers_are_told_from_chance():
    def answers(lengths):
        return [item(i) | {"tokens": length} for i, length in enumerate(lengths)] + [item(0, task="u") | {"tokens": 9}]

    before = range(20, 40)
    assert paired.p_longer(answers(before), answers([n + 5 + n % 3 for n in before]), "t") < 1e-3
    assert paired.p_longer(answers(before), answers([n + (-1) ** n for n in before]), "t") > 0.3
    assert paired.p_longer(answers(before), answers([n - 5 for n in before]), "t") > 0.99
    assert paired.p_longer(answers(before), answers(before), "t") == 1.0
    assert paired.p_longer(answers([0] * 20), answers([0] * 20), "t") is None  # choices


def test_items_are_matched_by_task_and_id_and_other_items_refused():
    old, new = [item(1, 1), item(2, 0), item(1, 0, "u")], [item(1, 1, "u"), item(2, 1), item(1, 0)]
    assert paired.match(old, new) == ([1, 0, 0], [0, 1, 1], 1)
    assert paired.match(old, new, "u") == ([0], [1], 1)
    one, two = item(1), item(2)
    for new, message in [
        ([one], r"different items \(2 and 1; for example t item 2 is in one only"),
        ([one, two, item(2, task="u")], "for example u item 2"),
        ([one, item(2, digest="e")], "the prompts of t item 2 differ"),
        ([], "no items with a 0/1 outcome"),
    ]:
        with pytest.raises(InputError, match=message):
            paired.match([one, two], new)


def written(folder, **outcomes):
    """An items.jsonl with these outcomes of each task."""
    folder.mkdir()
    lines = [json.dumps(item(i, correct, task)) for task, its in outcomes.items() for i, correct in enumerate(its)]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_each_benchmark_is_compared_and_alpha_is_shared(tmp_path):
    a = written(tmp_path / "a", t=outcomes(96, 100), u=outcomes(480, 500))
    b = written(tmp_path / "b", u=outcomes(440, 500), t=outcomes(96, 100))
    pairs = evaluate.compare(a, b / "items.jsonl", MARGIN, ALPHA)
    assert pairs["t"] == paired.paired(outcomes(96, 100), outcomes(96, 100), MARGIN, 0.025)
    assert (pairs["t"].verdict, pairs["u"].verdict, pairs["u"].regressions) == ("unclear", "inferior", 40)
    *_, row, _, _ = evaluate.comparison_table(pairs).splitlines()
    assert row.replace("│", " ").split() == ["u", "96.0%", "40", "-8.0", "9.1e-13", "inferior"]
    assert list(pairs) == ["t", "u"]
    with pytest.raises(InputError, match="different items"):  # in a benchmark that only B has
        evaluate.compare(written(tmp_path / "c", t=outcomes(96, 100)), b, MARGIN, ALPHA)
    with pytest.raises(InputError, match=r"no items\.jsonl"):
        evaluate.compare(a, tmp_path, MARGIN, ALPHA)
    for margin, alpha in [(-0.1, 0.05), (1.0, 0.05), (0.02, 0.0), (0.02, 0.5)]:
        with pytest.raises(InputError, match="compare: margin="):
            evaluate.compare(a, a, margin, alpha)
