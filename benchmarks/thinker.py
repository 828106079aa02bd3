"""A model that thinks, pruned as it is served: own answers against given ones, cpt against distillation, and a guard.

    python benchmarks/thinker.py measure [--shares 0.4 0.6] [--seeds 11 12 13] [--rate 1.2e-3]
    python benchmarks/thinker.py table

The given answers have their steps and no thought, as data of others have. Loops of four on the tiny thinker; what
recoveries are trained on is scored with, too; a guard adds to it what the model answers at once. Accuracy is that of
1,000 held-out problems in the mode in which it is pruned, thinking, and in the other one. Each model is a line of
benchmarks/results/thinker.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from depth_report import mean_and_interval
from loops import ROOT, Subject, json_rows, run, study, work_quietly
from recovery import CPT

from ptl.config.chat import Chat
from ptl.config.data import DataSource, TrainingData
from ptl.config.run import Calibration, Evaluate, Speed, Task
from ptl.config.schedule import Prune, Schedule
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.language_models import language_model
from ptl.recovery.answers import in_place_of, write_answers

EXAMPLE = ROOT / "examples" / "tiny_reasoner"
MODEL = EXAMPLE / "thinker"
ANSWERS = {mode: ROOT / ".ptl" / f"thinker-{mode}" for mode in ("answers", "at-once")}
RESULTS = ROOT / "benchmarks" / "results" / "thinker.jsonl"
THINKING, AT_ONCE = (
    Chat(enabled=True, template_kwargs={"enable_thinking": thinks}) for thinks in (True, False)
)
GIVEN = TrainingData(
    source=str(EXAMPLE / "train.jsonl.gz"),
    prompt="{question}",
    completion="{answer}",
    answers="self",
    num_prompts=4000,
    samples=2,
    max_new_tokens=150,
    reward={"name": "final_answer"},
)
ARMS = {
    f"{answers} answers, {method}{guard}": (answers, method, guard)
    for answers, method, guard in itertools.product(
        ("given", "own"), ("cpt", "distil"), ("", ", guard")
    )
}
GUARD = 0.3  # of the sequences that are scored on
TASK = Task(name=str(EXAMPLE / "tiny_thinker.yaml"))
TOKENS = 500_000  # of recovery
EVALUATE = Evaluate(tasks=[TASK], speed=Speed(repeats=0), batch_size=128)

Row = dict[str, Any]


def own_answers(mode: str, chat: Chat) -> Path:
    """The folder of what the thinker answers in a mode, written once."""
    target = ANSWERS[mode]
    if not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            write_answers(MODEL, Path(folder), GIVEN, EVALUATE, chat, model="dense", seed=1)
            Path(folder).rename(target)
    return target


def guard() -> DataSource:
    """What the thinker answers at once, after the thought without words that is then in its prompt."""
    folder = own_answers("at-once", AT_ONCE)
    with (folder / "guard.jsonl").open("w") as file:
        for row in json_rows(folder / "answers.jsonl"):
            *turns, answer = row["messages"]
            answer["content"] = "".join(THINKING.thought) + answer["content"]
            file.write(json.dumps({"messages": [*turns, answer]}) + "\n")
    return DataSource(source=file.name, format="messages", weight=GUARD)


def subject(answers: str, guarded: bool) -> Subject:
    """The thinker with the texts of an arm."""
    data = GIVEN
    if answers == "own":
        folder = own_answers("answers", THINKING)
        data = GIVEN.model_copy(update={"sources": in_place_of(GIVEN.sources, folder, THINKING)})
    scored_on = (
        [data.sources[0].model_copy(update={"weight": 1 - GUARD}), guard()]
        if guarded
        else data.sources[0]
    )
    return Subject(
        MODEL, data, Calibration(data=scored_on, num_sequences=128, max_length=256), THINKING
    )


def scored(folder: Path) -> Row:
    """Accuracy in both modes, and how long the answers are with their thoughts."""
    row: Row = {}
    for name, chat in (("thinking", THINKING), ("at once", AT_ONCE)):
        (score,), _ = score_tasks(language_model(folder, EVALUATE, chat), EVALUATE, 0)
        row |= {
            name: score.accuracy,
            f"{name}, tokens": score.answer_tokens,
            f"{name}, cut": score.truncated,
        }
    return row


def measure(arm: str, share: float, tokens: int, rate: float, seed: int) -> Row:
    """One model."""
    answers, method, guarded = ARMS[arm]
    stage = CPT | {"method": method, "learning_rate": rate}
    schedule = Schedule(target=share, recovery_tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        trained = run(
            subject(answers, bool(guarded)),
            schedule,
            Prune(width_multiple=1),
            [stage],
            seed,
            Path(folder),
        )
        return {"params": trained.params} | scored(trained.checkpoint)


def table() -> None:
    """Each arm over its seeds, with Student's 95 % interval."""
    print("| removed | rate | arm | seeds | thinking | at once | tokens of an answer | cut |")
    print("|---:|---|---|---:|---|---|---:|---:|")
    found = json_rows(RESULTS)
    cells = dict.fromkeys((row["share"], row["rate"], row["arm"]) for row in found)
    for share, rate, arm in sorted(cells):
        group = [
            row for row in found if (row["share"], row["rate"], row["arm"]) == (share, rate, arm)
        ]
        modes = [
            mean_and_interval([row[mode] for row in group]) for mode in ("thinking", "at once")
        ]
        length, cut = (
            statistics.mean(row[f"thinking, {name}"] for row in group) for name in ("tokens", "cut")
        )
        print(
            f"| {share:.0%} | {rate} | {arm} | {len(group)} | {' | '.join(modes)} | {length:.1f} | {cut:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.6, 0.65])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rate", type=float, default=6e-4, help="learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    given = parser.parse_args()
    if given.what == "table":
        table()
        return
    work_quietly()
    cells = [
        {"arm": arm, "share": share, "tokens": TOKENS, "rate": given.rate, "seed": seed}
        for share, seed, arm in itertools.product(given.shares, given.seeds, given.arms)
    ]
    study(RESULTS, cells, lambda cell: measure(**cell))


if __name__ == "__main__":
    main()
