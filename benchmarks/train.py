"""Speed of the recover step against a bare torch loop over the same batches on the same model.

    OMP_NUM_THREADS=1 python benchmarks/train.py [--shapes 0.5M 10M 135M] [--steps 60] [--repeats 3]

Both train in float32 (bf16 autocast with --bf16 on a GPU) on right-padded batches with the loss on the answer, AdamW
and a constant rate. They take turns, and the median of each is reported: tokens (padding not counted) per second of
the training loop, first steps left out. On a GPU with --peak (FLOP/s) also the model FLOPs utilization.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptl.config.data import TrainingData
from ptl.config.recover import RecoverStage
from ptl.model import checkpoint, dimensions
from ptl.recovery import sft
from ptl.recovery.job import RecoveryJob, StageBudget
from ptl.recovery.recover import RECOVERIES

ROOT = Path(__file__).parents[1]
REASONER = ROOT / "examples/tiny_reasoner/checkpoint"
DATA = TrainingData(
    sources=[
        {
            "source": str(ROOT / "examples/tiny_reasoner/train.jsonl.gz"),
            "prompt": "{question}\n",
            "completion": "{answer}",
        }
    ]
)
SHAPES = {  # hidden, intermediate, layers, heads, KV heads, vocabulary
    "0.5M": (96, 288, 4, 4, 2, 512),
    "10M": (320, 1024, 8, 8, 4, 512),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
}
WARMUP = 10  # first optimizer steps, which do not count


def make(shape: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> int:
    """A random model of a shape with the tiny reasoner's tokenizer; returns its parameters."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=json.loads((REASONER / "config.json").read_text())["eos_token_id"],
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    checkpoint.copy_companions(REASONER, folder)
    return dimensions.static_cost(folder).params


def product(src: Path, settings: RecoverStage, job: RecoveryJob, warmup: int = WARMUP) -> float:
    """Tokens per second of the recover step's own training, without its first steps."""
    marks: list[tuple[float, float]] = []

    def on_log(metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics and step >= warmup:
            marks.append((time.perf_counter(), metrics["num_input_tokens_seen"]))

    with tempfile.TemporaryDirectory() as scratch:
        here = RecoveryJob(job.data, job.budget, Path(scratch) / "training", on_log)
        dst = Path(scratch) / "out"
        dst.mkdir()
        RECOVERIES["cpt"](src, dst, settings, here)
    (began, first), (ended, last) = marks[0], marks[-1]
    return (last - first) / (ended - began)


def bare(src: Path, settings: RecoverStage, job: RecoveryJob, warmup: int = WARMUP) -> float:
    """The same batches through a loop of a dozen lines."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(src, dtype=torch.float32).to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(src)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = sft.sft_arguments(
            settings, RecoveryJob(job.data, job.budget, Path(scratch), job.on_log)
        )
        dataset, _ = sft.training_dataset(tokenizer, settings, job, arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    seen, began = 0, 0.0
    for step, begin in enumerate(range(0, len(dataset), settings.batch_size)):
        if step == warmup:
            _wait()
            seen, began = 0, time.perf_counter()
        rows = dataset[begin : begin + settings.batch_size]
        width = max(map(len, rows["input_ids"]))
        pads = [width - len(ids) for ids in rows["input_ids"]]
        given = {
            "input_ids": [
                ids + [0] * pad for ids, pad in zip(rows["input_ids"], pads, strict=True)
            ],
            "attention_mask": [[1] * (width - pad) + [0] * pad for pad in pads],
            "labels": [
                labels + [-100] * pad for labels, pad in zip(rows["labels"], pads, strict=True)
            ],
        }
        batch = {name: torch.tensor(values).to(device) for name, values in given.items()}
        with torch.autocast(device, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as the Trainer does
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seen += sum(map(len, rows["input_ids"]))
    _wait()
    return seen / (time.perf_counter() - began)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["0.5M", "10M", "135M"], choices=SHAPES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--peak", type=float, help="the GPU's dense FLOP/s, for the utilization")
    given = parser.parse_args()
    for shape in given.shapes:
        with tempfile.TemporaryDirectory() as folder:
            params = make(shape, Path(folder))
            tokens = given.steps * given.batch_size * 90  # a problem has about 90 tokens
            settings = RecoverStage(
                batch_size=given.batch_size,
                max_length=256,
                save_steps=10**9,
                processes=1,
                dtype="bfloat16" if given.bf16 else "float32",
            )
            job = RecoveryJob(
                DATA,
                StageBudget(tokens, (), 1, False, 0),
                Path(folder) / "t",
                lambda metrics, step: None,
            )
            rates: dict[str, list[float]] = {"product": [], "bare": []}
            for _ in range(given.repeats):
                rates["product"].append(product(Path(folder), settings, job))
                rates["bare"].append(bare(Path(folder), settings, job))
        ours, theirs = (statistics.median(values) for values in (rates["product"], rates["bare"]))
        row = {
            "shape": shape,
            "params": params,
            "tokens_per_s": round(ours),
            "bare_tokens_per_s": round(theirs),
        }
        row["share"] = round(ours / theirs, 3)
        if given.peak:
            row["mfu"] = round(6 * params * ours / given.peak, 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
