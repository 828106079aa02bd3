"""Where does going gradually pay? Accuracy against removed share: one-shot pruning against loops, at equal tokens.

    python benchmarks/depth.py measure [--shares 0.6 0.65] [--arms "one-shot" "loop of 4"] [--tokens 500000]
    python benchmarks/depth.py cell   # one seed of both arms at one size, in minutes (make depth)
    python benchmarks/depth_report.py # the table, with paired tests against one-shot pruning, and docs/depth.svg

Each arm gets its own best learning rate for each share and budget. It is chosen on other seeds and other problems than
those of the results: three neighbours of a grid by steps of the square root of 2, and further ones for as long as the
best is at an edge. Every cell is a line of benchmarks/results/depth.jsonl, written as soon as it is measured; what is
there is not measured again, so a study that was interrupted resumes. Two processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "depth.jsonl"
RATES = tuple(float(f"{1.2e-3 * 2 ** (power / 2):.2g}") for power in range(-4, 6))  # 3e-4 to 6.8e-3
FIRST_RATES = (4, 5, 6)  # positions in RATES: 1.2e-3, 1.7e-3, 2.4e-3

Row = dict[str, Any]  # of RESULTS


@dataclass(frozen=True)
class Arm:
    """A way to reach a size: fields of the config's sections that differ from the defaults."""

    schedule: Row = field(default_factory=dict)
    prune: Row = field(default_factory=dict)
    stage: Row = field(default_factory=dict)  # of `recover`
    choice: str = "scored anew"  # of `choices`
    tokens: float = 1  # times the budget
    layers_last: bool = False  # the last iteration removes layers


ONE_SHOT = {"iterations": 1}
UNIFORM = {"iterations": 8, "cuts": "uniform"}
MAX = {"criterion": "max"}
TAYLOR = {"criterion": "taylor", "target": "neurons"}
LAYERS = {"target": "layers"}
WIDTH = {"target": "width"}
ARMS = {
    # Without a criterion in its name an arm goes by the paper's.
    "one-shot": Arm(ONE_SHOT, MAX),
    "one-shot, decay from the start": Arm(ONE_SHOT, MAX, {"decay": 1}),
    "loop of 4": Arm({"iterations": 4}, MAX),
    "one-shot, taylor": Arm(ONE_SHOT, TAYLOR),
    "loop of 4, taylor": Arm({"iterations": 4}, TAYLOR),
    "loop of 8, taylor": Arm({"iterations": 8}, TAYLOR),
    # Hidden size, FFN and KV heads, divided by ptl's rule.
    "one-shot, width": Arm(ONE_SHOT, WIDTH),
    "loop of 4, width": Arm({"iterations": 4}, WIDTH),
    "loop of 8, width": Arm({"iterations": 8}, WIDTH),
    # About the FLOPs of a loop of 8, scoring included.
    "one-shot, width, 1.4 times the tokens": Arm(ONE_SHOT, WIDTH, tokens=1.4),
    # Peers' scores, for as much of each width as by ptl's rule.
    "one-shot, width, minitron": Arm(ONE_SHOT, WIDTH, choice="minitron"),
    "one-shot, width, norm": Arm(ONE_SHOT, WIDTH, choice="norm"),
    "one-shot, width, random": Arm(ONE_SHOT, WIDTH, choice="random"),
    "one-shot, width, torch-pruning": Arm(ONE_SHOT, WIDTH, choice="torch-pruning"),
    # Layers: two of the four are 46 %.
    "one-shot, layers": Arm(ONE_SHOT, LAYERS),
    "loop of 2, layers": Arm({"iterations": 2, "cuts": "uniform"}, LAYERS),
    "loop of 8, neurons then layers": Arm(UNIFORM, TAYLOR, layers_last=True),
    "loop of 8, width then layers": Arm(UNIFORM, WIDTH, layers_last=True),
    # One thing switched off at a time.
    "loop of 8, taylor, decay from the start": Arm({"iterations": 8}, TAYLOR, {"decay": 1}),
    "loop of 8, taylor, uniform cuts": Arm(UNIFORM, TAYLOR),
    "loop of 8, taylor, uniform tokens": Arm({"iterations": 8, "tokens": "uniform"}, TAYLOR),
    # Peers: their choice of neurons, our recovery.
    "one-shot, weight": Arm(ONE_SHOT, {"criterion": "weight"}),
    "one-shot, torch-pruning magnitude": Arm(ONE_SHOT, TAYLOR, choice="torch-pruning magnitude"),
    "one-shot, torch-pruning taylor": Arm(ONE_SHOT, TAYLOR, choice="torch-pruning taylor"),
}
ONE_SHOTS = tuple(name for name, arm in ARMS.items() if arm.schedule == ONE_SHOT)


