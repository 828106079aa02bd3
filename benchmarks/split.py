"""Which division of a cut among hidden size, FFN and KV heads is the best, and which rule finds it without trying all?

    python benchmarks/split.py measure [--model mixture] [--shares 0.5 0.65]   # many divisions of a size, recovered
    python benchmarks/split.py report [--model mixture]                        # what each rule would have chosen

Rules: the loss right after the cut, the sum of the first-order scores of all that goes, the loss after 5 % of the
recovery, a hidden size by a fixed power of the share that stays, and ptl's (ptl/model/widths.py). Each division is a
line of benchmarks/results/split.jsonl; what is there is not measured again. The mixture is that of
benchmarks/experts.py, which says how to train it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

from depth import ROOT, workers
from loops import json_rows

RESULTS = ROOT / "benchmarks" / "results" / "split.jsonl"
# Model -> share of the parameters -> tokens and rate of the recovery, hidden sizes with two KV heads and with one
SETTINGS: dict[str, dict[float, tuple[int, float, tuple[int, ...], tuple[int, ...]]]] = {
    "dense": {
        0.5: (200_000, 6e-4, (64, 60, 52, 48), (64, 58, 54, 50)),
        0.6: (200_000, 1.2e-3, (64, 56, 48), (64, 58, 50)),
        0.65: (500_000, 1.7e-3, (64, 56, 48, 44), (64, 56, 50, 44)),
        0.75: (500_000, 2.4e-3, (44, 40, 32), (64, 54, 50, 46, 38)),
        0.8: (500_000, 2.4e-3, (36, 24), (64, 52, 42, 40, 34)),
        0.85: (500_000, 2.4e-3, (16,), (40, 36, 30)),
    },
    # Its widths are multiples of 8.
    "mixture": {
        0.65: (200_000, 1.7e-3, (64, 56, 48, 40), (64, 56, 48)),
        0.75: (200_000, 2.4e-3, (64, 56, 48, 40), (64, 56, 48, 40)),
        0.85: (500_000, 2.4e-3, (48, 40, 32), (64, 56, 40, 32)),
    },
}
SHORT = 0.05  # of the tokens
ITEMS, PROBLEM_SEED = 1000, 99
RULES = {"loss right after": "loss", "first order": "first_order", "loss after 5 %": "short_loss"}
POWER = 0.25  # of the rule with a fixed ratio

Row = dict[str, Any]


def subject_of(model: str) -> Any:
    import experts
    from loops import TINY

    return {"dense": TINY, "mixture": experts.SUBJECT}[model]


def measure(
    model: str, share: float, hidden: int, kv: int, seed: int, iterations: Sequence[int]
) -> Row:
    """One division: its losses, and its accuracy after the recovery at once and in loops."""
    from loops import run, work_quietly
    from recovery import CPT, correct_items, generate

    from ptl.config.schedule import Prune, Schedule, removal
    from ptl.data.sequences import calibration_batches
    from ptl.model import checkpoint, pretrained, widths
    from ptl.model.dimensions import model_dimensions
    from ptl.model.families import family_of
    from ptl.pruning.layerwise import LayerwiseModel, mean_loss

    work_quietly()
    subject = subject_of(model)
    tokens, rate, *_ = SETTINGS[model][share]
    family = family_of(checkpoint.read_config(subject.model))
    dense = model_dimensions(subject.model, family)
    ends = {"hidden": hidden, "kv": kv}
    (sizes,) = widths.candidates(dense, dense.params - removal(dense.params, share), 1, ends)
    prune = Prune(target="width", width_multiple=1, width=ends)
    stage = CPT | {"learning_rate": rate, "save_steps": 10**9}
    batches = calibration_batches(
        subject.calibration, pretrained.load_tokenizer(subject.model), seed + 1000
    )
    row: Row = {"model": model, "share": share, "tokens": tokens, "rate": rate, "seed": seed}
    row |= {
        "hidden": sizes.hidden,
        "ffn": sizes.width,
        "kv": sizes.kv_heads,
        "params": sizes.params,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut = run(
            subject,
            Schedule(target=share, iterations=1, recovery_tokens=1),
            prune,
            [],
            seed,
            folder / "cut",
        )
        row["loss"] = mean_loss(LayerwiseModel(cut.checkpoint, family, batches))
        row["first_order"] = first_order(subject, sizes, seed)
        short = Schedule(target=share, iterations=1, recovery_tokens=int(SHORT * tokens))
        trained = run(subject, short, prune, [stage], seed, folder / "short")
        row["short_loss"] = mean_loss(LayerwiseModel(trained.checkpoint, family, batches))
        for count in iterations:
            schedule = Schedule(target=share, iterations=count, recovery_tokens=tokens)
            trained = run(subject, schedule, prune, [stage], seed, folder / str(count))
            solved = correct_items(trained.checkpoint, list(generate("test", ITEMS, PROBLEM_SEED)))
            row[f"accuracy of {count}"] = statistics.mean(solved)
    return row


def first_order(subject: Any, sizes: Any, seed: int) -> float:
    """The sum of the first-order scores of all that goes: changes of a sequence's summed loss."""
    from ptl.data.sequences import calibration_batches
    from ptl.model import checkpoint, pretrained
    from ptl.model.families import family_of
    from ptl.pruning.importance import all_width_scores
    from ptl.pruning.layerwise import LayerwiseModel

    family = family_of(checkpoint.read_config(subject.model))
    batches = calibration_batches(
        subject.calibration, pretrained.load_tokenizer(subject.model), seed
    )
    scores = all_width_scores(LayerwiseModel(subject.model, family, batches), True)
    total = float(scores.hidden.sort().values[: len(scores.hidden) - sizes.hidden].sum())
    for neurons, kv_heads in zip(scores.neurons, scores.kv_heads, strict=True):
        # of an MLP or each expert
        total += float(neurons.sort().values[..., : neurons.shape[-1] - sizes.width].sum())
        total += float(kv_heads.sort().values[: len(kv_heads) - sizes.kv_heads].sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "report"])
    parser.add_argument("--model", choices=SETTINGS, default="dense")
    parser.add_argument("--shares", type=float, nargs="+", help="default: all")
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[71])
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.what == "report":
        report(given.model)
        return
    known = {
        (row["model"], row["share"], row["hidden"], row["kv"], row["seed"])
        for row in json_rows(RESULTS)
    }
    settings = SETTINGS[given.model]
    cells = [
        (given.model, share, hidden, kv, seed)
        for seed in given.seeds
        for share in given.shares or settings
        for kv, sizes in zip((2, 1), settings[share][2:], strict=True)
        for hidden in sizes
    ]
    with workers(given.processes) as pool:
        missing = [cell for cell in cells if cell not in known]
        for done in as_completed(
            [pool.submit(measure, *cell, given.iterations) for cell in missing]
        ):
            row = done.result()
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def report(model: str) -> None:
    """A table of the divisions, and the accuracy that each rule gives up against the best of them."""
    found = [row for row in json_rows(RESULTS) if row["model"] == model]
    arms = sorted({name for row in found for name in row if name.startswith("accuracy")})
    groups: dict[tuple[float, int], list[Row]] = {}
    for row in sorted(found, key=lambda row: (-row["kv"], -row["hidden"])):
        groups.setdefault((row["share"], row["seed"]), []).append(row)
    print(
        "| share | hidden / FFN (KV) | loss | first order | loss after 5 % |",
        *arms,
        sep=" | ",
        end=" |\n",
    )
    print("|---|" + "---:|" * (4 + len(arms)))
    for (share, _), candidates in sorted(groups.items()):
        for row in candidates:
            sizes = f"{row['hidden']} / {row['ffn']} ({row['kv']})"
            values = [f"{row[name]:.2f}" for name in RULES.values()] + [
                f"{row[arm]:.1%}" for arm in arms
            ]
            print(f"| -{share:.0%} | {sizes} |", " | ".join(values), "|")
    choices = {rule: partial(_least, name) for rule, name in RULES.items()}
    choices |= {f"hidden by power {POWER}": _fixed_ratio, "ptl": _ptl}
    print(
        "\n| rule |", " | ".join(f"points below the best, {arm}: each share" for arm in arms), "|"
    )
    print("|---|" + "---:|" * len(arms))
    for rule, choose in choices.items():
        cells = []
        for arm in arms:
            lost = [
                max(row[arm] for row in each) - choose(each)[arm]
                for _, each in sorted(groups.items())
            ]
            values = ", ".join(f"{100 * value:.1f}" for value in lost)
            cells.append(f"**{100 * statistics.mean(lost):.1f}**: {values}")
        print(f"| {rule} |", " | ".join(cells), "|")


