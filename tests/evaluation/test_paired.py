import itertools
import json
import math
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest

from ptl.errors import InputError
from ptl.evaluation import paired
from ptl.evaluation.evaluate import answers_table, compare, comparison_table, read_items

MARGIN, ALPHA = 0.02, 0.05


def outcomes(right, n):
    return [1] * right + [0] * (n - right)


def compared(before, after, n=500, margin=MARGIN):
    """Two models that solve the first items of a benchmark, one this many and the other that many."""
    return paired.paired(paired.Outcomes(outcomes(before, n), outcomes(after, n)), margin, ALPHA)


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


def test_mcnemar_is_the_exact_binomial_test_and_the_bootstrap_has_multinomial_bounds():
    for counts in [(0, 0), (1, 0), (0, 1), (5, 5), (12, 3), (3, 12), (40, 21)]:
        regressions, n = counts[0], sum(counts)
        at_least = [
            Fraction(sum(math.comb(n, k) for k in range(count, n + 1)), 2**n)
            for count in range(n + 1)
        ]
        two_sided = min(1, 2 * at_least[max(counts)])
        of_both = (float(two_sided), float(at_least[regressions]))
        assert paired.sign_flips({-1: counts[0], 1: counts[1], 0: 9}) == pytest.approx(
            of_both, rel=1e-9
        )
    for table in [
        (10, 0, 10, 0.1),
        (0, 10, 10, 0.1),
        (0, 0, 10, 0.1),
        (14, 3, 200, 0.05),
        (2, 30, 500, 0.025),
    ]:
        bounds = [bound / table[2] for bound in exact_bounds(*table)]
        assert bootstrap(*table) == pytest.approx(bounds), table
    many = (400_000, 200_000, 10_000_000, 0.05)
    assert bootstrap(*many) == bootstrap(*many)  # in every process


def bootstrap(regressions, improvements, items, alpha):
    changes = {-1: regressions, 1: improvements, 0: items - regressions - improvements}
    return paired.bootstrap(changes, 1, alpha)


def judge(regressions, improvements, items, margin, alpha):
    p_worse = paired.sign_flips({-1: regressions, 1: improvements})[1]
    low = bootstrap(regressions, improvements, items, alpha)[0]
    return paired.verdict_of(regressions - improvements, items, low, p_worse, margin, alpha)


def exact_bounds(regressions, improvements, items, alpha, samples=1, smaller=()):
    """Quantiles of the sum of multinomial draws, half an item added to each of four cells; `smaller` changes beside."""
    same = items - regressions - improvements - len(smaller)
    item, chances = np.zeros(2 * samples + 1), np.ones(1)  # of -samples, ..., samples
    item[[0, samples, -1]] = regressions + 0.5, same + 1, improvements + 0.5
    np.add.at(item, np.array(smaller, int) + samples, 1)
    for _ in range(items):
        chances = np.convolve(chances, item / item.sum())
    return [
        int(np.searchsorted(chances.cumsum(), share)) - items * samples
        for share in (alpha, 1 - alpha)
    ]


def test_all_numbers_of_a_comparison():
    reference, candidate = [1] * 120 + [0] * 80, [0] * 14 + [1] * 106 + [1] * 3 + [0] * 77
    low, high = exact_bounds(14, 3, 200, ALPHA)
    expected = {
        "items": 200,
        "reference": 0.6,
        "candidate": 0.545,
        "regressions": 14,
        "improvements": 3,
    }
    expected |= {"difference": -0.055, "low": low / 200, "high": high / 200, "verdict": "inferior"}
    # 680 + 136 + 17 + 1 ways of 14 and more out of 17
    expected |= {
        "p_different": pytest.approx(2 * 834 / 2**17),
        "p_worse": pytest.approx(834 / 2**17),
    }
    pair = paired.paired(paired.Outcomes(reference, candidate), MARGIN, ALPHA)
    assert asdict(pair) == {**expected, "margin": MARGIN, "alpha": ALPHA, "samples": 1}


