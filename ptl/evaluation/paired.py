"""Two models on the same items of a benchmark: paired statistics, and the verdict that they allow. Pure functions.

Three verdicts on a candidate against a reference, over the same items, with a margin m and a significance level alpha:

- *inferior*: the accuracy fell by more than m, and the exact one-sided McNemar test calls the fall real (p <= alpha).
  However many items change between two evaluations of the same model, each is as likely a regression as an
  improvement, and the test's exact significance level is at most alpha: they are called inferior with a probability of
  at most alpha.
- *not inferior*: the lower bound of the paired bootstrap (one-sided, significance level alpha) is above -m. A reference
  whose accuracy is not above m cannot fall by more than m: there only a bound above 0, an improvement, counts.
- *unclear*: neither; the items are too few for the margin, or the reference solves too few of them.

With several samples of each item its outcome is the share of right ones. The test is then the exact one that flips the
signs of the items' differences, of which McNemar's is the case of one sample, and the bootstrap resamples them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pvariance
from typing import Any, Literal, NamedTuple

from ptl.errors import InputError

Verdict = Literal["not inferior", "unclear", "inferior"]
Item = dict[str, Any]  # a line of items.jsonl: task, id, prompt_digest, correct, ...
RESAMPLES = 10_000  # of the bootstrap
RAMBLES, RAMBLES_P = 1.1, 0.01  # times as many tokens in an answer, and p of it


class Outcomes(NamedTuple):
    """Right answers to the same items by two models, in the same order."""

    reference: list[int]  # of each item, 0..samples
    candidate: list[int]
    samples: int = 1  # answers to each item


@dataclass(frozen=True)
class Paired:
    """Two models on the same items."""

    items: int
    reference: float  # accuracy, 0..1
    candidate: float  # accuracy, 0..1
    regressions: int  # right before, wrong now; of several samples fewer are right now
    improvements: int  # wrong before, right now; of several samples more are right now
    difference: float  # candidate - reference
    low: float  # bound of the difference, one-sided at alpha; with `high` a 1 - 2 alpha interval
    high: float  # upper bound of the difference, one-sided at alpha
    p_different: float  # of the exact test, two-sided
    p_worse: float  # of the exact test, one-sided: the candidate is worse
    margin: float  # loss of accuracy that is tolerated, 0..1
    alpha: float  # significance level of each test
    verdict: Verdict  # for this margin and alpha
    samples: int = 1  # answers to each item

    def fails(self, strict: bool) -> bool:
        """Whether the candidate is inferior; with `strict` also where it is not shown to be not inferior."""
        return self.verdict == "inferior" or (strict and self.verdict == "unclear")


def wilson(correct: float, items: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): (low, high) within 0..1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / items
    centre = share + z * z / (2 * items)
    half = z * (share * (1 - share) / items + (z / (2 * items)) ** 2) ** 0.5
    low, high = ((centre + sign * half) / (1 + z * z / items) for sign in (-1, 1))
    # To the last digit: 0 where none is right, 1 where all are.
    return (low if correct else 0.0), (high if correct < items else 1.0)


def interval(right: Sequence[int], samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean share of right answers, of which each item has `samples`: Wilson's of one sample.

    Of several, Wilson's for their effective number (Kish 1965): as many independent answers as vary like the means of
    the items, so that the same answer n times counts once.
    """
    shares = [count / samples for count in right]
    mean, variance = fmean(shares), pvariance(shares)
    # Answers that an item counts for
    worth = (
        max(1.0, min(mean * (1 - mean) / variance, samples))
        if variance
        else samples
        if 0 < mean < 1
        else 1.0
    )
    return wilson(sum(right) / samples * worth, len(right) * worth, confidence)


def bootstrap(
    changes: Mapping[int, int], samples: int, alpha: float, seed: int = 0
) -> tuple[float, float]:
    """Bounds of the accuracy difference, each one-sided at significance level alpha, by resampling the items.

    `changes`: so many more of an item's `samples` are right -> number of items. Half an item is added to each of the
    four cells of the paired table (Agresti & Min 2005: right or wrong, before and now), so that a few items without a
    change are not taken for certainty.
    """
    import numpy as np

    items = sum(changes.values())
    differences = np.array(
        sorted(range(-samples, samples + 1), key=lambda change: (-abs(change), change))
    )
    cells = np.array([changes.get(change, 0) for change in differences.tolist()], float)
    cells[:2] += 0.5  # all samples wrong now, all right now
    cells[-1] += 1.0  # two cells: right both times, wrong both times
    resampled = np.random.default_rng(seed).multinomial(items, cells / cells.sum(), size=RESAMPLES)
    means = resampled @ differences / (items * samples)  # [resamples]
    low, high = np.quantile(means, [alpha, 1 - alpha])
    return float(low), float(high)