def _least(name: str, candidates: Sequence[Row]) -> Row:
    return min(candidates, key=lambda row: row[name])


def _fixed_ratio(candidates: Sequence[Row]) -> Row:
    """KV heads go at half of the parameters or more."""
    share = 1 - candidates[0]["share"]
    hidden, kv = 64 * share**POWER, 1 if share < 0.5 else 2
    return min(candidates, key=lambda row: (row["kv"] != kv, abs(row["hidden"] - hidden)))


def _ptl(candidates: Sequence[Row]) -> Row:
    """Of the divisions measured the nearest to those of ptl/model/widths.py; of two that with the lower loss."""
    from ptl.config.schedule import removal
    from ptl.model import checkpoint, widths
    from ptl.model.dimensions import model_dimensions
    from ptl.model.families import family_of

    folder = subject_of(candidates[0]["model"]).model
    dense = model_dimensions(folder, family_of(checkpoint.read_config(folder)))
    possible = widths.candidates(
        dense, dense.params - removal(dense.params, candidates[0]["share"]), 1, {}
    )
    nearest = [
        min(
            candidates,
            key=lambda row: (row["kv"] != sizes.kv_heads, abs(row["hidden"] - sizes.hidden)),
        )
        for sizes in possible
    ]
    loss = min(row["loss"] for row in nearest)
    return (
        nearest[0] if loss > math.log(256) else next(row for row in nearest if row["loss"] == loss)
    )


if __name__ == "__main__":
    main()
