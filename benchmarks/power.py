"""Power of the gate: how often a true loss of accuracy is called inferior, and no loss is shown to be none.

Run: python benchmarks/power.py [--margin 0.02] [--alpha 0.05] [--churn 0.03]
"""

import argparse
from functools import cache

import numpy as np

from ptl.evaluation.paired import Verdict, bootstrap, sign_flips, verdict_of

ITEMS = (200, 500, 1319)
DROPS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.10)


@cache
def judge(regressions: int, improvements: int, items: int, margin: float, alpha: float) -> Verdict:
    """The verdict on these counts, for a reference that can fall by more than the margin."""
    low, _ = bootstrap(
        {-1: regressions, 1: improvements, 0: items - regressions - improvements}, 1, alpha
    )
    _, p_worse = sign_flips({-1: regressions, 1: improvements})
    return verdict_of(regressions - improvements, items, low, p_worse, margin, alpha)


def power(
    items: int, drop: float, churn: float, margin: float, alpha: float, trials: int = 2000
) -> dict[Verdict, float]:
    """The share of each verdict when the accuracy truly drops by `drop`, by simulation.

    `churn` is the share of the items that are regressions, and again that are improvements, beside the drop: two
    models of equal accuracy seldom solve the same items.
    """
    shares = [churn + drop, churn, 1 - 2 * churn - drop]  # regressions, improvements, unchanged
    simulated = np.random.default_rng(0).multinomial(items, shares, size=trials)  # [trials, 3]
    counts: dict[Verdict, float] = {"inferior": 0, "unclear": 0, "not inferior": 0}
    for regressions, improvements, _ in simulated.tolist():
        verdict = judge(regressions, improvements, items, margin, alpha)
        counts[verdict] += 1 / trials
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument(
        "--churn", type=float, default=0.03, help="share of regressions and of improvements, each"
    )
    parser.add_argument("--trials", type=int, default=2000)
    args = parser.parse_args()
    print(
        f"margin {args.margin:.1%}, alpha {args.alpha}, churn {args.churn:.1%} each way, {args.trials:,} trials"
    )
    print("each cell: inferior / unclear / not inferior, in percent\n")
    print("| true drop | " + " | ".join(f"{n:,} items" for n in ITEMS) + " |")
    print("|---" * (len(ITEMS) + 1) + "|")
    for drop in DROPS:
        cells = []
        for n in ITEMS:
            shares = power(n, drop, args.churn, args.margin, args.alpha, args.trials)
            cells.append(
                " / ".join(
                    f"{100 * shares[v]:.0f}" for v in ("inferior", "unclear", "not inferior")
                )
            )
        print(f"| {100 * drop:.0f} points | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
