"""`ptl compare A B`: two evaluations, item by item, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ptl.errors import InputError
from ptl.evaluation import paired
from ptl.evaluation.evaluate import read_items
from ptl.evaluation.paired import Paired
from ptl.log import table_text

# Two lines for each benchmark: for the 80 columns of a terminal
NUMBERS = ("A\nB", "regressions\nimprovements", "difference\n(interval)", "p worse\np different")
HEADINGS = ("benchmark\nitems", *NUMBERS, "verdict")


def compare(
    items_a: Path,
    items_b: Path,
    margin: float,  # loss of accuracy that is tolerated, 0..1
    alpha: float,  # significance level of all tests together
) -> dict[str, Paired]:
    """Compare two items.jsonl (files, or folders that hold one): B against A, the reference, on each benchmark.

    The significance level alpha is shared among the benchmarks, so that equal models are called different with a
    probability of at most alpha in all. Raises InputError when the items or prompts differ.
    """
    if not 0 <= margin < 1 or not 0 < alpha < 0.5:
        problem = f"margin={margin} must be in 0..1 and alpha={alpha} above 0 and below 0.5"
        raise InputError(problem, field="compare")
    old, new = read_items(items_a), read_items(items_b)
    # Over all benchmarks first: one that only B has would not be missed below.
    paired.match(old, new)
    names = list(dict.fromkeys(item["task"] for item in old))
    return {name: paired.paired(*paired.match(old, new, name), margin, alpha / len(names)) for name in names}


def table(tasks: Mapping[str, Paired]) -> str:
    """The comparisons for a terminal."""
    first = next(iter(tasks.values()))
    title = f"B against A, margin {100 * first.margin:g} points, one-sided significance level {first.alpha:g} each"
    rows = [
        (
            f"{name}\n{pair.items:,}",
            f"{pair.reference:.1%}\n{pair.candidate:.1%}",
            f"{pair.regressions}\n{pair.improvements}",
            # In percentage points
            f"{100 * pair.difference:+.1f}\n({100 * pair.low:+.1f} to {100 * pair.high:+.1f})",
            f"{pair.p_worse:.2g}\n{pair.p_different:.2g}",
            pair.verdict,
        )
        for name, pair in tasks.items()
    ]
    return table_text(title, HEADINGS, rows, numbers=NUMBERS)
