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

from ptl import checkpoint
from ptl.anatomy import model_dimensions
from ptl.config import Calibration, DataSource, Prune
from ptl.data import order, padded, read_rows, tokenize
from ptl.families import family_of
from ptl.measure import PrunedVariant, losses
from ptl.prune import prune_checkpoint
from ptl.stream import LayerwiseModel

MOVES = {"neurons": ("off", "ridge"), "layers": ("off", "magnitude")}


def held_out(data, tokenizer, count):
    """Sequences from the end of a permutation whose beginning is not used for calibration by any seed here."""
    rows = read_rows(data)
    picked = [i for i, _ in zip(order(len(rows), 10_000), range(count), strict=False)]
    return padded([tokenize(rows[i], data, tokenizer, 512, i) for i in picked], 16)


def main():
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path("examples/tiny_reasoner/checkpoint"))
    parser.add_argument("--calibration", default="examples/tiny_reasoner/train.jsonl.gz")
    parser.add_argument("--held-out", default="examples/tiny_reasoner/test.jsonl")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--moves", nargs="+", choices=MOVES, default=list(MOVES))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--ridge", type=float, default=0.1)
    args = parser.parse_args()
    template = {"prompt": "{question}\n", "completion": "{answer}"}
    data = DataSource(source=args.calibration, **template)
    family = family_of(checkpoint.read_config(args.checkpoint))
    body = model_dimensions(args.checkpoint, family)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    test = held_out(DataSource(source=args.held_out, **template), tokenizer, args.sequences)
    print("move     share  repair     loss   difference from off (95 % interval)   by seed")
    for unit, kinds in ((unit, MOVES[unit]) for unit in args.moves):
        for share in args.shares:
            found = {kind: [] for kind in kinds}
            for seed in args.seeds:
                for kind in kinds:
                    settings = Prune(repair=kind, width_multiple=1, ridge=args.ridge)
                    calibration = Calibration(data=data, num_sequences=args.sequences, max_length=512)
                    with tempfile.TemporaryDirectory() as folder:
                        goal = int(body.params * (1 - share))
                        prune_checkpoint(
                            args.checkpoint, Path(folder), settings, calibration, unit=unit, goal=goal, seed=seed
                        )
                        found[kind].append(losses(LayerwiseModel(Path(folder), family, test), [PrunedVariant()])[0])
            off = torch.stack(found["off"])  # [seeds, sequences]
            for kind in kinds:
                values = torch.stack(found[kind])
                change = (values - off).mean(dim=0)
                half = 1.96 * float(change.std()) / len(change) ** 0.5
                each = " ".join(f"{float(one):+.3f}" for one in (values - off).mean(dim=1))
                mean, shift = float(values.mean()), float(change.mean())
                print(f"{unit:8} {share:5.2f}  {kind:9} {mean:6.3f}   {shift:+.3f} +- {half:.3f}   {each}", flush=True)


if __name__ == "__main__":
    main()
