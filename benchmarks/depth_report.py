"""What benchmarks/depth.py has measured: a Markdown table on standard output, and docs/depth.svg.

    python benchmarks/depth_report.py [--against "one-shot, width"] # default: the best that prunes at once, per size

p and the intervals are Student's, over the seeds that both arms have: models differ by more than their problems do.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depth import ARMS, ONE_SHOTS, RESULT, RESULTS, ROOT, Results, Row, Study

BESIDE = 0.25  # percent, so that intervals do not hide each other
BUDGET = 500_000  # tokens, of the picture
PICTURE = ROOT / "docs" / "depth.svg"
SHOWN = {  # in the picture
    "one-shot, taylor": "FFN alone, at once",
    "loop of 8, taylor": "FFN alone, loop of 8",
    "one-shot, width": "KV heads or hidden size too, at once",
    "loop of 4, width": "KV heads or hidden size too, loop of 4",
}


@dataclass(frozen=True)
class Summary:
    """An arm at one size and budget, over the seeds of the results."""

    study: Study
    learning_rate: float
    params: int
    solved: dict[int, list[int]]  # of each seed, 0 or 1 for each problem
    flops: float  # of training
    scoring_flops: float | None  # of the prune steps; None where it was measured without
    seconds: float

    @property
    def accuracies(self) -> list[float]:
        return [statistics.mean(bits) for bits in self.solved.values()]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean (Student's t): seeds differ by more than their problems do."""
        return half_width(self.accuracies)


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of a mean, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def mean_and_interval(shares: Sequence[float], sign: str = "") -> str:
    """In points, with half of Student's 95 % interval where there are several."""
    points = [100 * share for share in shares]
    mean = f"{statistics.mean(points):{sign}.1f}"
    return f"{mean} ± {half_width(points):.1f}" if len(points) > 1 else mean


def summaries(results: Results) -> list[Summary]:
    """All arms whose results are complete, by budget, share and arm; not those of options that are gone."""
    cells = {(cell.tokens, cell.share, cell.arm) for cell in results.rows if cell.arm in ARMS}
    found = []
    for tokens, share, arm in sorted(cells, key=lambda key: (*key[:2], list(ARMS).index(key[2]))):
        study = Study(arm, share, tokens)
        rows = results.of(study)
        if rows:
            found.append(_summary(study, rows))
    return found


def _summary(study: Study, rows: Sequence[Row]) -> Summary:
    solved = {}
    for row in rows:
        solved[row["seed"]] = [int(bit) for bit in f"{int(row['solved'], 16):0{RESULT.items}b}"]
    return Summary(
        study,
        learning_rate=rows[0]["learning_rate"],
        params=rows[0]["params"],
        solved=solved,
        flops=statistics.mean(row["flops"] for row in rows),
        scoring_flops=rows[0].get("scoring_flops"),
        seconds=statistics.mean(row["seconds"] for row in rows),
    )


def best_of(arms: Sequence[str], group: Sequence[Summary]) -> Summary | None:
    """The best of these arms at one size and budget."""
    possible = [summary for summary in group if summary.study.arm in arms]
    return max(possible, key=lambda summary: summary.mean, default=None)


def difference(ours: Summary, its: Summary) -> str:
    """On the seeds that both have: points with their interval, and p that the true difference is none."""
    from scipy.stats import ttest_1samp

    seeds = [seed for seed in ours.solved if seed in its.solved]
    by_seed = [
        statistics.mean(ours.solved[seed]) - statistics.mean(its.solved[seed]) for seed in seeds
    ]
    p = ttest_1samp(by_seed, 0.0).pvalue
    return (
        f"{100 * statistics.mean(by_seed):+.1f} ± {100 * half_width(by_seed):.1f} points | {p:.1g}"
    )


def print_table(results: Results, references: Sequence[str] = ONE_SHOTS) -> None:
    """Each arm beside the best of the references."""
    print(
        "| removed | tokens | arm | rate | accuracy (95 %) | seeds | difference | p | GFLOPs: training | scoring "
        "| seconds |"
    )
    print("|---|---:|---|---|---|---:|---|---:|---:|---:|---:|")
    for (tokens, share), grouped in itertools.groupby(
        summaries(results), lambda it: (it.study.tokens, it.study.share)
    ):
        group = list(grouped)
        reference = best_of(references, group)
        for it in group:
            compared = (
                "- | -"
                if reference is None
                else "reference | -"
                if it is reference
                else difference(it, reference)
            )
            scoring = "-" if it.scoring_flops is None else f"{it.scoring_flops / 1e9:.0f}"
            print(
                f"| {share:.0%} | {tokens:,} | {it.study.arm} | {it.learning_rate:g} "
                f"| {100 * it.mean:.1f} ± {100 * it.half_width:.1f} | {len(it.solved)} | {compared} "
                f"| {it.flops / 1e9:.0f} | {scoring} | {it.seconds:.0f} |"
            )


def plot(results: Results, path: Path) -> None:
    """Accuracy against removed share, a line for each arm, with intervals over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ptl"  # the same picture is the same file
    from matplotlib import pyplot

    found = summaries(results)
    figure, axis = pyplot.subplots(figsize=(7.2, 3.8))
    for position, (arm, label) in enumerate(SHOWN.items()):
        line = [
            summary
            for summary in found
            if (summary.study.arm, summary.study.tokens) == (arm, BUDGET)
        ]
        axis.errorbar(
            [100 * summary.study.share + BESIDE * position for summary in line],
            [100 * summary.mean for summary in line],
            yerr=[100 * summary.half_width for summary in line],
            label=label,
            color=f"C{position // 2}",
            linestyle="--" if arm in ONE_SHOTS else "-",
            marker="o",
            markersize=4,
            capsize=3,
        )
    axis.set_title(f"{BUDGET:,} recovery tokens", fontsize=10)
    axis.set_xlabel("parameters removed (%)")
    axis.set_ylabel("problems solved (%)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", nargs="+", choices=ARMS, default=ONE_SHOTS, metavar="ARM")
    given = parser.parse_args()
    results = Results(RESULTS)
    if not summaries(results):
        raise SystemExit(f"{RESULTS} has no complete result: benchmarks/depth.py measure")
    print_table(results, given.against)
    plot(results, PICTURE)


if __name__ == "__main__":
    main()