def test_several_samples_are_compared_by_their_shares():
    reference, candidate = (
        [2] * 30 + [1] * 10 + [0] * 10,
        [2] * 24 + [1] * 4 + [0] * 2 + [2] * 3 + [1] * 7 + [0] * 10,
    )
    changes = [1] * 3 + [-1] * 4
    bounds = [bound / 100 for bound in exact_bounds(2, 0, 50, ALPHA, 2, changes)]
    pair = paired.paired(paired.Outcomes(reference, candidate, 2), MARGIN, ALPHA)
    assert (pair.items, pair.reference, pair.candidate, pair.samples) == (50, 0.7, 0.65, 2)
    assert (pair.regressions, pair.improvements, pair.difference) == (6, 3, pytest.approx(-0.05))
    assert (pair.low, pair.high) == pytest.approx(bounds, abs=0.0101)
    assert paired.hidden_drop(pair) == pair.high - pair.difference > MARGIN
    bounds = [bound / 320 for bound in exact_bounds(0, 0, 40, ALPHA, 8)]
    assert paired.bootstrap({0: 40}, 8, ALPHA) == pytest.approx(bounds, abs=0.011)
    # All sums of the differences with flipped signs
    flipped = [
        sum(signs)
        for signs in itertools.product(*([change, -change] for change in [*changes, -2, -2]))
    ]
    assert pair.p_worse == pytest.approx(sum(total <= -5 for total in flipped) / 2**9)
    assert pair.p_different == pytest.approx(sum(abs(total) >= 5 for total in flipped) / 2**9)
    # Samples that all go together are one sample.
    one = paired.Outcomes(outcomes(30, 50), outcomes(20, 50))
    four = paired.Outcomes(*([4 * right for right in model] for model in one[:2]), 4)
    single, several = (asdict(paired.paired(outcomes, MARGIN, ALPHA)) for outcomes in (one, four))
    assert several == pytest.approx(single | {"samples": 4}, abs=0.0201)
    assert paired.sign_flips({0: 9}) == (1.0, 1.0)


def test_verdicts_intervals_and_pass_at_n_of_several_samples():
    candidates = ([4, 4, 4] * 100, [4, 4, 3] * 100, [3, 3, 3] * 100)
    pairs = [
        paired.paired(paired.Outcomes([4] * 300, right, 4), MARGIN, ALPHA) for right in candidates
    ]
    assert [pair.verdict for pair in pairs] == ["not inferior", "inferior", "inferior"]
    two = paired.Outcomes([0, 1, 2, 0], [1, 2, 0, 0], 2)
    assert paired.at_least_one(two) == ([0, 1, 1, 0], [1, 1, 0, 0], 1)
    passed = paired.pass_at_n({"t": two, "u": paired.at_least_one(two)}, {"t": pairs[0]})
    assert [(task, pair.reference, pair.candidate) for task, pair in passed.items()] == [
        ("t", 0.5, 0.5)
    ]
    # An answer that is given n times counts once.
    right = outcomes(15, 20)
    assert paired.interval(right, 1) == paired.wilson(15, 20)
    assert paired.interval([4 * one for one in right], 4) == pytest.approx(paired.wilson(15, 20))
    # As of a coin: variance 1/8 / 2 samples; and no further than the number of answers.
    assert paired.interval([2, 1, 1, 0] * 5, 2) == pytest.approx(paired.wilson(20, 40))
    assert paired.interval([3, 2, 2, 2, 1] * 4, 4) == pytest.approx(paired.wilson(40, 80))
    assert paired.interval([4] * 20, 4) == paired.wilson(20, 20)
    assert paired.interval([1] * 20, 2) == paired.wilson(20, 40)  # items that all vary alike


def test_the_verdict_at_its_boundaries_and_what_fails_by_it():
    # A fall by the margin is not yet more than the margin; a p of exactly alpha, 1/32, is significant.
    assert [judge(count, 0, 500, 0.02, 0.05) for count in (10, 11)] == ["unclear", "inferior"]
    assert [judge(5, 0, 100, 0.0, p) for p in (1 / 32 - 1e-9, 1 / 32)] == ["unclear", "inferior"]
    # A bound of exactly the margin shows nothing, nor does no change on a few items.
    low, _ = bootstrap(0, 0, 500, 0.05)
    assert [judge(0, 0, 500, m, 0.05) for m in (-low, -low + 1e-9)] == ["unclear", "not inferior"]
    assert low < 0 and compared(9, 9, n=10).verdict == "unclear"
    pair = compared(480, 480)
    for verdict, fails in {
        "not inferior": (False, False),
        "unclear": (False, True),
        "inferior": (True, True),
    }.items():
        judged = replace(pair, verdict=verdict)
        assert (judged.fails(strict=False), judged.fails(strict=True)) == fails, verdict
    # A reference that cannot fall by the margin proves nothing, unless the candidate is better.
    assert [compared(right, right).verdict for right in (0, 10, 11)] == [
        "unclear",
        "unclear",
        "not inferior",
    ]
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
            verdict = judge(regressions, changed - regressions, items, 0.0, ALPHA)
            inferior += ways * (verdict == "inferior")
            p_different = paired.sign_flips({-1: regressions, 1: changed - regressions})[0]
            different += ways * (p_different <= ALPHA)
        assert max(inferior, different) <= ALPHA * 2**changed


def item(i, correct=1, task="t", digest="d"):
    return {"task": task, "id": str(i), "prompt_digest": digest, "correct": correct}


