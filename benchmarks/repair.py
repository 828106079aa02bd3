"""Held-out loss right after a cut, with and without the closed-form repair, on the tiny reasoner or another checkpoint.

    python benchmarks/repair.py [CHECKPOINT] [--shares 0.2 0.4] [--seeds 0 1 2] [--sequences 128]

Each seed draws its own calibration sequences; the held-out ones are never scored on. Loss is that of the answer's
tokens. The interval is the 95 % one of the mean difference from `off`, paired, over held-out sequences (each one's
difference is its mean over the seeds, since seeds see the same sequences); each seed's own mean stands beside it.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from ptl.config.recover import DataSource
from ptl.config.run import Calibration
from ptl.config.schedule import Prune
from ptl.data.sequences import order, padded, tokenize
from ptl.data.sources import SourceRow, read_rows
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.prune import prune_checkpoint
from ptl.pruning.variant_losses import PrunedVariant, losses

KINDS = ("off", "ridge")


def held_out(data, tokenizer, count):
    """Sequences from the end of a permutation whose beginning is not used for calibration by any seed here."""
    rows = read_rows(data)
    picked = [i for i, _ in zip(order(len(rows), 10_000), range(count), strict=False)]
    return padded([tokenize(SourceRow(rows[i], data, i), tokenizer, 256) for i in picked], 16)


def main():
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path("examples/tiny_reasoner/checkpoint"))
    parser.add_argument("--calibration", default="examples/tiny_reasoner/train.jsonl.gz")
    parser.add_argument("--held-out", default="examples/tiny_reasoner/test.jsonl")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--ridge", type=float, default=0.1)
    args = parser.parse_args()
    template = {"prompt": "{question}\n", "completion": "{answer}"}
    data = DataSource(source=args.calibration, **template)
    family = family_of(checkpoint.read_config(args.checkpoint))
    body = model_dimensions(args.checkpoint, family)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    test = held_out(DataSource(source=args.held_out, **template), tokenizer, args.sequences)
    print("share  repair     loss   difference from off (95 % interval)   by seed")
    for share in args.shares:
        goal = int(body.params * (1 - share))
        by_seed = {kind: [] for kind in KINDS}
        for seed in args.seeds:
            for kind in KINDS:
                settings = Prune(criterion="max", repair=kind, width_multiple=1, ridge=args.ridge)
                calibration = Calibration(data=data, num_sequences=args.sequences, max_length=256)
                with tempfile.TemporaryDirectory() as folder:
                    pruned = Path(folder)
                    prune_checkpoint(
                        args.checkpoint, pruned, settings, calibration, unit="neurons", goal=goal, seed=seed
                    )
                    model = LayerwiseModel(pruned, family, test)
                    by_seed[kind].append(losses(model, [PrunedVariant()])[0])
        off = torch.stack(by_seed["off"])  # [seeds, sequences]
        for kind in KINDS:
            values = torch.stack(by_seed[kind])
            change = (values - off).mean(dim=0)
            half = 1.96 * float(change.std()) / len(change) ** 0.5
            changes = " ".join(f"{float(mean):+.3f}" for mean in (values - off).mean(dim=1))
            loss, shift = float(values.mean()), float(change.mean())
            print(f"{share:5.2f}  {kind:9} {loss:6.3f}   {shift:+.3f} +- {half:.3f}   {changes}", flush=True)


if __name__ == "__main__":
    main()