def sign_flips(changes: Mapping[int, int]) -> tuple[float, float]:
    """The exact permutation test of paired differences (Fisher 1935): (p two-sided, p one-sided for "worse").

    `changes` as of `bootstrap`. For equal models each item's difference has either sign with the same chance. Where all
    differences are of one size it is McNemar's exact test.
    """
    import numpy as np
    from scipy.signal import convolve
    from scipy.stats import binom

    lost = sum(-change * count for change, count in changes.items() if change < 0)  # answers
    total = sum(abs(change) * count for change, count in changes.items())
    chances = np.ones(1)  # of 0, 1, ... lost answers
    for size in sorted({abs(change) for change in changes} - {0}):
        count = changes.get(size, 0) + changes.get(-size, 0)  # items
        of_size = np.zeros(size * count + 1)
        of_size[::size] = binom.pmf(range(count + 1), count, 0.5)
        chances = convolve(chances, of_size).clip(0)
    # Long convolutions round to 1e-16: no p is below that of one arrangement of the signs.
    least = 0.5 ** sum(count for change, count in changes.items() if change)
    worse = max(least, float(chances[lost:].sum()))
    different = 2 * max(least, float(chances[max(lost, total - lost) :].sum()))
    return min(1.0, different), min(1.0, worse)


def paired(
    outcomes: Outcomes,
    margin: float,  # a share of the items
    alpha: float,  # significance level of each test
) -> Paired:
    """Compare two models on the same items."""
    reference, candidate, samples = outcomes
    items = len(reference)
    changes = Counter(after - before for before, after in zip(reference, candidate, strict=True))
    regressions = sum(count for change, count in changes.items() if change < 0)
    improvements = sum(count for change, count in changes.items() if change > 0)
    accuracy = sum(reference) / (items * samples)
    low, high = bootstrap(changes, samples, alpha)
    p_different, p_worse = sign_flips(changes)
    answers = items * samples
    verdict = verdict_of(sum(reference) - sum(candidate), answers, low, p_worse, margin, alpha)
    # An accuracy that is not above the margin cannot fall by more than it.
    if accuracy <= margin and low <= 0:
        verdict = "unclear"
    return Paired(
        items=items,
        reference=accuracy,
        candidate=sum(candidate) / answers,
        regressions=regressions,
        improvements=improvements,
        difference=(sum(candidate) - sum(reference)) / answers,
        low=low,
        high=high,
        p_different=p_different,
        p_worse=p_worse,
        margin=margin,
        alpha=alpha,
        verdict=verdict,
        samples=samples,
    )


def verdict_of(
    lost: int, answers: int, low: float, p_worse: float, margin: float, alpha: float
) -> Verdict:
    """For a reference that can fall by more than the margin; `lost` of the answers to all items are right no more."""
    if lost > margin * answers and p_worse <= alpha:
        return "inferior"
    return "not inferior" if low > -margin else "unclear"


def smallest_inferior_drop(
    improvements: int, items: int, margin: float, alpha: float
) -> float | None:
    """The smallest drop of the accuracy that is called inferior where as many items improve; None: no drop is."""
    # Each further regression makes the drop larger and p smaller.
    regressions = range(items - improvements + 1)

    def is_inferior(count: int) -> bool:
        _, p_worse = sign_flips({-1: count, 1: improvements})
        return verdict_of(count - improvements, items, 0.0, p_worse, margin, alpha) == "inferior"

    fewest = bisect_left(regressions, True, key=is_inferior)
    return None if fewest == len(regressions) else (fewest - improvements) / items


