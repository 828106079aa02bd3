"""The same recovery in one process, in two processes, and on two machines of one process each: tokens, loss, weights.

    python benchmarks/machines.py

The tiny reasoner, 20,000 tokens, on this machine's CPU. `nodes x processes`: groups of processes that torch's c10d
rendezvous joins on loopback, or one launcher's processes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from loops import TINY, work_quietly

TOKENS = 20_000
CELLS = ((1, 1), (1, 2), (2, 1))  # nodes, processes of each


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from ptl.config.recover import Cpt, Recovery
    from ptl.model import checkpoint
    from ptl.recovery.job import RecoveryJob, StageBudget
    from ptl.recovery.machines import Machines
    from ptl.recovery.recover import recover_checkpoint
    from ptl.storage import store
    from ptl.storage.manifest import digest_of

    work_quietly()
    print("| nodes x processes | tokens | steps | last loss | digest | largest difference of a weight to 1 x 1 |")
    print("|---|---:|---:|---:|---|---:|")
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for nodes, processes in CELLS:
            out = Path(folder, f"{nodes}-{processes}")
            job = RecoveryJob(
                TINY.data,
                StageBudget(TOKENS, (), 1, True, 0),
                Path(folder, f"{out.name}.training"),
                lambda metrics, step: None,
                machines=Machines(nodes),
            )
            recovery = Recovery(stages=[Cpt(processes=processes, max_length=128)])
            report = recover_checkpoint(TINY.model, out, recovery, [TOKENS], job)
            digest = digest_of(store.publish(out, Path(folder, f"{out.name}.published").as_uri()))
            weights = {name: tensor for shard in checkpoint.shards(out) for name, tensor in checkpoint.tensors(shard)}
            reference = reference or weights
            difference = max(float((weights[name] - reference[name]).abs().max()) for name in weights)
            loss = report.curve[-1][1]
            print(
                f"| {nodes} x {processes} | {report.tokens:,} | {report.steps} | {loss:.6f} | "
                f"{digest.removeprefix('sha256:')[:12]} | {difference:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