def test_longer_answers_are_told_from_chance():
    def answers(lengths):
        return [item(i) | {"tokens": length} for i, length in enumerate(lengths)] + [
            item(0, task="u") | {"tokens": 9}
        ]

    before = range(20, 40)
    assert paired.p_longer(answers(before), answers([n + 5 + n % 3 for n in before]), "t") < 1e-3
    assert paired.p_longer(answers(before), answers([n + (-1) ** n for n in before]), "t") > 0.3
    assert paired.p_longer(answers(before), answers([n - 5 for n in before]), "t") > 0.99
    assert paired.p_longer(answers(before), answers(before), "t") == 1.0
    assert paired.p_longer(answers([0] * 20), answers([0] * 20), "t") is None  # choices
    twice = [
        answer | {"tokens": answer["tokens"] + more}
        for more in (9, -9)
        for answer in answers(before)
    ]
    assert paired.p_longer(answers(before), twice, "t") == 1.0  # by the mean of an item's samples
    assert [paired.rambles(20, 22.1, p) for p in (0.01, 0.02, None)] == [True, False, False]
    assert not paired.rambles(20, 22, 0.001)


def test_items_are_matched_by_task_and_id_and_other_items_refused():
    old, new = [item(1, 1), item(2, 0), item(1, 0, "u")], [item(1, 1, "u"), item(2, 1), item(1, 0)]
    assert paired.match(old, new) == ([1, 0, 0], [0, 1, 1], 1)
    assert paired.match(old, new, "u") == ([0], [1], 1)
    assert paired.match(
        [item(1), item(2), item(1, 0), item(2)], [item(i) for i in (1, 2, 2, 1)]
    ) == ([1, 2], [2, 2], 2)
    one, two = item(1), item(2)
    for new, message in [
        ([one], r"different items \(2 and 1; for example t item 2 is in one only"),
        ([one, two, item(2, task="u")], "for example u item 2"),
        ([one, item(2, digest="e")], "the prompts of t item 2 differ"),
        ([], "no items with a 0/1 outcome"),
        (
            [one, two, two],
            r"different numbers of samples \(1 and 2 answers to t item 2\); evaluate both",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            paired.match([one, two], new)


def written(folder, **outcomes):
    """An items.jsonl with these outcomes of each task."""
    folder.mkdir()
    lines = [
        json.dumps(item(i, correct, task))
        for task, its in outcomes.items()
        for i, correct in enumerate(its)
    ]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def read(table):
    """The words of each line."""
    return [line.split() for line in table.replace("│", " ").splitlines()]


def test_each_benchmark_is_compared_and_alpha_is_shared(tmp_path):
    a = read_items(written(tmp_path / "a", t=outcomes(96, 100), u=outcomes(480, 500)))
    b = read_items(
        written(tmp_path / "b", u=outcomes(440, 500), t=outcomes(96, 100)) / "items.jsonl"
    )
    pairs, _ = compare(a, b, MARGIN, ALPHA)
    assert pairs["t"] == paired.paired(paired.Outcomes(*[outcomes(96, 100)] * 2), MARGIN, 0.025)
    assert (pairs["t"].verdict, pairs["u"].verdict, pairs["u"].regressions) == (
        "unclear",
        "inferior",
        40,
    )
    assert read(comparison_table(pairs, {}))[-3] == [
        "u",
        "96.0%",
        "40",
        "-8.0",
        "9.1e-13",
        "inferior",
    ]
    assert list(pairs) == ["t", "u"]
    with pytest.raises(InputError, match="different items"):  # in a benchmark that only B has
        compare([one for one in a if one["task"] == "t"], b, MARGIN, ALPHA)
    with pytest.raises(InputError, match=r"no items\.jsonl"):
        read_items(tmp_path)


def test_samples_and_lengths_are_compared():
    def answers(right, more):
        """Two answers to each of 40 items: the second one is right, and the first one of so many items."""
        length = [{"tokens": 20 + i + more, "truncated": i < 4} for i in range(40)]
        both = [item(i, k or i < right) | length[i] for i in range(40) for k in (0, 1)]
        return [*both, *(item(i, task="choices") | {"tokens": 0} for i in range(9))]

    old, new = answers(20, 0), answers(0, 10)
    rows = read(comparison_table(*compare(old, new, MARGIN, ALPHA)))
    avg, pass_at_2 = rows[5:9:2]
    assert avg == ["t", "75.0%", "20", "-25.0", "9.5e-07", "inferior"] and rows[6][:3] == [
        "40,",
        "avg@2",
        "50.0%",
    ]
    # it has no verdict
    assert pass_at_2 == ["t", "100.0%", "0", "+0.0", "1"] and rows[8][1] == "pass@2"
    rows = read(answers_table(old, new))
    assert rows[-3:-1] == [
        ["t", "39.5", "57", "10.0%", "1.3e-10", "rambles"],
        ["49.5", "67", "10.0%"],
    ]
    assert answers_table(old[80:], new[80:]) == ""  # choices are not generated
