"""Makes the one-line mistakes of tests/mutants.yaml, of which tests must find each; prints the survivors.

They are made in copies of the checkout, where pytest runs in forks of this process, which has the heavy libraries.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import compress
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest
import yaml
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    "boto3",
    "mlflow",
    "datasets",
    "hypothesis",
    "scipy.stats",
    "torch._dynamo",
    "transformers.generation",
)
forks = get_context("fork")


def copy_for_this_worker(folder: str) -> None:
    global checkout
    checkout = Path(mkdtemp(dir=folder))
    subprocess.run(
        f"git ls-files -z | xargs -0 cp --parents -t {checkout}", shell=True, cwd=ROOT, check=True
    )


def seconds_of(tests: str, limit: float = 1800) -> float | None:
    """How long pytest takes in the copy, with these arguments; None where a test fails, or the limit is passed."""
    started, process = time.monotonic(), forks.Process(target=run_pytest, args=(tests,))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return time.monotonic() - started if process.exitcode == 0 else None


def run_pytest(tests: str) -> None:
    os.setsid()
    os.chdir(checkout)
    # For the processes that tests start, and for this one, whose script is in the checkout itself.
    os.environ["PYTHONPATH"] = sys.path[0] = str(checkout)
    assert Path(import_module("ptl").__file__).is_relative_to(checkout)
    # messages shorten paths that begin with the checkout's
    folder = checkout.with_name(f"tests-{checkout.name}")
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}", "-m", "not nightly"]
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(int(pytest.main([*options, *shlex.split(tests)])))


def survives(mutant: dict[str, str], seconds: float) -> bool:
    """Whether the tests, which take so long without the mutant, pass with it."""
    path = checkout / mutant["file"]
    original = path.read_text()
    path.write_text(original.replace(mutant["old"], mutant["new"]))
    survived = seconds_of(mutant["tests"], limit=60 + 5 * seconds) is not None
    path.write_text(original)
    return survived


def main(only: str, jobs: int) -> int | str:
    mutants = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    if wrong := [
        each for each in mutants if (ROOT / each["file"]).read_text().count(each["old"]) != 1
    ]:
        return f"`old` does not occur exactly once in the file: {wrong}"
    mutants = [mutant for mutant in mutants if any(only in text for text in mutant.values())]
    list(map(import_module, LIBRARIES))
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(jobs, forks, copy_for_this_worker, [folder]) as pool,
    ):
        groups = list(dict.fromkeys(mutant["tests"] for mutant in mutants))
        seconds = dict(
            zip(
                groups,
                tqdm(pool.map(seconds_of, groups), "without mutants", len(groups)),
                strict=True,
            )
        )
        if None in seconds.values():
            return f"without any mutant these fail: {[tests for tests in groups if seconds[tests] is None]}"
        outcomes = pool.map(survives, mutants, [seconds[mutant["tests"]] for mutant in mutants])
        survivors = list(compress(mutants, list(tqdm(outcomes, "mutants", len(mutants)))))
    for each in survivors:
        print(
            "",
            each["file"],
            f"- {each['old'].strip()}",
            f"+ {each['new'].strip()}",
            each["tests"],
            sep="\n  ",
        )
    print(f"{len(survivors)} of {len(mutants)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants that have this text in a field")
    parser.add_argument("--jobs", type=int, default=2)
    sys.exit(main(**vars(parser.parse_args())))
