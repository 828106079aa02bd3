"""A published model of half a billion parameters on code: what pruning costs, and what brings it back.

    python examples/from_gguf.py MODEL.gguf -o .ptl/models/qwen2.5-coder-0.5b-instruct
    make vllm
    python benchmarks/real_model.py measure --data DATA [--shares 0.2] [--arms neurons] [--tokens 100000] [--seeds 1]
    python benchmarks/real_model.py speed --data DATA --arms neurons --tokens 0 # beside the dense model, undisturbed
    python benchmarks/real_model.py table # and the picture

MODEL.gguf is the makers' Q4_K_M file of Qwen/Qwen2.5-Coder-0.5B-Instruct, and DATA holds HumanEval.jsonl.gz and
mbpp.jsonl as published. Everything but the arms is as in examples/qwen-coder/config.yaml: HumanEval (164) and MBPP
(500) are answered greedily as chats, here by vLLM, and the perplexity of held-out prose is measured. How well some of
the dense model's answers are predicted is finer than what is solved. What a recovery is trained on, the model is pruned
by: what the dense model answers to the 374 training problems of MBPP and to as many functions of Python's library
without their bodies (`own`), or these problems with their own solutions (`given`), and ptl's general text. A cell takes
half an hour and more of two cores; one line of benchmarks/results/real_model.jsonl each. What is there is not measured
again, and an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from exports import vllm_speed
from loops import ROOT, Subject, json_rows, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from width_peers import PEERS

from ptl.config.chat import Chat
from ptl.config.data import DataSource
from ptl.config.run import Config, Speed, load_config
from ptl.config.schedule import Prune, Schedule
from ptl.data.sequences import tokenize
from ptl.data.sources import SourceRow
from ptl.evaluation import paired
from ptl.evaluation.evaluate import SCORES, read_items, write_items
from ptl.evaluation.llama_cpp import gguf_speed
from ptl.export.gguf import write_gguf
from ptl.model.pretrained import load_tokenizer
from ptl.recovery.answers import in_place_of, write_answers

RESULTS = ROOT / "benchmarks" / "results" / "real_model.jsonl"
SPEEDS = RESULTS.with_name("real_model_speed.json")
PICTURE = ROOT / "docs" / "real-model.svg"
EXAMPLE = ROOT / "examples" / "qwen-coder" / "config.yaml"
SOURCES = ("training.sources.0", "calibration.data.0")  # of MBPP, in the example's config
MODEL = ROOT / ".ptl" / "models" / "qwen2.5-coder-0.5b-instruct"
WORK = ROOT / ".ptl" / "real_model"  # models, finished or not, and the dense model's answers
ANSWERS = WORK / "answers"
# By vLLM, on these cores
GENERATION = {"evaluate.backend": "vllm", "evaluate.batch_size": 512, "evaluate.speed.repeats": 0}
BOUND = "0-1"
BATCH, REPEATS = 8, 5  # for speed
TITLES = {"humaneval_instruct": "HumanEval", "mbpp_code": "MBPP"}
# of each benchmark's answers, at least; tokens of one with its problem
PREDICTED, LONGEST = 40, 1024
DENSE = "dense"  # an arm that prunes nothing
UNTRAINED = "own"  # pruned by the same texts

NEURONS = {"target": "neurons", "repair": 840}
# Sizes that end with the same number of parameters. Of its own, `width` would keep the hidden size: the FFN has half of
# what stays. 840 and 784 are 14 heads of 60 and 56.
WIDTH = {"target": "width", "repair": 840, "width": {"hidden": 840, "kv": 2}}
AT_ONCE = 1.0
# The share of all parameters that an iteration removes, fields of the config's section
ARMS: dict[str, tuple[float, dict[str, Any]]] = {
    DENSE: (AT_ONCE, {}),
    "neurons": (AT_ONCE, NEURONS),
    "neurons, not repaired": (AT_ONCE, NEURONS | {"repair": 0}),
    "neurons, not repaired, by twentieths": (0.05, NEURONS | {"repair": 0}),
    "neurons, by tenths": (0.1, NEURONS),
    "hidden 840": (AT_ONCE, WIDTH),
    "hidden 840, not repaired": (AT_ONCE, WIDTH | {"repair": 0}),
    "hidden 840, not repaired, by twentieths": (0.05, WIDTH | {"repair": 0}),
    "hidden 784": (AT_ONCE, WIDTH | {"width": {"hidden": 784, "kv": 2}}),
    "layers": (AT_ONCE, {"target": "layers"}),
    "torch-pruning": (AT_ONCE, WIDTH | {"repair": 0}),
}
TRAININGS = [f"{answers}, {method}" for answers in ("own", "given") for method in ("distil", "cpt")]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model."""

    arm: str
    share: float  # of all parameters, to remove
    training: str  # of TRAININGS, or untrained
    tokens: int
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        return WORK / "-".join(map(str, asdict(self).values())).replace(",", "").replace(" ", "-")


