"""Which division of a cut among hidden size, FFN and KV heads is the best, and which rule finds it without trying all?

    python benchmarks/split.py measure [--shares 0.5 0.65 0.75 0.8]   # every candidate of `ptl plan`, recovered
    python benchmarks/split.py report                                 # what each rule would have chosen

Rules: the loss right after the cut, the sum of the first-order scores of all that goes, the loss after 5 % of the
recovery, and always the same powers of the share that stays. Each candidate is a line of
benchmarks/results/split.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from depth import ROOT, workers

RESULTS = ROOT / "benchmarks" / "results" / "split.jsonl"
# Share of the parameters -> tokens and learning rate of the recovery
SETTINGS = {
    0.4: (200_000, 6e-4),
    0.5: (200_000, 6e-4),
    0.6: (200_000, 1.2e-3),
    0.65: (500_000, 1.7e-3),
    0.7: (500_000, 1.7e-3),
    0.75: (500_000, 2.4e-3),
    0.8: (500_000, 2.4e-3),
    0.85: (500_000, 2.4e-3),
}
SHORT = 0.05  # of the tokens
ITEMS, PROBLEM_SEED = 1000, 99
RULES = {"loss right after": "loss", "first order": "first_order", "loss after 5 %": "short_loss"}

Row = dict[str, Any]


def measure(share: float, number: int, seed: int, iterations: Sequence[int]) -> Row | None:
    """One candidate: its losses, and its accuracy after the recovery at once and in loops; None: there is none."""
    from loops import TINY, run, work_quietly
    from recovery import CPT, correct_items, generate

    from ptl.config.schedule import Prune, Schedule, removal
    from ptl.data.sequences import calibration_batches
    from ptl.model import checkpoint, pretrained, widths
    from ptl.model.dimensions import model_dimensions
    from ptl.model.families import family_of
    from ptl.pruning.layerwise import LayerwiseModel, mean_loss

    work_quietly()
    tokens, rate = SETTINGS[share]
    family = family_of(checkpoint.read_config(TINY.model))
    dense = model_dimensions(TINY.model, family)
    possible = widths.candidates(dense, dense.params - removal(dense.params, share), 1, {})
    if number >= len(possible):
        return None
    sizes = possible[number]
    prune = Prune(target="width", width_multiple=1, width={"hidden": sizes.hidden, "kv": sizes.groups})
    stage = CPT | {"learning_rate": rate, "save_steps": 10**9}
    batches = calibration_batches(TINY.calibration, pretrained.load_tokenizer(TINY.model), seed + 1000)
    row: Row = {"share": share, "tokens": tokens, "rate": rate, "seed": seed, "number": number}
    row |= {"hidden": sizes.hidden, "ffn": sizes.width, "kv": sizes.groups, "params": sizes.params}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut = run(TINY, Schedule(target=share, iterations=1, recovery_tokens=1), prune, [], seed, folder / "cut")
        row["loss"] = mean_loss(LayerwiseModel(cut.checkpoint, family, batches))
        row["first_order"] = first_order(sizes, seed)
        short = Schedule(target=share, iterations=1, recovery_tokens=int(SHORT * tokens))
        trained = run(TINY, short, prune, [stage], seed, folder / "short")
        row["short_loss"] = mean_loss(LayerwiseModel(trained.checkpoint, family, batches))
        for count in iterations:
            schedule = Schedule(target=share, iterations=count, recovery_tokens=tokens)
            trained = run(TINY, schedule, prune, [stage], seed, folder / str(count))
            solved = correct_items(trained.checkpoint, list(generate("test", ITEMS, PROBLEM_SEED)))
            row[f"accuracy of {count}"] = statistics.mean(solved)
    return row


def first_order(sizes: Any, seed: int) -> float:
    """The sum of the first-order scores of all that goes: changes of a sequence's summed loss."""
    from loops import TINY

    from ptl.data.sequences import calibration_batches
    from ptl.model import checkpoint, pretrained
    from ptl.model.families import family_of
    from ptl.pruning.importance import all_width_scores
    from ptl.pruning.layerwise import LayerwiseModel

    family = family_of(checkpoint.read_config(TINY.model))
    batches = calibration_batches(TINY.calibration, pretrained.load_tokenizer(TINY.model), seed)
    scores = all_width_scores(LayerwiseModel(TINY.model, family, batches), True)
    total = float(scores.hidden.sort().values[: len(scores.hidden) - sizes.hidden].sum())
    for neurons, groups in zip(scores.neurons, scores.groups, strict=True):
        total += float(neurons.sort().values[: len(neurons) - sizes.width].sum())
        total += float(groups.sort().values[: len(groups) - sizes.groups].sum())
    return total


def rows() -> list[Row]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "report"])
    parser.add_argument("--shares", type=float, nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[71])
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.what == "report":
        report()
        return
    known = {(row["share"], row["number"], row["seed"]) for row in rows()}
    cells = [(share, number, seed) for seed in given.seeds for share in given.shares for number in range(8)]
    with workers(given.processes) as pool:
        missing = [cell for cell in cells if cell not in known]
        for done in as_completed([pool.submit(measure, *cell, given.iterations) for cell in missing]):
            row = done.result()
            if row is not None:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def report() -> None:
    """A table of the candidates, and the accuracy that each rule gives up against the best of them."""
    found = rows()
    arms = sorted({name for row in found for name in row if name.startswith("accuracy")})
    groups: dict[tuple[float, int], list[Row]] = {}
    for row in found:
        groups.setdefault((row["share"], row["seed"]), []).append(row)
    print("| share | hidden / FFN (KV) | loss | first order | loss after 5 % |", *arms, sep=" | ", end=" |\n")
    print("|---|" + "---:|" * (4 + len(arms)))
    for (share, _), candidates in sorted(groups.items()):
        for row in sorted(candidates, key=lambda row: row["number"]):
            sizes = f"{row['hidden']} / {row['ffn']} ({row['kv']})"
            values = [f"{row[name]:.2f}" for name in RULES.values()] + [f"{row[arm]:.1%}" for arm in arms]
            print(f"| -{share:.0%} | {sizes} |", " | ".join(values), "|")
    print("\n| rule |", " | ".join(f"points below the best, {arm}" for arm in arms), "|")
    print("|---|" + "---:|" * len(arms))
    for rule, name in RULES.items():
        lost = {arm: [] for arm in arms}
        for candidates in groups.values():
            chosen = min(candidates, key=lambda row: row[name])
            for arm in arms:
                lost[arm].append(max(row[arm] for row in candidates) - chosen[arm])
        print(f"| {rule} |", " | ".join(f"{100 * statistics.mean(values):.1f}" for values in lost.values()), "|")


if __name__ == "__main__":
    main()
