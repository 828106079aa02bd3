"""Two models on the same items of a benchmark: paired statistics, and the verdict that they allow. Pure functions.

Three verdicts on a candidate against a reference, over the same items, with a margin m and a significance level alpha:

- *inferior*: the accuracy fell by more than m, and the exact one-sided McNemar test calls the fall real (p <= alpha).
  However many items change between two evaluations of the same model, each is as likely a regression as an
  improvement, and the test's exact significance level is at most alpha: they are called inferior with a probability of
  at most alpha.
- *not inferior*: the lower bound of the paired bootstrap (one-sided, significance level alpha) is above -m. A reference
  whose accuracy is not above m cannot fall by more than m: there only a bound above 0, an improvement, counts.
- *unclear*: neither; the items are too few for the margin, or the reference solves too few of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ptl.errors import InputError

Verdict = Literal["not inferior", "unclear", "inferior"]
Item = dict[str, Any]  # a line of items.jsonl: task, id, prompt_digest, correct, ...
RESAMPLES = 10_000  # of the bootstrap


@dataclass(frozen=True)
class Paired:
    """Two models on the same items."""

    items: int
    reference: float  # accuracy, 0..1
    candidate: float  # accuracy, 0..1
    regressions: int  # right before, wrong now
    improvements: int  # wrong before, right now
    difference: float  # candidate - reference
    low: float  # bound of the difference, one-sided at alpha; with `high` a 1 - 2 alpha interval
    high: float  # upper bound of the difference, one-sided at alpha
    p_different: float  # exact McNemar, two-sided
    p_worse: float  # exact McNemar, one-sided: the candidate is worse
    margin: float  # loss of accuracy that is tolerated, 0..1
    alpha: float  # significance level of each test
    verdict: Verdict  # for this margin and alpha

    def fails(self, strict: bool) -> bool:
        """Whether the candidate is inferior; with `strict` also where it is not shown to be not inferior."""
        return self.verdict == "inferior" or (strict and self.verdict == "unclear")


def wilson(correct: int, items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): (low, high) within 0..1."""
    from scipy.stats import binomtest

    # Within 0..1 to the last digit: 0 where none is right, 1 where all are.
    interval = binomtest(correct, items).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(regressions: int, improvements: int) -> tuple[float, float]:
    """McNemar's exact test on the items that changed: (p two-sided, p one-sided for "worse")."""
    from scipy.stats import binomtest

    changed = regressions + improvements
    if changed == 0:  # the outcomes are the same: nothing speaks for a difference
        return 1.0, 1.0
    # For equal models each changed item is a fair coin's throw.
    two_sided = binomtest(regressions, changed)
    worse = binomtest(regressions, changed, alternative="greater")
    return float(two_sided.pvalue), float(worse.pvalue)


@lru_cache(maxsize=1024)
def paired_bootstrap(
    regressions: int,
    improvements: int,
    items: int,
    alpha: float,
    seed: int = 0,
) -> tuple[float, float]:
    """Bounds of the accuracy difference, each one-sided at significance level alpha, by resampling the items.

    Half an item is added to each of the four cells of the paired table (Agresti & Min 2005), so that a few items
    without a change are not taken for certainty.
    """
    import numpy as np

    same = items - regressions - improvements  # two cells: right both times, wrong both times
    cells = np.array([regressions + 0.5, improvements + 0.5, same + 1.0])
    shares = cells / cells.sum()
    resampled = np.random.default_rng(seed).multinomial(items, shares, size=RESAMPLES)  # [resamples, 3]
    differences = (resampled[:, 1] - resampled[:, 0]) / items  # [resamples]
    low, high = np.quantile(differences, [alpha, 1 - alpha])
    return float(low), float(high)


