"""What a general text beside that of the benchmark is worth, in the scores and in the recovery, on SmolLM2-135M.

    python benchmarks/guard.py joins --data DATA     # ways to join the scores of both texts; nothing is trained
    python benchmarks/guard.py mixes --data DATA     # shares of the general text in the recovery
    python benchmarks/guard.py table

Model and DATA are those of benchmarks/smollm2.py. The general text is what ships, 48 pieces of English prose; the
perplexities are of three held-out texts: solutions of GSM8K, other prose (ptl/evaluation/retention.jsonl) and Python's
language reference. Each model is a line of benchmarks/results/guard.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import smollm2
import torch
from loops import ROOT, json_rows, run, study, work_quietly
from torch import Tensor
from transformers import AutoTokenizer

from ptl.config.data import DataSource, TrainingData
from ptl.config.run import Calibration
from ptl.config.schedule import Prune, Schedule
from ptl.data.sequences import calibration_batches
from ptl.data.sources import GENERAL
from ptl.evaluation.retention import PROSE
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions, width_for
from ptl.model.families import family_of
from ptl.pruning.importance import neuron_scores
from ptl.pruning.layerwise import LayerwiseModel, UnitScores
from ptl.pruning.prune import select_units
from ptl.pruning.surgery import write_pruned

RESULTS = ROOT / "benchmarks" / "results" / "guard.jsonl"
WORK = ROOT / ".ptl" / "guard"  # unfinished models
MULTIPLE, TEXTS = 32, 64
TEXT = DataSource(source=GENERAL, format="text")
ALONE = "GSM8K alone"
MIXES = (0.0, 0.1, 0.3)
# of the recovery; the share of general text in its scores
TOKENS, RATE, SCORED = 100_000, 3e-4, 0.3

Row = dict[str, Any]
# of a layer's scores by the benchmark's text and by the general one
Join = Callable[[Tensor, Tensor], Tensor]


def relative(scores: Tensor) -> Tensor:
    return scores / scores.mean()


def mixed(share: float) -> Join:
    """The mean over the sequences of both; ptl first scales the gradients of each text to the same mean size."""
    return lambda own, general: (1 - share) * own + share * general


JOINS: dict[str, Join] = {
    ALONE: mixed(0),
    **{f"mean, {share:.0%} general": mixed(share) for share in (0.1, 0.3, 0.5)},
    "maximum": lambda own, general: torch.maximum(relative(own), relative(general)),
}


@cache
def scores(data: Path, general: bool) -> list[Tensor]:
    """Of each layer, by one of the two texts."""
    settings = smollm2.subject(data).calibration
    if general:
        settings = settings.model_copy(update={"data": (TEXT,), "num_sequences": 48})
    model = smollm2.MODEL
    batches = calibration_batches(settings, AutoTokenizer.from_pretrained(model), 1)
    family = family_of(checkpoint.read_config(model))
    return neuron_scores(LayerwiseModel(model, family, batches), "taylor", 1)


def joins(data: Path, share: float) -> None:
    model = smollm2.MODEL
    family = family_of(checkpoint.read_config(model))
    dimensions = model_dimensions(model, family)
    width = width_for(dimensions, round(dimensions.params * (1 - share)), MULTIPLE)

    def measure(cell: Row) -> Row:
        join = JOINS[cell["scores"]]
        joined = [join(*both) for both in zip(scores(data, False), scores(data, True), strict=True)]
        selection = select_units(UnitScores(joined), dimensions, replace(dimensions, width=width))
        with tempfile.TemporaryDirectory() as folder:
            write_pruned(model, Path(folder), family, selection)
            return losses(Path(folder), data)

    study(
        RESULTS,
        [{"share": share, "scores": name, "mix": 0.0, "tokens": 0} for name in JOINS],
        measure,
    )


def mixes(data: Path, share: float) -> None:
    own = smollm2.subject(data)
    (source,) = own.data.sources

    def measure(cell: Row) -> Row:
        scored = 0.0 if cell["scores"] == ALONE else SCORED
        calibration = Calibration(
            data=beside(source, scored), num_sequences=64, max_length=smollm2.LENGTH
        )
        subject = replace(
            own, data=TrainingData(sources=beside(source, cell["mix"])), calibration=calibration
        )
        folder = WORK / f"{cell['share']}-{scored}-{cell['mix']}"
        schedule = Schedule(target=share, recovery_tokens=TOKENS, iterations=1)
        prune = Prune(target="neurons", width_multiple=MULTIPLE)
        trained = run(subject, schedule, prune, [smollm2.training_stage("cpt", RATE)], 1, folder)
        found = losses(trained.checkpoint, data)
        shutil.rmtree(folder)
        return found

    arms = [(ALONE, 0.0), *((f"mean, {SCORED:.0%} general", mix) for mix in MIXES)]
    study(
        RESULTS,
        [{"share": share, "scores": name, "mix": mix, "tokens": TOKENS} for name, mix in arms],
        measure,
    )


def beside(source: DataSource, share: float) -> list[DataSource]:
    """A source with so much general text."""
    if not share:
        return [source]
    return [
        source.model_copy(update={"weight": 1 - share}),
        TEXT.model_copy(update={"weight": share}),
    ]


def losses(folder: Path, data: Path) -> Row:
    """Of a model, on each of the three texts."""
    prose = [("", row["text"]) for row in json_rows(PROSE)]
    texts = {"gsm8k": smollm2.solutions(data), "prose": prose, "reference": smollm2.other_texts()}
    return {name: smollm2.text_losses(folder, pieces[:TEXTS]) for name, pieces in texts.items()}


def table(rows: Sequence[Row]) -> None:
    """Each model: perplexities, and their ratios to the one that had as many tokens and no general text."""
    print(
        "| removed | tokens | scores | general text in the recovery | GSM8K | other prose | Python's reference |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|")
    for row in rows:
        own = next(
            each
            for each in rows
            if (each["share"], each["tokens"]) == (row["share"], row["tokens"])
        )
        texts = [
            f"{smollm2.perplexity(row[name]):.3g}: {smollm2.ratio(row[name], own[name])}"
            for name in ("gsm8k", "prose", "reference")
        ]
        mix = f"{row['mix']:.0%}" if row["tokens"] else ""
        print(
            f"| {row['share']:.0%} | {row['tokens']:,} | {row['scores']} | {mix} | {' | '.join(texts)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["joins", "mixes", "table"])
    parser.add_argument(
        "--data", type=Path, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl"
    )
    parser.add_argument("--share", type=float, default=0.3, help="of all parameters, to remove")
    given = parser.parse_args()
    work_quietly()
    if given.what == "table":
        table(json_rows(RESULTS))
    else:
        {"joins": joins, "mixes": mixes}[given.what](given.data, given.share)


if __name__ == "__main__":
    main()
