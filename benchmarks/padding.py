"""Padding of a recovery's batches: positions that are computed for each token, and those of them that get logits.

The last column is what rows in the order in which they were drawn would need.

    python benchmarks/padding.py MODEL ANSWERS.jsonl # of the step `answers`

Batches of 8, 16 and 32 sequences, each in 1 to 8 forward passes (`accumulation`).
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ptl.config.chat import Chat
from ptl.config.data import TrainingData
from ptl.config.recover import RecoverStage
from ptl.data.sequences import IGNORED
from ptl.model.pretrained import load_tokenizer
from ptl.recovery import sft
from ptl.recovery.job import RecoveryJob, StageBudget

BATCHES, PASSES = (8, 16, 32), (1, 2, 4, 8)
TOKENS = 80_000


def computed(dataset: Any, size: int) -> tuple[float, float]:
    """Positions, and logits of a distillation, for each token, with so many sequences in a pass."""
    rows = list(zip(dataset["input_ids"], dataset["labels"], strict=True))
    positions = logits = 0
    for begin in range(0, len(rows), size):
        group = rows[begin : begin + size]
        longest = max(len(ids) for ids, _ in group)
        first = min(
            next(i for i, label in enumerate(labels) if label != IGNORED) for _, labels in group
        )
        positions += longest * len(group)
        logits += (longest - first + 1) * len(group)
    total = sum(len(ids) for ids, _ in rows)
    return positions / total, logits / total


def dataset_of(batch: int, passes: int, tokenizer: Any, job: RecoveryJob) -> Any:
    """The sequences of a distillation in the order in which they are trained on."""
    stage = RecoverStage(method="distil", batch_size=batch, accumulation=passes)
    one = SimpleNamespace(world_size=1, per_device_train_batch_size=batch // passes)
    return sft.training_dataset(tokenizer, stage, job, one)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("answers", type=Path)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    data = TrainingData(source=str(given.answers), format="messages", decontaminate="off")
    job = RecoveryJob(
        data, StageBudget(TOKENS, (), 1, True, 0), Path(), print, chat=Chat(enabled=True)
    )
    print(
        "| batch_size | accumulation | positions | logits | positions, rows as drawn |\n|---:|---:|---:|---:|---:|"
    )
    for batch in BATCHES:
        rows = {passes: dataset_of(batch, passes, tokenizer, job) for passes in PASSES}
        for passes, dataset in rows.items():
            shares = (*computed(dataset, batch // passes), computed(rows[1], batch // passes)[0])
            print(f"| {batch} | {passes} | {' | '.join(f'{share:.2f}' for share in shares)} |")


if __name__ == "__main__":
    main()