def hidden_drop(pair: Paired) -> float | None:
    """The drop below which a candidate is not called inferior to the reference; None: no drop would be.

    Of several samples the distance to the upper bound: a drop as large has it at 0.
    """
    drop: float | None = max(pair.margin, pair.high - pair.difference)
    if pair.samples == 1:
        drop = smallest_inferior_drop(pair.improvements, pair.items, pair.margin, pair.alpha)
    return None if drop is None or drop > pair.reference else drop


def by_item(items: Sequence[Item], task: str | None = None) -> dict[tuple[str, str], list[Item]]:
    """The answers to each item of one task or all: (task, id) -> one line of items.jsonl for each sample."""
    answers: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        if task in (None, item["task"]):
            answers.setdefault((item["task"], item["id"]), []).append(item)
    return answers


def match(
    reference: Sequence[Item], candidate: Sequence[Item], task: str | None = None
) -> Outcomes:
    """Outcomes of two evaluations, item by item, of one task, or of all where they have as many samples.

    Raises InputError for other items, prompts or numbers of samples.
    """
    old, new = by_item(reference, task), by_item(candidate, task)
    problem = remedy = ""
    if not old or not new:
        problem, remedy = "no items with a 0/1 outcome", "evaluate a task that has an accuracy"
    elif others := old.keys() ^ new.keys():
        example = " item ".join(min(others))
        problem = (
            f"different items ({len(old)} and {len(new)}; for example {example} is in one only)"
        )
        remedy = "evaluate both with the same tasks and the same limit"
    # An item that was asked in another way is another item.
    elif changed := [
        key for key in old if old[key][0]["prompt_digest"] != new[key][0]["prompt_digest"]
    ]:
        problem = f"the prompts of {' item '.join(changed[0])} differ"
        remedy = (
            "evaluate both with the same task version, few-shot examples, seed and chat template"
        )
    elif changed := [key for key in old if len(old[key]) != len(new[key])]:
        counts = " and ".join(f"{len(answers[changed[0]])}" for answers in (old, new))
        problem = f"different numbers of samples ({counts} answers to {' item '.join(changed[0])})"
        remedy = "evaluate both with the same `samples` of the task"
    if problem:
        raise InputError(problem, field="compare", remedy=remedy)
    before = [_right(answers) for answers in old.values()]
    after = [_right(new[key]) for key in old]
    return Outcomes(before, after, max(map(len, old.values())))


def _right(answers: Sequence[Item]) -> int:
    return sum(int(answer["correct"]) for answer in answers)


def at_least_one(outcomes: Outcomes) -> Outcomes:
    """Whether one of an item's samples is right: pass@n, by the unbiased estimator (Chen et al. 2021) with k = n."""
    reference, candidate = ([int(count > 0) for count in right] for right in outcomes[:2])
    return Outcomes(reference, candidate)


def pass_at_n(outcomes: Mapping[str, Outcomes], pairs: Mapping[str, Paired]) -> dict[str, Paired]:
    """Both models' pass@n on the tasks with several samples, tested as each task's pair is; it decides nothing."""
    return {
        task: paired(at_least_one(of_task), pairs[task].margin, pairs[task].alpha)
        for task, of_task in outcomes.items()
        if of_task.samples > 1
    }


def p_longer(reference: Sequence[Item], candidate: Sequence[Item], task: str) -> float | None:
    """Wilcoxon's signed-rank test (1945), one-sided, that the candidate's answers to the same items have more tokens.

    None where nothing was generated.
    """
    from scipy.stats import wilcoxon

    before, after = (
        {
            key: fmean(answer["tokens"] for answer in answers)
            for key, answers in by_item(items, task).items()
        }
        for items in (reference, candidate)
    )
    differences = [after[key] - before[key] for key in before]
    if not any(before.values()):
        return None
    return float(wilcoxon(differences, alternative="greater").pvalue) if any(differences) else 1.0


def rambles(before: float, after: float, p: float | None) -> bool:
    """Whether answers are longer, and not by chance: mean tokens before and after, and p of `p_longer`."""
    return p is not None and p <= RAMBLES_P and after > RAMBLES * before


def describe(pair: Paired) -> str:
    """One comparison in words, with its numbers in percentage points."""
    return (
        f"{pair.verdict}: {100 * pair.difference:+.1f} points ({100 * pair.low:+.1f} to {100 * pair.high:+.1f}, "
        f"margin {100 * pair.margin:g}, p worse {pair.p_worse:.2g}, {pair.items:,} items)"
    )