AS_IT_IS = Cell(DENSE, 0.0, UNTRAINED, 0, 0.0, 0)


def cells(given: argparse.Namespace) -> list[Cell]:
    """What is asked for, and the dense model as it is, which all are compared with."""
    found = [AS_IT_IS]
    trainings = given.trainings if given.tokens else [UNTRAINED]
    rate = given.learning_rate if given.tokens else 0.0
    for arm, share, training, seed in itertools.product(
        given.arms, given.shares, trainings, given.seeds
    ):
        if arm != DENSE or given.tokens:
            found.append(
                Cell(arm, share if arm != DENSE else 0.0, training, given.tokens, rate, seed)
            )
    return list(dict.fromkeys(found))


def config(data: Path) -> Config:
    """The example's, without the hub."""
    file = WORK / "mbpp_train.jsonl"
    WORK.mkdir(parents=True, exist_ok=True)
    # The authors' split (Austin et al. 2021)
    file.write_text(
        "".join(
            json.dumps(row) + "\n" for row in json_rows(data / "mbpp.jsonl") if row["task_id"] > 600
        )
    )
    local = {"source": str(file), "subset": None}
    changes = {f"{where}.{name}": value for where in SOURCES for name, value in local.items()}
    return load_config(
        EXAMPLE, changes | GENERATION | {"model.path": str(MODEL), "evaluate.data_dir": str(data)}
    )


def own_answers(data: Path) -> None:
    """Let the dense model answer the training problems."""
    its = config(data)
    partial = ANSWERS.with_suffix(".partial")
    write_answers(MODEL, partial, its.training, its.evaluate, its.chat, model=DENSE, seed=its.seed)
    partial.rename(ANSWERS)


def by_vllm(vllm: Path, command: str, *arguments: str | Path) -> None:
    """Run a command of the environment that has vLLM."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": BOUND}
    subprocess.run([vllm / command, *arguments], env=environment, check=True)


def subject(answers: str, data: Path) -> Subject:
    """The model, with the texts that it is scored and trained on."""
    its = config(data)
    problems, _, general = its.calibration.data
    if answers == "own":
        sources = in_place_of(its.training.sources, ANSWERS, its.chat)
    else:
        # of both, so that the general text has the same share
        sources = (problems.model_copy(update={"weight": 2.0}),)
    training = its.training.model_copy(update={"sources": sources})
    calibration = its.calibration.model_copy(update={"data": (*sources, general)})
    items = WORK / "items"
    write_items(items, its.evaluate, its.seed)
    return Subject(MODEL, training, calibration, its.chat, items)


def made(cell: Cell, data: Path) -> Path:
    """The checkpoint of a cell: pruned and trained, where it is not there already."""
    step, prune = ARMS[cell.arm]
    iterations = max(1, round(cell.share / step))
    # Without a removal the dense model is only trained. By equal cuts -20 % begins as -30 % does.
    target = cell.share or 1e-9
    schedule = Schedule(
        target=target, recovery_tokens=cell.tokens, iterations=iterations, cuts="uniform"
    )
    answers, _, method = cell.training.partition(", ")
    stages = []
    if cell.tokens:
        if iterations == 1 and not cell.folder.is_dir():
            pruned = made(replace(cell, training=answers, tokens=0, learning_rate=0.0), data)
            cell.folder.mkdir(parents=True)
            (cell.folder / pruned.name).symlink_to(pruned)
        (stage,) = config(data).recover
        stages = [
            stage.model_copy(
                update={"method": method, "learning_rate": cell.learning_rate}
            ).model_dump()
        ]
    its = subject(answers, data)
    cut = PEERS[cell.arm](its, Prune(**prune), cell.seed) if cell.arm in PEERS else None
    return run(its, schedule, Prune(**prune), stages, cell.seed, cell.folder, cut).checkpoint


def served(cell: Cell, checkpoint: Path) -> Path:
    """A cell's checkpoint as vLLM and llama.cpp load it."""
    return as_llama(checkpoint) if ARMS[cell.arm][1].get("target") == "width" else checkpoint


