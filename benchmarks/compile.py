"""Seconds of `ptl compile` and size of its YAML, for every shipped config: one JSON line each.

    taskset -c 0 .venv/bin/python benchmarks/compile.py [--repeats 5]

`seconds` is the median of whole commands, with Python's start and all imports, `lowest` and `highest` beside it;
`cpu_seconds` is the median of their processor time, which a busy machine changes less.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "pipelines/prune_tune_loop/configs").glob("*.yaml"))


def main() -> None:
    """Compile each config several times and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        for config in CONFIGS:
            target = Path(folder) / config.name
            runs = [_compile(config, target) for _ in range(repeats)]
            print(json.dumps({"config": config.stem, **_summary(runs), **_sizes(target)}), flush=True)


def _compile(config: Path, target: Path) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    command = [sys.executable, "-m", "ptl", "compile", str(config), "-o", str(target)]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, used.ru_utime - before.ru_utime + used.ru_stime - before.ru_stime


def _summary(runs: list[tuple[float, float]]) -> dict[str, float]:
    seconds, cpu = zip(*runs, strict=True)
    values = {"seconds": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)}
    values["cpu_seconds"] = statistics.median(cpu)
    return {name: round(value, 2) for name, value in values.items()}


def _sizes(target: Path) -> dict[str, float]:
    spec = next(yaml.safe_load_all(target.read_text()))
    return {"tasks": len(spec["root"]["dag"]["tasks"]), "kilobytes": round(target.stat().st_size / 1024, 1)}


if __name__ == "__main__":
    main()
