"""Which schedule a gate can follow: the tiny reasoner's loop with the gate on, equal tokens and target for each.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/gated_schedule.py [--seeds 0 1 2] [--only NAME ...]

Prune, recover, evaluate and the gate's verdict are ptl's own, in one process; every other setting is that of tiny.yaml.
The gate judges 500 of the shipped test problems. The accuracy of the final model is that of 500 generated problems that
no shipped file has and no verdict has seen, with Wilson's interval. One JSON line for each run, then a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from ptl.config.recover import Recovery
from ptl.config.run import Config, load_config
from ptl.config.schedule import plan, removal, token_weights
from ptl.evaluation import gate, paired
from ptl.evaluation.evaluate import evaluate_checkpoint, read_items
from ptl.model import checkpoint, dimensions
from ptl.model.dimensions import model_dimensions, smallest_cuts
from ptl.model.families import family_of
from ptl.pruning.prune import prune_checkpoint
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.recover import recover_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # a script's folder is on the path, a test's is not
from loops import ROOT
from loops import TINY as SUBJECT
from recovery import correct, generate

TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
# name -> cuts, tokens, decay of the learning rate
SCHEDULES = {
    "cubic cuts, doubling tokens, decay 0.5": ("cubic", "doubling", 0.5),
    "cubic cuts, doubling tokens, decay each": ("cubic", "doubling", "each"),
    "cubic cuts, uniform tokens, decay each": ("cubic", "uniform", "each"),
    "uniform cuts, uniform tokens, decay each": ("uniform", "uniform", "each"),
    "uniform cuts, doubling tokens, decay each": ("uniform", "doubling", "each"),
}


def configured(name: str, seed: int, given: argparse.Namespace) -> Config:
    """tiny.yaml with the gate on and a schedule."""
    cuts, tokens, decay = SCHEDULES[name]
    config = load_config(TINY)
    (stage,) = config.recover
    schedule = {"iterations": given.iterations, "target": given.target, "recovery_tokens": given.tokens}
    changed = config.model_dump() | {
        "seed": seed,
        "schedule": schedule | {"cuts": cuts, "tokens": tokens},
        "recover": [stage.model_dump() | {"decay": decay, "processes": 1, "learning_rate": given.learning_rate}],
        "gate": {"enabled": True, "margin": given.margin},
    }
    changed["prune"]["criterion"] = given.criterion
    changed["evaluate"]["tasks"][0]["limit"] = given.items
    return Config.model_validate(changed)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """The loop with its gate; returns the final checkpoint, the decisions and the tokens that were trained on."""
    accepted, state, used = SUBJECT.model, gate.State(), 0
    dense = dimensions.static_cost(SUBJECT.model).params
    iterations = plan(config.schedule, config.prune)
    items = {SUBJECT.model: scored(config, SUBJECT.model, folder / "scores-0")}
    decisions = []
    for it in iterations:
        if state.stopped:
            break
        pruned, candidate = folder / f"pruned-{it.index}", folder / f"recovered-{it.index}"
        pruned.mkdir()
        planned = dense - int(it.progress * removal(dense, config.schedule.target))
        goal = gate.goal(dimensions.static_cost(accepted).params, planned, state.dump())
        prune_checkpoint(
            accepted, pruned, config.prune, config.calibration, unit=it.unit, goal=goal, end=goal, seed=config.seed
        )
        here = StageBudget(it.tokens, (), it.index, it.last, config.seed, token_weights(config.schedule))
        job = RecoveryJob(config.training, here, folder / f"training-{it.index}", lambda metrics, step: None)
        budgets = [each.tokens for each in iterations[: it.index]]
        used += recover_checkpoint(pruned, candidate, Recovery(stages=config.recover), budgets, job).tokens
        before = scored(config, pruned, folder / f"scores-pruned-{it.index}")
        items[candidate] = scored(config, candidate, folder / f"scores-{it.index}")
        decision = decide(config, state, accepted, candidate, items)
        state = decision.state
        decisions.append(
            {
                "decision": decision.decision,
                "tokens": it.tokens,
                "params": dimensions.static_cost(candidate).params,
                "before_recovery": accuracy(before),
                "accuracy": accuracy(items[candidate]),
            }
        )
        said = f"{decision.decision}, {100 * accuracy(before):.1f} % before recovery, {decision.reason}"
        print(f"  {it.index}: {said}", file=sys.stderr, flush=True)
        accepted = candidate if decision.keep == "candidate" else accepted
    params = dimensions.static_cost(accepted).params
    removed = round(1 - params / dense, 3)
    return {"decisions": decisions, "tokens": used, "params": params, "removed": removed, "final": accepted}


def decide(
    config: Config, state: gate.State, accepted: Path, candidate: Path, items: Mapping[Path, list[dict[str, Any]]]
) -> gate.Decision:
    """The gate's decision on a candidate that was pruned from the last accepted checkpoint."""
    rule, dense = config.gate, dimensions.static_cost(SUBJECT.model).params
    baseline, parent = (
        paired.paired(paired.match(items[reference], items[candidate]), rule.margin, rule.alpha)
        for reference in (SUBJECT.model, accepted)
    )
    body = model_dimensions(accepted, family_of(checkpoint.read_config(accepted)))
    return gate.decide(
        rule,
        state,
        params=dimensions.static_cost(candidate).params,
        parent_params=dimensions.static_cost(accepted).params,
        target_params=dense - removal(dense, config.schedule.target),
        baseline=baseline,
        parent=parent,
        smallest_cut=smallest_cuts(body, config.prune.width_multiple).get("neurons"),
    )


def scored(config: Config, folder: Path, out: Path) -> list[dict[str, Any]]:
    """The items of the gate's benchmark, as a checkpoint answers them."""
    evaluate_checkpoint(folder, out, config.evaluate, seed=config.seed)
    return read_items(out)


def accuracy(items: list[dict[str, Any]]) -> float:
    return sum(item["correct"] for item in items) / len(items)


def marks(decisions: list[dict[str, Any]]) -> str:
    """One letter for each iteration: accepted or rejected; none once the loop had stopped."""
    return "".join("A" if each["decision"] == "accepted" else "R" for each in decisions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--target", type=float, default=0.4)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--criterion", default="max", help="`random`: a model in which every cut does damage")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--margin", type=float, default=0.03)
    parser.add_argument("--items", type=int, default=500, help="problems, of the gate and of the final accuracy each")
    parser.add_argument("--problem-seed", type=int, default=4711, help="of the generated problems")
    parser.add_argument("--only", nargs="+", default=list(SCHEDULES), choices=SCHEDULES, metavar="NAME")
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.chdir(ROOT)  # the config's paths are those of the checkout
    problems = list(generate("test", given.items, given.problem_seed))
    rows = []
    for name in given.only:
        for seed in given.seeds:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                found = run(configured(name, seed, given), Path(folder))
                solved = correct(found.pop("final"), problems)
            low, high = paired.wilson(solved, len(problems))
            row = {"schedule": name, "seed": seed, **found, "accuracy": solved / len(problems)}
            row |= {"low": round(low, 3), "high": round(high, 3), "seconds": round(time.monotonic() - started, 1)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(
        "\n| schedule | seed | verdicts | tokens used | removed | accuracy (95 % interval) |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        interval = f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
        cells = (row["schedule"], row["seed"], marks(row["decisions"]), f"{row['tokens']:,}")
        print(f"| {' | '.join(map(str, cells))} | {100 * row['removed']:.1f} % | {interval} |")


if __name__ == "__main__":
    main()