def paired(
    reference: Sequence[int],
    candidate: Sequence[int],
    margin: float,  # a share of the items
    alpha: float,  # significance level of each test
) -> Paired:
    """Compare two lists of 0/1 outcomes of the same items in the same order."""
    items = len(reference)
    # (before, after) -> number of items
    changes = Counter(zip(reference, candidate, strict=True))
    regressions = changes[1, 0]
    improvements = changes[0, 1]
    accuracy = sum(reference) / items
    low, high = paired_bootstrap(regressions, improvements, items, alpha)
    p_different, p_worse = mcnemar(regressions, improvements)
    verdict = verdict_of(regressions, improvements, items, margin, alpha)
    # An accuracy that is not above the margin cannot fall by more than it.
    if accuracy <= margin and low <= 0:
        verdict = "unclear"
    return Paired(
        items=items,
        reference=accuracy,
        candidate=sum(candidate) / items,
        regressions=regressions,
        improvements=improvements,
        difference=(improvements - regressions) / items,
        low=low,
        high=high,
        p_different=p_different,
        p_worse=p_worse,
        margin=margin,
        alpha=alpha,
        verdict=verdict,
    )


def verdict_of(regressions: int, improvements: int, items: int, margin: float, alpha: float) -> Verdict:
    """The verdict that the counts allow, for a reference that can fall by more than the margin."""
    _, p_worse = mcnemar(regressions, improvements)
    if regressions - improvements > margin * items and p_worse <= alpha:
        return "inferior"
    low, _ = paired_bootstrap(regressions, improvements, items, alpha)
    return "not inferior" if low > -margin else "unclear"


def smallest_inferior_drop(improvements: int, items: int, margin: float, alpha: float) -> float | None:
    """The smallest drop of the accuracy that is called inferior where as many items improve; None: no drop is."""
    # Each further regression makes the drop larger and p smaller.
    regressions = range(items - improvements + 1)

    def is_inferior(count: int) -> bool:
        return verdict_of(count, improvements, items, margin, alpha) == "inferior"

    fewest = bisect_left(regressions, True, key=is_inferior)
    return None if fewest == len(regressions) else (fewest - improvements) / items


def match(
    reference: Sequence[Item],
    candidate: Sequence[Item],
    task: str | None = None,
) -> tuple[list[int], list[int]]:
    """Outcomes of two evaluations, item by item, of one task or all. Raises InputError for other items or prompts."""
    old, new = (
        {(item["task"], item["id"]): item for item in items if task in (None, item["task"])}
        for items in (reference, candidate)
    )
    problem = remedy = ""
    if not old or not new:
        problem, remedy = "no items with a 0/1 outcome", "evaluate a task that has an accuracy"
    elif others := old.keys() ^ new.keys():
        problem = (
            f"different items ({len(old)} and {len(new)}; for example {' item '.join(min(others))} is in one only)"
        )
        remedy = "evaluate both with the same tasks and the same limit"
    # An item that was asked in another way is another item.
    elif changed := [key for key in old if old[key]["prompt_digest"] != new[key]["prompt_digest"]]:
        problem = f"the prompts of {' item '.join(changed[0])} differ"
        remedy = "evaluate both with the same task version, few-shot examples, seed and chat template"
    if problem:
        raise InputError(problem, field="compare", remedy=remedy)
    before = [int(item["correct"]) for item in old.values()]
    after = [int(new[key]["correct"]) for key in old]
    return before, after


def p_longer(reference: Sequence[Item], candidate: Sequence[Item], task: str) -> float | None:
    """Wilcoxon's signed-rank test (1945), one-sided, that the candidate's answers to the same items have more tokens.

    None where nothing was generated.
    """
    from scipy.stats import wilcoxon

    before = {item["id"]: item["tokens"] for item in reference if item["task"] == task}
    after = {item["id"]: item["tokens"] for item in candidate if item["task"] == task}
    differences = [after[key] - before[key] for key in before]
    if not any(before.values()):
        return None
    return float(wilcoxon(differences, alternative="greater").pvalue) if any(differences) else 1.0


def describe(pair: Paired) -> str:
    """One comparison in words, with its numbers in percentage points."""
    return (
        f"{pair.verdict}: {100 * pair.difference:+.1f} points ({100 * pair.low:+.1f} to {100 * pair.high:+.1f}, "
        f"margin {100 * pair.margin:g}, p worse {pair.p_worse:.2g}, {pair.items:,} items)"
    )