@dataclass(frozen=True)
class Claim:
    """Where the README says that going gradually wins."""

    arms: tuple[str, str]
    share: float
    tokens: int


CLAIM = Claim(("one-shot, width", "loop of 4, width"), 0.8, 500_000)


@dataclass(frozen=True)
class Phase:
    """Which seeds and problems: the learning rate is chosen on others than those of the results."""

    name: str
    seeds: tuple[int, ...]
    items: int
    problem_seed: int


CHOICE = Phase("choice", (1, 2), 1000, 99)
RESULT = Phase("result", (11, 12, 13, 14, 15, 16, 17, 18, 19, 20), 2000, 2026)
FEWEST_SEEDS = 5  # of the results; more where a claim rests


@dataclass(frozen=True)
class Cell:
    """One model: pruned and recovered by an arm, with one learning rate and one seed."""

    arm: str
    share: float  # of all parameters, to remove
    tokens: int  # of recovery, in all iterations
    learning_rate: float
    phase: str
    seed: int  # of calibration sequences and training order


@dataclass(frozen=True)
class Study:
    """The cells of one arm, share and budget."""

    arm: str
    share: float
    tokens: int

    def cell(self, phase: Phase, rate: float, seed: int) -> Cell:
        return Cell(self.arm, self.share, self.tokens, rate, phase.name, seed)