def as_llama(checkpoint: Path) -> Path:
    """The same model as a Llama: of a Qwen 2 both take the hidden size for that of all heads together."""
    folder = checkpoint.with_name("as-llama")
    shutil.copytree(
        checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    its = json.loads((checkpoint / "config.json").read_text())
    for name in ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"):
        del its[name]
    its |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True}
    (folder / "config.json").write_text(json.dumps(its))
    weights = load_file(checkpoint / "model.safetensors")
    # biases of a Qwen 2 are of queries, keys and values alone
    for i in range(its["num_hidden_layers"]):
        weights[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(
            its["hidden_size"], dtype=torch.bfloat16
        )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def scored(cell: Cell, checkpoint: Path, data: Path, vllm: Path) -> Path:
    """What a cell's checkpoint answers, or has answered: the folder."""
    folder = cell.folder / "scored"
    if not folder.is_dir():
        cell.folder.mkdir(parents=True, exist_ok=True)
        changes = {**GENERATION, "model.path": MODEL, "evaluate.data_dir": data}
        sets = [f"--set={name}={value}" for name, value in changes.items()]
        by_vllm(
            vllm, "ptl", "evaluate", served(cell, checkpoint), folder, "--config", EXAMPLE, *sets
        )
    return folder


def predicted(checkpoint: Path, dense: Path, chat: Chat) -> dict[str, list[float]]:
    """Nats of each of some of the dense model's answers, by benchmark: finer than what is solved."""
    tokenizer = load_tokenizer(MODEL)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    source = DataSource(source=str(dense), prompt="{prompt}", completion="{answer}")
    found: dict[str, list[float]] = {}
    for task in TITLES:
        items = [item for item in read_items(dense) if item["task"] == task]
        found[task] = []
        for number, item in enumerate(items[:: len(items) // PREDICTED]):
            # Where HumanEval gives an answer's beginning, which costs next to nothing to predict
            function = item["prompt"].partition("```python\n")[2].rpartition("```")[0]
            begun = f"Here is the completed function:\n```python\n{function}" if function else ""
            asked = SourceRow(item | {"answer": begun + item["answer"]}, source, number)
            row = tokenize(asked, tokenizer, LONGEST, chat)
            with torch.no_grad():
                loss = model(
                    torch.tensor([row.ids]), labels=torch.tensor([row.labels("completion")])
                ).loss
            found[task].append(round(float(loss) * (len(row.ids) - row.prompt), 2))
    return found


def measure(cell: Cell, data: Path, vllm: Path) -> Row:
    """One line."""
    if cell.training.startswith("own") and cell != AS_IT_IS and not ANSWERS.is_dir():
        by_vllm(vllm, "python", __file__, "answers", "--data", data)
    began = time.monotonic()
    checkpoint = made(cell, data) if cell.arm != DENSE or cell.tokens else MODEL
    trained = time.monotonic()
    folder = scored(cell, checkpoint, data, vllm)
    ended = time.monotonic()
    scores = json.loads((folder / SCORES).read_text())
    return asdict(cell) | {
        "params": scores["params"],
        "hidden": scores["hidden_size"],
        "ffn": scores["widths"],
        # of the last attempt
        "minutes": [round((trained - began) / 60), round((ended - trained) / 60)],
        "retention": [
            scores["retention"]["tokens"],
            [round(loss, 3) for loss in scores["retention"]["losses"]],
        ],
        "answers": predicted(checkpoint, scored(AS_IT_IS, MODEL, data, vllm), config(data).chat),
        "items": [
            [item["task"], item["id"], item["correct"], item["tokens"], int(item["truncated"])]
            for item in read_items(folder)
        ],
    }


def speed(pruned: Sequence[Cell], data: Path, vllm: Path) -> None:
    """Gigabytes, and generated tokens per second for BATCH sequences at once: llama.cpp in turns, then vLLM."""
    models = {DENSE: MODEL} | {cell.folder.name: served(cell, made(cell, data)) for cell in pruned}
    files = {}
    for (name, folder), form in itertools.product(models.items(), ("f16", "q8_0")):
        files[f"{name}, llama.cpp {form}"] = file = WORK / f"{name}-{form}.gguf"
        file.unlink(missing_ok=True)
        write_gguf(folder, file, form)
    measured = gguf_speed(files, Speed(batch_sizes=(BATCH,), repeats=REPEATS))
    found = {
        name: (files[name].stat().st_size, rows[0]["decode_tokens_per_s"])
        for name, rows in measured.items()
    }
    for name, folder in models.items():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found[f"{name}, vLLM bfloat16"] = (size, vllm_speed(folder, vllm / "vllm"))
    lines = {
        name: {"gigabytes": round(size / 1e9, 3), "tokens_per_s": round(fast, 1)}
        for name, (size, fast) in found.items()
    }
    SPEEDS.write_text(json.dumps(lines, indent=2) + "\n")


def solved(row: Row, task: str) -> list[int]:
    return [correct for name, _, correct, _, _ in row["items"] if name == task]


def against(row: Row, dense: Row, task: str) -> str:
    """Accuracy with its interval; items lost and won against the dense model, and McNemar's p that nothing changed."""
    ours, its = solved(row, task), solved(dense, task)
    low, high = paired.wilson(sum(ours), len(ours))
    shown = f"{sum(ours) / len(ours):.1%} ({100 * low:.0f} to {100 * high:.0f})"
    if row is dense:
        return shown
    pair = paired.paired(paired.Outcomes(its, ours), 0.0, 0.05)
    return f"{shown}, -{pair.regressions} +{pair.improvements}, p {pair.p_different:.2g}"


def retention(row: Row, dense: Row) -> float:
    """Perplexity of held-out prose over the dense model's."""
    tokens, losses = row["retention"]
    return math.exp((sum(losses) - sum(dense["retention"][1])) / sum(tokens))


def table(rows: Sequence[Row]) -> None:
    """Every model beside the dense one."""
    print(
        "| removed | parameters | arm | trained on, by | tokens | rate, seed | HumanEval | MBPP "
        "| nats of an answer | prose | tokens of an answer (cut) | minutes |"
    )
    print("|---:|---:|---|---|---:|---|---|---|---|---:|---|---|")
    dense = next(row for row in rows if row["arm"] == DENSE and not row["tokens"])
    for row in sorted(
        rows,
        key=lambda row: (row["share"], row["tokens"], list(ARMS).index(row["arm"]), row["seed"]),
    ):
        tokens = [item[3] for item in row["items"]]
        cut = [item[4] for item in row["items"]]
        nats = ", ".join(f"{sum(losses) / len(losses):.1f}" for losses in row["answers"].values())
        print(
            f"| {1 - row['params'] / dense['params']:.1%} | {row['params']:,} | {row['arm']} | {row['training']} "
            f"| {row['tokens']:,} | {row['learning_rate']:g}, {row['seed']} "
            f"| {' | '.join(against(row, dense, name) for name in TITLES)} | {nats} | {retention(row, dense):.2f} "
            f"| {sum(tokens) / len(tokens):.0f} ({sum(cut) / len(cut):.1%}) | {' + '.join(map(str, row['minutes']))} |"
        )


def picture(rows: Sequence[Row]) -> None:
    """Accuracy against the parameters for each benchmark, a line from the dense model through each arm."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ptl"  # the same picture is the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 4.2), sharex=True, layout="constrained")
    dense = next(row for row in rows if row["arm"] == DENSE and not row["tokens"])
    lines: dict[tuple[str, tuple[str, int, float]], list[Row]] = {}
    for row in rows:
        if row["arm"] != DENSE:
            training = row["training"], row["tokens"], row["learning_rate"]
            lines.setdefault((row["arm"], training), [dense]).append(row)
    colors = {
        arm: f"C{number}" for number, arm in enumerate(dict.fromkeys(arm for arm, _ in lines))
    }
    styles = dict(
        zip(
            dict.fromkeys(training for _, training in lines),
            ("o-", "s--", "^:", "v-."),
            strict=False,
        )
    )
    for axis, (task, title) in zip(axes, TITLES.items(), strict=True):
        for number, ((arm, training), models) in enumerate(lines.items()):
            answers, tokens, rate = training
            models = sorted(models, key=lambda row: -row["params"])
            # So that intervals do not hide each other
            at = [row["params"] / 1e6 + (0 if row is dense else number) for row in models]
            right = [solved(row, task) for row in models]
            low, high = zip(
                *(paired.wilson(sum(items), len(items)) for items in right), strict=True
            )
            label = f"{arm}; {answers}; {tokens:,} tokens at {rate:g}" if tokens else arm
            means = [100 * sum(items) / len(items) for items in right]
            axis.plot(at, means, styles[training], color=colors[arm], markersize=4, label=label)
            axis.vlines(
                at,
                [100 * share for share in low],
                [100 * share for share in high],
                colors[arm],
                linewidth=1,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("million parameters")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("problems solved (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "answers", "speed", "table"])
    parser.add_argument("--data", type=Path, help="folder of HumanEval.jsonl.gz and mbpp.jsonl")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2])
    parser.add_argument(
        "--vllm", type=Path, default=ROOT / ".venv-vllm" / "bin", help="folder with its commands"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=["own, distil"])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--learning-rate", type=float, default=2e-6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    given = parser.parse_args()
    if given.what == "table":
        table(json_rows(RESULTS))
        picture(json_rows(RESULTS))
        return
    if given.data is None:
        parser.error(f"{given.what} needs --data")
    if given.what == "answers":
        own_answers(given.data)
        return
    if given.what == "speed":
        speed(cells(given)[1:], given.data.resolve(), given.vllm)
        return
    for cell in cells(given):
        known = [
            {name: row[name] for name in Cell.__dataclass_fields__} for row in json_rows(RESULTS)
        ]
        if asdict(cell) not in known:
            row = measure(cell, given.data.resolve(), given.vllm)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*asdict(cell).values(), row["minutes"], flush=True)


if __name__ == "__main__":
    main()
