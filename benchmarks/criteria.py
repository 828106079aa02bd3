"""Criteria against each other and against torch-pruning, on the tiny reasoner: one cut, equal tokens, equal recovery.

    pip install --no-deps torch-pruning
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/criteria.py [--shares 0.3 0.4 0.5] [--seeds 11 12 13]

Every row cuts the FFN of the dense reasoner to the same width in one step and trains it with our recover step (cpt) on
the same tokens; the seed draws calibration sequences and training order. torch-pruning scores and cuts with its own
importance (group magnitude, and group Taylor on the gradients of the same calibration batches) and its own surgery.
Rows of layers end with the size that they reach: the table says how much was removed. Accuracy is greedy exact match
on generated problems that no shipped file holds, before and after recovery.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from loops import TINY, Cut, Subject
from recovery import CPT, correct, generate
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from ptl.config.recover import Recovery
from ptl.config.schedule import Prune, Unit
from ptl.data.sequences import calibration_batches
from ptl.evaluation import paired
from ptl.model import checkpoint
from ptl.model.dimensions import ModelDimensions, model_dimensions, width_for
from ptl.model.families import family_of
from ptl.pruning.prune import prune_checkpoint
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.recover import recover_checkpoint

MAX = {"criterion": "max"}
# Each row's settings: of `prune`, and of `calibration` where it says so.
OURS: dict[str, dict[str, Any]] = {
    "max": MAX,
    "mean": {"criterion": "mean"},
    "weight": {"criterion": "weight"},
    "taylor": {"criterion": "taylor"},
    "random": {"criterion": "random"},
    "layers, max": {"unit": "layers"},
}
THEIRS = ("torch-pruning magnitude", "torch-pruning taylor")


def cut_ours(dst: Path, kind: str, body: ModelDimensions, width: int, seed: int) -> None:
    chosen = dict(OURS[kind])
    unit = chosen.pop("unit", "neurons")
    settings = Prune(**chosen, width_multiple=1)
    goal = body.params - (body.width - width) * body.params_per_neuron
    prune_checkpoint(TINY.model, dst, settings, TINY.calibration, unit=unit, goal=goal, end=goal, seed=seed)


def cut_theirs(dst: Path, kind: str, body: ModelDimensions, width: int, seed: int) -> None:
    """The same cut by torch-pruning's dependency graph, importance and surgery."""
    import torch_pruning as tp

    model = AutoModelForCausalLM.from_pretrained(TINY.model).eval()
    model.config.use_cache = False
    batches = calibration_batches(TINY.calibration, AutoTokenizer.from_pretrained(TINY.model), seed)
    if kind.endswith("taylor"):
        for batch in batches:
            model(**batch).loss.backward()
    importance = tp.importance.GroupTaylorImportance if kind.endswith("taylor") else None
    gates = [layer.mlp.gate_proj for layer in model.model.layers]
    outer = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)]
    inner = {id(module) for layer in model.model.layers for module in (layer.mlp.gate_proj, layer.mlp.up_proj)}
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=batches[0]["input_ids"][:1],
        importance=(importance or tp.importance.GroupMagnitudeImportance)(),
        pruning_ratio=1 - (width + 0.5) / body.width,  # it rounds the rest down
        ignored_layers=[module for module in outer if id(module) not in inner],
        forward_fn=lambda it, ids: it(input_ids=ids, use_cache=False).logits,
    )
    pruner.step()
    assert {gate_proj.out_features for gate_proj in gates} == {width}
    model.config.intermediate_size = width
    model.config.use_cache = True
    model.save_pretrained(dst)
    checkpoint.copy_companions(TINY.model, dst)


def by_torch_pruning(kind: str, subject: Subject, prune: Prune, seed: int) -> Cut:
    """One cut of the dense model, as `loops.run` asks for it; of the settings only the width multiple matters."""

    def cut(src: Path, dst: Path, _unit: Unit, goal: int, _end: int) -> int:
        assert src == subject.model
        body = model_dimensions(src, family_of(checkpoint.read_config(src)))
        cut_theirs(dst, kind, body, width_for(body, goal, prune.width_multiple), seed)
        return 0  # theirs is not counted

    return cut


def recovered(cut: Path, out: Path, tokens: int, seed: int) -> Path:
    job = RecoveryJob(TINY.data, StageBudget(tokens, (), 1, True, seed), out / "training", lambda metrics, step: None)
    (out / "model").mkdir(parents=True)
    recover_checkpoint(cut, out / "model", Recovery(stages=[CPT]), [tokens], job)
    return out / "model"


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    body = model_dimensions(TINY.model, family_of(checkpoint.read_config(TINY.model)))
    asked = list(generate("test", given.items, given.problem_seed))
    for share in given.shares:
        width = width_for(body, int(body.params * (1 - share)), 1)
        for kind in given.criteria:
            for seed in given.seeds:
                with tempfile.TemporaryDirectory() as scratch:
                    cut = Path(scratch, "cut")
                    cut.mkdir()
                    (cut_ours if kind in OURS else cut_theirs)(cut, kind, body, width, seed)
                    removed = 1 - model_dimensions(cut, family_of(checkpoint.read_config(cut))).params / body.params
                    before = correct(cut, asked) / len(asked)
                    solved = correct(recovered(cut, Path(scratch, "out"), given.tokens, seed), asked)
                low, high = paired.wilson(solved, len(asked), 0.95)
                row = {"share": share, "criterion": kind, "seed": seed, "before": round(before, 3)}
                row |= {"removed": round(removed, 3)}
                yield row | {"accuracy": solved / len(asked), "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--criteria", nargs="+", choices=[*OURS, *THEIRS], default=[*OURS, *THEIRS])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.4, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--problem-seed", type=int, default=4711, help="of the generated problems")
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for row in rows(given):
        print(json.dumps(row), flush=True)
        found.append(row)
    print("\n| criterion | " + " | ".join(f"-{share:.0%}" for share in given.shares) + " |")
    print("|---|" + "---|" * len(given.shares))
    for kind in given.criteria:
        cells = []
        for share in given.shares:
            mine = [row for row in found if row["criterion"] == kind and row["share"] == share]
            mean = sum(row["accuracy"] for row in mine) / len(mine)
            each = ", ".join(f"{row['accuracy']:.3f}" for row in mine)
            before = ", ".join(f"{row['before']:.2f}" for row in mine)
            removed = ", ".join(f"{row['removed']:.1%}" for row in mine)
            cells.append(f"**{mean:.3f}** ({each}; before {before}; removed {removed})")
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