class Results:
    """The rows of a file, by their cells."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Cell, Row] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                self._take(json.loads(line))

    def add(self, row: Row) -> None:
        self._take(row)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _take(self, row: Row) -> None:
        names = Cell.__dataclass_fields__
        self.rows[Cell(**{name: row[name] for name in names})] = row

    def missing(self, study: Study, seeds: int = FEWEST_SEEDS) -> list[Cell]:
        """What to measure next: first all that the choice of the learning rate needs, then the results."""
        best = self.best_rate(study)
        if best is None:
            needed = [
                study.cell(CHOICE, rate, seed)
                for rate in self.tried(study)
                for seed in CHOICE.seeds
            ]
        else:
            needed = [study.cell(RESULT, best, seed) for seed in RESULT.seeds[:seeds]]
        return [cell for cell in needed if cell not in self.rows]

    def tried(self, study: Study) -> list[float]:
        """Learning rates to try, as far as is known: neighbours are added for as long as the best is at an edge."""
        low, *_, high = FIRST_RATES
        while True:
            rates = list(RATES[low : high + 1])
            means = [self.mean(study, rate) for rate in rates]
            if any(mean is None for mean in means):
                return rates
            best = low + max(range(len(rates)), key=lambda position: means[position] or 0.0)
            if best == low and low > 0:
                low -= 1
            elif best == high and high < len(RATES) - 1:
                high += 1
            else:
                return rates

    def best_rate(self, study: Study) -> float | None:
        """The chosen learning rate; None while a rate that is needed for the choice is not measured."""
        rates = self.tried(study)
        means = {rate: self.mean(study, rate) for rate in rates}
        if any(mean is None for mean in means.values()):
            return None
        return max(rates, key=lambda rate: means[rate] or 0.0)

    def mean(self, study: Study, rate: float) -> float | None:
        """The mean accuracy over the seeds of the choice; None where one is missing."""
        cells = [study.cell(CHOICE, rate, seed) for seed in CHOICE.seeds]
        if any(cell not in self.rows for cell in cells):
            return None
        return sum(self.rows[cell]["accuracy"] for cell in cells) / len(cells)

    def of(self, study: Study) -> list[Row]:
        """The rows of the results, in the order of the seeds; empty while there are fewer than five."""
        best = self.best_rate(study)
        if best is None:
            return []
        cells = [study.cell(RESULT, best, seed) for seed in RESULT.seeds]
        rows = [self.rows[cell] for cell in cells if cell in self.rows]
        return rows if len(rows) >= FEWEST_SEEDS else []


def choices() -> dict[str, Any]:
    """Ways to choose neurons: functions of the subject, the settings and the seed."""
    import width_peers
    from loops import scored_anew

    return {"scored anew": scored_anew, **width_peers.PEERS}


def measure(cell: Cell) -> Row:
    """Prune, recover and score one model; runs in a process of its own."""
    import torch
    from loops import TINY, run, work_quietly
    from recovery import CPT, correct_items, generate

    from ptl.config.schedule import Prune, Schedule

    work_quietly()
    arm = ARMS[cell.arm]
    phase = CHOICE if cell.phase == CHOICE.name else RESULT
    schedule = Schedule(
        target=cell.share, recovery_tokens=int(arm.tokens * cell.tokens), **arm.schedule
    )
    prune = Prune(width_multiple=1, **arm.prune)
    stage = CPT | {"learning_rate": cell.learning_rate, "save_steps": 10**9} | arm.stage
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        cut = choices()[arm.choice](TINY, prune, cell.seed)
        trained = run(TINY, schedule, prune, [stage], cell.seed, Path(folder), cut, arm.layers_last)
        seconds = time.process_time() - began
        solved = correct_items(
            trained.checkpoint, list(generate("test", phase.items, phase.problem_seed))
        )
        widths = widths_of(trained.checkpoint)
    return asdict(cell) | {
        "params": trained.params,
        "accuracy": sum(solved) / len(solved),
        "solved": f"{int(''.join(map(str, solved)), 2):0{math.ceil(phase.items / 4)}x}",
        "flops": trained.flops,
        "scoring_flops": trained.scoring_flops,
        "widths": widths,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


def widths_of(folder: Path) -> list[int]:
    """Hidden size, FFN width and KV heads of a checkpoint."""
    from ptl.model import checkpoint

    config = checkpoint.read_config(folder)
    return [config[name] for name in ("hidden_size", "intermediate_size", "num_key_value_heads")]


def workers(count: int) -> ProcessPoolExecutor:
    """New processes of one thread each."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def complete(studies: Sequence[Study], results: Results, seeds: int, processes: int) -> None:
    """Measure all that the studies lack; what the choice of one needs decides what is measured next."""
    with workers(processes) as pool:
        while True:
            missing = [cell for study in studies for cell in results.missing(study, seeds)]
            if not missing:
                return
            print(f"{len(missing)} cells to measure, as far as is known now", flush=True)
            for done in as_completed([pool.submit(measure, cell) for cell in missing]):
                row = done.result()
                results.add(row)
                print(
                    ", ".join(f"{row[name]}" for name in (*Cell.__dataclass_fields__, "accuracy")),
                    flush=True,
                )


def one_cell(results: Results, processes: int) -> None:
    """One seed of the results of both arms at the size of the README's claim, measured again and compared."""
    cells = []
    for arm in CLAIM.arms:
        study = Study(arm, CLAIM.share, CLAIM.tokens)
        rate = results.best_rate(study)
        assert rate is not None
        cells.append(study.cell(RESULT, rate, RESULT.seeds[0]))
    with workers(processes) as pool:
        measured = list(pool.map(measure, cells))
    print(
        f"{CLAIM.share:.0%} of the parameters removed, {CLAIM.tokens:,} recovery tokens, {RESULT.items:,} new problems:"
    )
    for cell, row in zip(cells, measured, strict=True):
        recorded = results.rows[cell]["accuracy"]
        print(
            f"  {cell.arm}: {row['accuracy']:.1%} in {row['seconds']:.0f} s (recorded: {recorded:.1%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "cell"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[500_000])
    parser.add_argument(
        "--seeds", type=int, default=FEWEST_SEEDS, help="how many, of the results (at most 10)"
    )
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    results = Results(RESULTS)
    if given.what == "cell":
        one_cell(results, given.processes)
    else:
        studies = [
            Study(arm, share, tokens)
            for tokens in given.tokens
            for share in given.shares
            for arm in given.arms
        ]
        complete(studies, results, given.seeds, given.processes)


if __name__ == "__main__":
    main()
