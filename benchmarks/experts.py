"""A small mixture: whole experts or neurons in all of them, criteria, and a loop against one-shot pruning.

    python examples/tiny_reasoner/train.py --experts 8 -o .ptl/models/tiny-experts
    python benchmarks/experts.py [--kept 6 4 3 2] [--seeds 11 12 13 14 15]
    python benchmarks/experts.py table

Of the eight experts of each layer some are kept; the rest go in one cut, or one after another in a loop. Arms by
neurons keep all experts, and of each expert's neurons the same share: as many parameters but for the routers' rows.
The seed draws calibration, training order and what `random` removes. Accuracy is greedy exact match on generated
problems that no shipped file holds. Each model is a line of benchmarks/results/experts.jsonl; what is there is not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from depth_report import mean_and_interval
from loops import ROOT, TINY, json_rows, run, study, work_quietly
from recovery import CPT, correct_items, generate

from ptl.config.schedule import Prune, Schedule
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of

MODEL = ROOT / ".ptl" / "models" / "tiny-experts"
RESULTS = ROOT / "benchmarks" / "results" / "experts.jsonl"
SUBJECT = replace(TINY, model=MODEL)
# name -> iterations, what is removed, criterion
ARMS = {
    "reap": (1, "experts", "reap"),
    "random": (1, "experts", "random"),
    "loop of 4, reap": (4, "experts", "reap"),
    "neurons, taylor": (1, "neurons", "taylor"),
    "neurons, max": (1, "neurons", "max"),
    "neurons, weight": (1, "neurons", "weight"),
    "neurons, random": (1, "neurons", "random"),
    "loop of 4, neurons, taylor": (4, "neurons", "taylor"),
}
Row = dict[str, Any]


def measure(arm: str, kept: int, tokens: int, seed: int, problems: list[dict[str, str]]) -> Row:
    """One model: as large as with `kept` experts in each layer, and trained on `tokens` tokens."""
    iterations, unit, criterion = ARMS[arm]
    dense = model_dimensions(MODEL, family_of(checkpoint.read_config(MODEL)))
    narrow = replace(dense, width=dense.width * kept // dense.experts)
    goal = (replace(dense, experts=kept) if unit == "experts" else narrow).params
    schedule = Schedule(target=float(goal), recovery_tokens=tokens, iterations=iterations)
    prune = Prune(target=unit, criterion=criterion)
    with tempfile.TemporaryDirectory() as folder:
        trained = run(SUBJECT, schedule, prune, [CPT], seed, Path(folder))
        solved = correct_items(trained.checkpoint, problems)
        after = model_dimensions(
            trained.checkpoint, family_of(checkpoint.read_config(trained.checkpoint))
        )
    sizes = {"active_params": after.active_params, "experts": after.experts, "width": after.width}
    return {"params": after.params, **sizes, "solved": solved}


def table() -> None:
    """Accuracy of each arm with its interval over the seeds."""
    found = [row for row in json_rows(RESULTS) if row["arm"] in ARMS and row["tokens"]]
    print("| experts kept | arm | parameters | active | accuracy (95 %) | seeds |")
    print("|---:|---|---:|---:|---|---:|")
    first = {(row["kept"], row["arm"]): row for row in found}
    for kept, arm in sorted(first, key=lambda key: (-key[0], list(ARMS).index(key[1]))):
        row = first[kept, arm]
        shares = [
            statistics.mean(each["solved"])
            for each in found
            if (each["kept"], each["arm"]) == (kept, arm)
        ]
        sizes = f"{row['params']:,} | {row['active_params']:,}"
        print(f"| {kept} | {arm} | {sizes} | {mean_and_interval(shares)} | {len(shares)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["measure", "table"], default="measure")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--kept", type=int, nargs="+", default=[6, 4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--items", type=int, default=500)
    given = parser.parse_args()
    if given.what == "table":
        table()
        return
    work_quietly()
    problems = list(generate("test", given.items, 4711))
    product = itertools.product(given.arms, given.kept, (given.tokens,), given.seeds)
    cells = [
        dict(zip(("arm", "kept", "tokens", "seed"), values, strict=True)) for values in product
    ]
    study(RESULTS, cells, lambda cell: measure(**cell, problems=problems))


if __name__ == "__main__":
    main()
