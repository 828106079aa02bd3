"""Wall time and peak memory of one neuron iteration on large random Llamas, beside cp, a forward pass and a full load.

    python benchmarks/prune_scale.py [--sizes 1.1B 3B] [--scratch DIR] [--rows 10] [--length 512]

Also by `taylor`: of neurons alone, and of neurons, hidden size and KV heads in the same sweeps.

Each measurement runs in a process of its own, so that its peak memory (VmHWM) is its own. The two sizes have the same
layers and embeddings and differ in depth alone: memory that does not grow with depth shows as the same peak.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from transfer import peak_mib

DEPTHS = {"0.2B": 2, "1.1B": 16, "3B": 46}
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
REMOVE = 512  # neurons per layer


def make(folder, depth):
    """A random checkpoint, written tensor by tensor in shards of at most about 2 GB."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from ptl.model import checkpoint, safetensors_io

    folder.mkdir(parents=True)
    config = AutoConfig.for_model("llama", **SHAPE, num_hidden_layers=depth, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = {
            name: tuple(p.shape)
            for name, p in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    torch.manual_seed(0)
    # each matrix repeats it: as good as fresh numbers for timing
    pool = (torch.randn(2**22) * 0.02).bfloat16()
    groups, weight_map = [[]], {}
    for name in shapes:
        if sum(torch.Size(shapes[other]).numel() for other in groups[-1]) > 1e9:
            groups.append([])
        groups[-1].append(name)
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        values = (fill(pool, shapes[name]) for name in names)
        safetensors_io.write_tensors(
            folder / file, [(name, "BF16", shapes[name]) for name in names], values
        )
        weight_map |= dict.fromkeys(names, file)
    checkpoint.write_index(
        folder, weight_map, 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path("examples/tiny_reasoner/checkpoint") / name, folder / name)


def fill(pool, shape):
    """A tensor of this shape: a norm's ones, or numbers of the pool."""
    import torch

    size = torch.Size(shape).numel()
    if len(shape) == 1:
        return torch.ones(shape).bfloat16()
    return pool.repeat(-(-size // len(pool)))[:size].view(shape)


def text(path, rows, length):
    """Calibration rows that are longer than `length` tokens of the tiny reasoner's tokenizer."""
    from ptl.config.data import DataSource
    from ptl.data.sources import read_rows

    words = [
        f"{row['question']} {row['answer']}"
        for row in read_rows(DataSource(source="examples/tiny_reasoner/train.jsonl.gz"))[
            : rows * length // 20
        ]
    ]
    each = len(words) // rows
    path.write_text(
        "".join(
            json.dumps({"text": " ".join(words[i * each : (i + 1) * each])}) + "\n"
            for i in range(rows)
        )
    )


def settings(args):
    from ptl.config.data import DataSource
    from ptl.config.run import Calibration

    return Calibration(
        data=DataSource(source=str(args.scratch / "rows.jsonl"), format="text"),
        num_sequences=args.rows,
        max_length=args.length,
        batch_size=2,
    )


def measure(args):
    """One measurement, in this process; prints wall and CPU seconds and peak memory in MB."""
    folder = args.scratch / args.size
    out = args.scratch / f"{args.size}-{args.measure}"
    began = time.monotonic()
    if args.measure == "cp":
        subprocess.run(["cp", "-r", folder, out], check=True)
    elif args.measure == "make":
        make(folder, DEPTHS[args.size])
    elif args.measure == "imports":
        import torch
        import transformers

        import ptl.pruning.prune  # noqa: F401

        assert torch and transformers
    else:
        work(args, folder, out)
    seconds = time.monotonic() - began
    shutil.rmtree(out, ignore_errors=True)
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    print(
        json.dumps(
            {
                "measure": args.measure,
                "size": args.size,
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu, 1),
                "peak_mb": round(peak_mib()),
            }
        )
    )


def work(args, folder, out):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptl.config.schedule import Prune
    from ptl.data.sequences import calibration_batches
    from ptl.model import checkpoint
    from ptl.model.dimensions import model_dimensions
    from ptl.model.families import family_of
    from ptl.pruning.prune import prune_checkpoint

    torch.set_num_threads(args.threads)
    body = model_dimensions(folder, family_of(checkpoint.read_config(folder)))
    if args.measure in ("ptl", "taylor", "width"):
        smaller = replace(body, width=body.width - REMOVE)
        prune = Prune(criterion="max" if args.measure == "ptl" else "taylor")
        if args.measure == "width":
            smaller = replace(smaller, hidden=1792, kv_heads=4)
            prune = Prune(target="width", width={"hidden": 1792, "ffn": smaller.width, "kv": 4})
        unit = "width" if args.measure == "width" else "neurons"
        goal = smaller.params
        report = prune_checkpoint(
            folder, out, prune, settings(args), unit=unit, goal=goal, end=goal, seed=0
        )
        assert (report.widths[0], report.hidden, report.kv_heads) == (
            smaller.width,
            smaller.hidden,
            smaller.kv_heads,
        )
        return
    batches = calibration_batches(settings(args), AutoTokenizer.from_pretrained(folder), 0)
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    if args.measure == "forward":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False, logits_to_keep=1)
    else:
        from full_load import prune_in_memory

        assert prune_in_memory(folder, out, batches, REMOVE) == SHAPE["intermediate_size"] - REMOVE


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["1.1B", "3B"], choices=DEPTHS)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument(
        "--measure",
        choices=["make", "imports", "cp", "forward", "ptl", "taylor", "width", "full"],
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--size", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="prune-scale-") as scratch:
        args.scratch = Path(scratch)
        text(args.scratch / "rows.jsonl", args.rows, args.length)
        found = {}
        for size in args.sizes:
            for name in ("make", "imports", "cp", "ptl", "taylor", "width", "forward", "full"):
                command = [
                    sys.executable,
                    __file__,
                    "--measure",
                    name,
                    "--size",
                    size,
                    "--scratch",
                    scratch,
                ]
                command += [
                    "--rows",
                    str(args.rows),
                    "--length",
                    str(args.length),
                    "--threads",
                    str(args.threads),
                ]
                os.sync()  # else one measurement waits for what the one before it wrote
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[size, name] = json.loads(done.stdout.splitlines()[-1])
                print(done.stdout.splitlines()[-1], flush=True)
            shutil.rmtree(args.scratch / size)
            # the second one hardly depends on what else the machine does
            for clock in ("seconds", "cpu_seconds"):
                cost = {
                    name: found[size, name][clock]
                    for name in ("ptl", "forward", "cp", "full", "taylor", "width")
                }
                aim = cost["forward"] + 2.5 * cost["cp"]
                print(
                    f"{size} {clock}: ptl {cost['ptl']}, forward + 2.5 cp {aim:.1f}, full load {cost['full']}; "
                    f"width {cost['width'] / cost['taylor']:.2f} times neurons alone",
                    flush=True,
                )
        if len(args.sizes) > 1:
            small, large = (
                found[size, "ptl"]["peak_mb"] for size in (args.sizes[0], args.sizes[-1])
            )
            embeddings = 2 * 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] / 2**20
            ratio = (large - embeddings) / (small - embeddings)
            print(
                f"peak memory {large} MB against {small} MB, apart from embeddings {ratio:.2f} times"
            )


if __name__ == "__main__":
    main()
