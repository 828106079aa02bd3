"""What orchestration costs: the share of a finished run's wall time outside prune, recover and evaluate work.

    make demo && make bench

Three parts. *Work* is what scoring, cutting, training and measuring took. *Start-up of steps* is what the same steps
needed besides, most of it importing torch, transformers and trl in a fresh process. *The rest* is Python's own start,
KFP's executor, MLflow, publishing and verifying checkpoints, import-model and the report.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path(".ptl/latest"), help="a run directory"
    )
    folder = parser.parse_args().run
    if not (folder / "timing.json").is_file():
        raise SystemExit(f"{folder} holds no finished run: `make demo` first")
    result, timing = (
        json.loads((folder / name).read_text()) for name in ("result.json", "timing.json")
    )
    if timing["continued"]:
        raise SystemExit(
            f"{folder} was continued after a failure, so its wall time says nothing: run `make demo` again"
        )
    steps = [step for step in result["steps"] if step["stage"] in ("prune", "recover", "evaluate")]
    work = {
        stage: sum(s["seconds"] for s in steps if s["stage"] == stage)
        for stage in ("prune", "recover", "evaluate")
    }
    startup = sum(step["whole_seconds"] for step in steps) - sum(work.values())
    rest = timing["seconds"] - sum(work.values()) - startup
    print(f"run {result['run_id']}: {len(steps)} steps of work in {timing['seconds']:.0f} s\n")
    print("| part | seconds | share |\n|---|---|---|")
    for name, seconds in [*work.items(), ("start-up of these steps", startup), ("the rest", rest)]:
        print(f"| {name} | {seconds:.1f} | {seconds / timing['seconds']:.0%} |")
    print(
        f"\noutside work: {(startup + rest) / timing['seconds']:.0%}; without the libraries' imports: ",
        end="",
    )
    print(f"{rest / timing['seconds']:.0%}")


if __name__ == "__main__":
    main()
