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
from ptl.evaluation import paired
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of

MODEL = ROOT / ".ptl" / "models" / "tiny-experts"
RESULTS = ROOT / "benchmarks" / "results" / "experts.jsonl"
SUBJECT = replace(TINY, model=MODEL)
# name -> iterations, what is removed, criterion
ARMS = {
    "reap": (1, "experts", "reap"),
    "frequency": (1, "experts", "frequency"),
    "norm": (1, "experts", "norm"),
    "random": (1, "experts", "random"),
    "loop of 4, reap": (4, "experts", "reap"),
    "neurons, taylor": (1, "neurons", "taylor"),
    "neurons, max": (1, "neurons", "max"),
    "neurons, weight": (1, "neurons", "weight"),
    "neurons, random": (1, "neurons", "random"),
    "loop of 4, neurons, taylor": (4, "neurons", "taylor"),
}
REFERENCE = "reap"
# Loops are compared with pruning at once by the same criterion.
LOOPS = {name: name.split(", ", 1)[1] for name in ARMS if name.startswith("loop")}

Row = dict[str, Any]


def measure(arm: str, kept: int, tokens: int, seed: int, problems: list[dict[str, str]]) -> Row:
    """One model: as large as with `kept` experts in each layer, and trained on `tokens` tokens; 0: only pruned."""
    iterations, unit, criterion = ARMS[arm]
    dense = model_dimensions(MODEL, family_of(checkpoint.read_config(MODEL)))
    narrow = replace(dense, width=dense.width * kept // dense.experts)
    goal = (replace(dense, experts=kept) if unit == "experts" else narrow).params
    schedule = Schedule(target=float(goal), recovery_tokens=max(tokens, iterations), iterations=iterations)
    prune = Prune(target=unit, criterion=criterion)
    stages = [CPT] if tokens else []
    with tempfile.TemporaryDirectory() as folder:
        trained = run(SUBJECT, schedule, prune, stages, seed, Path(folder))
        solved = correct_items(trained.checkpoint, problems)
        after = model_dimensions(trained.checkpoint, family_of(checkpoint.read_config(trained.checkpoint)))
    sizes = {"active_params": after.active_params, "experts": after.experts, "width": after.width}
    return {"params": after.params, **sizes, "solved": solved}


def table() -> None:
    """Accuracy of each arm with its interval over the seeds, and the paired comparison with its reference."""
    found = [row for row in json_rows(RESULTS) if row["arm"] in ARMS]
    print("| experts kept | arm | parameters | active | before recovery | accuracy (95 %) | seeds | difference | p |")
    print("|---:|---|---:|---:|---:|---|---:|---|---:|")
    trained = [row for row in found if row["tokens"]]
    first = {(row["kept"], row["arm"]): row for row in trained}
    for kept, arm in sorted(first, key=lambda key: (-key[0], list(ARMS).index(key[1]))):
        row = first[kept, arm]
        solved = solved_by_seed(trained, kept, arm)
        untrained = solved_by_seed([row for row in found if not row["tokens"]], kept, arm)
        before = f"{100 * statistics.mean(map(statistics.mean, untrained.values())):.1f}" if untrained else ""
        against, p = "", ""
        if arm != REFERENCE:
            reference = LOOPS.get(arm, REFERENCE)
            against, p = difference(solved_by_seed(trained, kept, reference), solved)
            against += f" against {reference}"
        accuracy = mean_and_interval([statistics.mean(bits) for bits in solved.values()])
        sizes = f"{row['params']:,} | {row['active_params']:,}"
        print(f"| {kept} | {arm} | {sizes} | {before} | {accuracy} | {len(solved)} | {against} | {p} |")


def solved_by_seed(found: list[Row], kept: int, arm: str) -> dict[int, list[int]]:
    """The outcomes of each seed's problems."""
    return {row["seed"]: row["solved"] for row in found if (row["kept"], row["arm"]) == (kept, arm)}


def difference(reference: dict[int, list[int]], solved: dict[int, list[int]]) -> tuple[str, str]:
    """Points with their interval over the seeds that both have, and McNemar's p over all of their problems."""
    seeds = [seed for seed in solved if seed in reference]
    by_seed = [statistics.mean(solved[seed]) - statistics.mean(reference[seed]) for seed in seeds]
    pooled = [list(itertools.chain(*(bits[seed] for seed in seeds))) for bits in (reference, solved)]
    pair = paired.paired(paired.Outcomes(*pooled), margin=0.02, alpha=0.05)
    p = f"{pair.p_different:.1g}" if pair.p_different else "< 1e-300"
    return mean_and_interval(by_seed, "+"), p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    product = itertools.product(given.arms, given.kept, (0, given.tokens), given.seeds)
    cells = [dict(zip(("arm", "kept", "tokens", "seed"), values, strict=True)) for values in product]
    # without training a loop ends like one cut, or nearly so
    cells = [cell for cell in cells if cell["tokens"] or ARMS[cell["arm"]][0] == 1]
    study(RESULTS, cells, lambda cell: measure(**cell, problems=problems))


if __name__ == "__main__":
    main()
