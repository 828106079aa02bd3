"""Recovery, prune and evaluation of one random model on this machine's GPU, beside what one would write without ptl.

    python benchmarks/gpu.py --gpu h100                                   # a 1B model, on a GPU
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --shape 0.5M --steps 60 --length 256 --items 200    # on a CPU

- Recovery: tokens per second and model FLOPs utilization (MFU) of the recover step (cpt) and of a bare torch loop with
  the same model, batches, AdamW and precision (float32 weights, on a GPU bf16 autocast), in turns: see train.py.
- Prune: seconds and peak memory of one neuron iteration.
- Evaluation: generated answers per second of the evaluate step's backends (vllm where it is installed) and of plain
  lm-evaluation-harness (HFLM), the same items and batch size; loading the model does not count.

MFU is the model's FLOPs per second (6 per weight of the linear layers and token, and attention's; recomputed
activations do not count) over the peak that the data sheet of --gpu says (ptl/preflight/forecast_model.py).
Every part has a process of its own, so that its peak memory is its own. Prints a Markdown table; --out has everything
as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import ptl
from ptl.preflight import forecast_model
from ptl.preflight.forecast_model import GPUS, TERA

sys.path.insert(0, str(Path(__file__).parent))  # a script's folder is on the path, a test's is not
import prune_scale
import train
from transfer import peak_mib

ROOT = Path(__file__).parents[1]
TASK = "examples/tiny_reasoner/tiny_reasoner.yaml"
ROWS = 64  # of text, each longer than --length; drawn again and again


def recovery(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, MFU and peak GPU memory of the recover step and the bare loop: the median of the repeats."""
    from ptl.config.data import TrainingData
    from ptl.config.recover import RecoverStage
    from ptl.recovery.job import RecoveryJob, StageBudget

    settings = RecoverStage(
        batch_size=given.batch_size,
        max_length=given.length,
        loss="all",
        save_steps=10**9,
        processes=1,
        dtype=given.dtype,
    )
    data = TrainingData(sources=[{"source": str(text(model, given)), "format": "text"}])
    this = StageBudget(given.steps * given.batch_size * given.length, (), 1, False, given.seed)
    job = RecoveryJob(data, this, model / "training", lambda metrics, step: None)
    rates: dict[str, list[float]] = {"ptl": [], "bare": []}
    memory: dict[str, float] = {}
    for _ in range(given.repeats):
        for name, loop in (("ptl", train.product), ("bare", train.bare)):
            gpu_peak()  # of the loop before: its model is released
            rates[name].append(loop(model, settings, job, given.warmup))
            memory[name] = max(memory.get(name, 0.0), gpu_peak())
    shape = forecast_model.shape_of(str(model))
    # of a token, with backward
    flops = 3 * forecast_model.forward_flops(shape, shape.dimensions, 1, given.length)
    card = GPUS.get(given.gpu)
    peak = TERA * (card.bf16 if given.dtype == "bfloat16" else card.fp32) if card else None
    found = {}
    for name, values in rates.items():
        rate = statistics.median(values)
        found[name] = {
            "tokens_per_s": rate,
            "mfu": rate * flops / peak if peak else None,
            "gpu_gib": memory[name],
        }
    return found | {"flops_per_token": flops, "peak_flops": peak}


def prune(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of removing a tenth of the parameters."""
    from ptl.config.data import DataSource
    from ptl.config.run import Calibration
    from ptl.config.schedule import Prune
    from ptl.model import dimensions
    from ptl.pruning.prune import prune_checkpoint

    calibration = Calibration(
        data=DataSource(source=str(text(model, given)), format="text"),
        num_sequences=given.sequences,
        max_length=given.length,
        batch_size=given.batch_size,
    )
    goal = int(0.9 * dimensions.static_cost(model).params)
    with tempfile.TemporaryDirectory(dir=model) as dst:
        report = prune_checkpoint(
            model,
            Path(dst),
            Prune(criterion="max"),
            calibration,
            unit="neurons",
            goal=goal,
            end=goal,
            seed=given.seed,
        )
    found = {"seconds": report.seconds, "params": report.params, "sequences": report.sequences}
    return found | {"host_gib": peak_mib() / 1024, "gpu_gib": gpu_peak()}


def answers(model: Path, given: argparse.Namespace, backend: str) -> dict[str, Any]:
    """Items per second of a backend of ptl's, or of plain lm-evaluation-harness."""
    from lm_eval.evaluator import evaluate as plain_evaluate

    from ptl.config.run import Evaluate, Speed, Task
    from ptl.evaluation import language_models, scoring, tasks
    from ptl.evaluation.scoring import score_task

    task = Task(name=TASK, limit=given.items, max_new_tokens=given.new_tokens)
    settings = Evaluate(
        tasks=[task],
        batch_size=given.eval_batch_size,
        backend="vllm" if backend == "vllm" else "hf",
        speed=Speed(repeats=0),
    )
    if backend == "plain":
        from lm_eval.models.huggingface import HFLM

        kind = "cuda" if torch.cuda.is_available() else "cpu"
        lm = HFLM(
            pretrained=str(model), device=kind, dtype="auto", batch_size=given.eval_batch_size
        )
        (spec,) = tasks.find(task.name)

        def work() -> None:
            loaded = {spec.name: scoring.load_task(spec, task, settings, given.seed)}
            plain_evaluate(lm=lm, task_dict={"tasks": loaded}, limit=task.limit, bootstrap_iters=0)
    else:
        lm = language_models.language_model(model, settings, seed=given.seed)

        def work() -> None:
            score_task(lm, task, settings, seed=given.seed)

    seconds = []
    for _ in range(given.repeats + 1):  # the first one warms up
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])
    return {"items_per_s": given.items / median, "seconds": median, "gpu_gib": gpu_peak()}


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "recovery": recovery,
    "prune": prune,
    "evaluate-plain": lambda model, given: answers(model, given, "plain"),
    "evaluate-hf": lambda model, given: answers(model, given, "hf"),
    "evaluate-vllm": lambda model, given: answers(model, given, "vllm"),
}


