"""`ptl compare A B`: two evaluations, item by item, as a table and an exit code that CI can use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from ptl.errors import InputError
from ptl.evaluation import paired
from ptl.evaluation.evaluate import read_items

# Two lines for each benchmark: in the 80 columns of a log only a name of more than 13 letters folds.
HEADINGS = (
    "A\nB",
    "regressions\nimprovements",
    "difference\n(interval)",
    "p worse\np different",
)


@dataclass(frozen=True)
class Comparison:
    """B against A on every benchmark that both were scored on."""

    tasks: dict[str, paired.Paired]  # by benchmark
    exit_code: int  # 0 not inferior, 1 inferior; errors of the user's input are 2, as everywhere


def compare(
    items_a: Path,
    items_b: Path,
    margin: float,  # loss of accuracy that is tolerated, 0..1
    alpha: float,  # significance level of all tests together
    *,
    strict: bool = False,
) -> Comparison:
    """Compare two items.jsonl (files, or folders that hold one); A is the reference.

    Exit code 1 where B is inferior on any benchmark; with `strict` also where it is not shown to be not inferior. The
    significance level alpha is shared among the benchmarks, so that equal models are called different with a
    probability of at most alpha in all. Raises InputError when the items or prompts differ.
    """
    if not 0 <= margin < 1 or not 0 < alpha < 0.5:
        problem = f"margin={margin} must be in 0..1 and alpha={alpha} above 0 and below 0.5"
        raise InputError(problem, field="compare")
    old = read_items(items_a)
    new = read_items(items_b)
    # Over all benchmarks first: one that only B has would not be missed below.
    paired.match(old, new)
    names = list(dict.fromkeys(item["task"] for item in old))
    tasks = {}
    for name in names:
        before, after = paired.match(old, new, name)
        tasks[name] = paired.paired(before, after, margin, alpha / len(names))
    failed = any(pair.fails(strict) for pair in tasks.values())
    return Comparison(tasks, exit_code=int(failed))


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal."""
    first = next(iter(comparison.tasks.values()))
    title = f"B against A, margin {100 * first.margin:g} points, one-sided significance level {first.alpha:g} each"
    view = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        show_lines=len(comparison.tasks) > 1,
    )
    view.add_column("benchmark\nitems", overflow="fold")
    for heading in HEADINGS:
        view.add_column(heading, justify="right", overflow="fold", no_wrap=True)
    view.add_column("verdict", overflow="fold", no_wrap=True)
    for name, pair in comparison.tasks.items():
        interval = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"  # percentage points
        view.add_row(
            f"{name}\n{pair.items:,}",
            f"{pair.reference:.1%}\n{pair.candidate:.1%}",
            f"{pair.regressions}\n{pair.improvements}",
            f"{100 * pair.difference:+.1f}\n({interval})",
            f"{pair.p_worse:.2g}\n{pair.p_different:.2g}",
            pair.verdict,
        )
    return view
