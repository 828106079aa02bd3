"""Wall time of our evaluate step against plain `lm_eval`: the same task, batch and model, fresh processes in turns.

Run: python benchmarks/evaluate_overhead.py [CHECKPOINT] [--task YAML] [--limit N] [--repeats N]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples/tiny_reasoner"
OURS = """
import sys
from pathlib import Path
from ptl.config.run import Evaluate, Speed, Task
from ptl.evaluation.evaluate import evaluate_checkpoint
task = Task(name=sys.argv[2], limit=int(sys.argv[3]))
settings = Evaluate(tasks=[task], batch_size=int(sys.argv[4]), speed=Speed(repeats=0))
print(evaluate_checkpoint(Path(sys.argv[1]), Path(sys.argv[5]), settings, seed=0).tasks[0].accuracy)
"""


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default=str(TINY / "checkpoint"))
    parser.add_argument("--task", default=str(TINY / "tiny_reasoner.yaml"))
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    shared = [
        "--tasks",
        args.task,
        "--limit",
        str(args.limit),
        "--batch_size",
        str(args.batch_size),
    ]
    plain, ours = [], []
    with tempfile.TemporaryDirectory() as out:
        for repeat in range(args.repeats):
            model = ["--model", "hf", "--model_args", f"pretrained={args.checkpoint}"]
            kept = ["--log_samples", "--output_path", f"{out}/{repeat}"]
            plain.append(timed([sys.executable, "-m", "lm_eval", "run", *model, *shared, *kept]))
            given = [
                args.checkpoint,
                args.task,
                str(args.limit),
                str(args.batch_size),
                f"{out}/ours{repeat}",
            ]
            ours.append(timed([sys.executable, "-c", OURS, *given]))
            print(f"plain lm_eval {plain[-1]:.1f} s, ours {ours[-1]:.1f} s", flush=True)
    print(f"median {statistics.median(plain):.1f} s and {statistics.median(ours):.1f} s: ", end="")
    print(f"{statistics.median(ours) / statistics.median(plain):.2f} x plain lm_eval")


if __name__ == "__main__":
    main()