def possible() -> list[str]:
    """The parts that can run here: vLLM needs its package and a GPU."""
    vllm = torch.cuda.is_available() and find_spec("vllm") is not None
    return [part for part in PARTS if vllm or part != "evaluate-vllm"]


def text(model: Path, given: argparse.Namespace) -> Path:
    """Rows that fill --length tokens, so that no batch is padded; made once."""
    path = model / "rows.jsonl"
    if not path.is_file():
        prune_scale.text(path, ROWS, given.length)
    return path


def gpu_peak() -> float:
    """GiB of GPU memory at its peak since the last call; 0 without a GPU. vLLM's own process is not seen."""
    gc.collect()  # a trainer refers to itself
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def device() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "ptl": ptl.__version__}
    for name in ("torch", "transformers", "trl", "lm-eval", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(found: dict[str, Any]) -> str:
    """The Markdown table of what was measured."""
    rows = [("measure", "ptl", "beside it", "ratio"), ("---", "---:", "---:", "---:")]

    def row(
        measure: str, ours: float, other: float | None = None, name: str = "", digits: int = 0
    ) -> None:
        beside = "-" if other is None else f"{name} {other:,.{digits}f}"
        rows.append(
            (measure, f"{ours:,.{digits}f}", beside, f"{ours / other:.3f}" if other else "-")
        )

    results = found["results"]
    if "ptl" in results.get("recovery", {}):
        ours, bare = results["recovery"]["ptl"], results["recovery"]["bare"]
        row("recovery, tokens/s", ours["tokens_per_s"], bare["tokens_per_s"], "bare loop")
        if ours["mfu"] is not None:
            row("recovery, MFU in %", 100 * ours["mfu"], 100 * bare["mfu"], "bare loop", 1)
        if ours["gpu_gib"]:
            row(
                "recovery, peak GPU memory in GiB", ours["gpu_gib"], bare["gpu_gib"], "bare loop", 1
            )
    if "seconds" in results.get("prune", {}):
        row("prune, seconds", results["prune"]["seconds"], digits=1)
        row("prune, peak host memory in GiB", results["prune"]["host_gib"], digits=2)
        if results["prune"]["gpu_gib"]:
            row("prune, peak GPU memory in GiB", results["prune"]["gpu_gib"], digits=2)
    plain = results.get("evaluate-plain", {}).get("items_per_s")
    for backend in ("hf", "vllm"):
        if "items_per_s" in results.get(f"evaluate-{backend}", {}):
            ours = results[f"evaluate-{backend}"]["items_per_s"]
            row(f"evaluation by {backend}, answers/s", ours, plain, "plain lm-eval", 1)
    failed = [
        f"{part} failed: {result['error']}" for part, result in results.items() if "error" in result
    ]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in rows] + failed)


def in_a_process(part: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """One part in a process of its own; its error is a result, since the other parts' numbers count all the same."""
    command = [sys.executable, __file__, *arguments, "--measure", part, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return (
        {"error": f"exit code {done.returncode}"}
        if done.returncode
        else dict(json.loads(done.stdout.splitlines()[-1]))
    )


def measured(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """One part in this process."""
    try:
        return PARTS[part](given.folder, given)
    # whatever it is (no memory, a library's): it is reported beside the other parts
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def arguments() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1B" if gpu else "0.5M", choices=train.SHAPES)
    parser.add_argument("--parts", nargs="+", default=possible(), choices=PARTS)
    parser.add_argument(
        "--dtype", default="bfloat16" if gpu else "float32", choices=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a training or calibration sequence"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences of a training step or a scoring pass"
    )
    parser.add_argument("--steps", type=int, default=40, help="of training, the warm-up among them")
    parser.add_argument("--warmup", type=int, default=10, help="first steps that do not count")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    parser.add_argument("--items", type=int, default=500, help="problems to answer, at most 1,000")
    parser.add_argument("--new-tokens", type=int, default=60, help="longest answer")
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--gpu", choices=GPUS, help="the card that this is, whose peak the MFU is of"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    # with several the Trainer would spread its batch
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    parser = arguments()
    given = parser.parse_args()
    if given.steps < 2 * given.warmup:
        parser.error(f"--steps {given.steps} must be at least twice --warmup {given.warmup}")
    os.chdir(ROOT)  # the task's and the text's paths are those of the checkout
    if given.measure:
        print(json.dumps(measured(given.measure, given)))
        return
    out = given.out and given.out.absolute()
    with tempfile.TemporaryDirectory(prefix="ptl-gpu-") as scratch:
        folder = Path(scratch)
        params = train.make(given.shape, folder, getattr(torch, given.dtype), given.seed)
        print(f"{given.shape}: {params:,} parameters in {given.dtype} on {device()}", flush=True)
        results = {part: in_a_process(part, folder, sys.argv[1:]) for part in given.parts}
    settings = {
        name: value
        for name, value in vars(given).items()
        if name not in ("out", "measure", "folder")
    }
    found = {
        "device": device(),
        "params": params,
        "seed": given.seed,
        "versions": versions(),
        "settings": settings,
    }
    found["results"] = results
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    sys.exit(any("error" in result for result in results.values()))


if __name__ == "__main__":
    main()
