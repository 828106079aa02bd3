"""Scores of a checkpoint: accuracy of each benchmark with every item's outcome, and what the model costs.

`ptl compare A B` shows two evaluations, item by item, as a table.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ptl.config.chat import NO_CHAT, Chat
from ptl.config.run import Evaluate
from ptl.errors import InputError
from ptl.evaluation import language_models, paired, retention, tasks
from ptl.evaluation.paired import Item, Paired
from ptl.evaluation.retention import TextLosses
from ptl.evaluation.scoring import TaskScore, load_tasks, score_task
from ptl.json_lines import read_json_lines
from ptl.log import table_text
from ptl.model import dimensions, pretrained
from ptl.model.dimensions import StaticCost

ITEMS = "items.jsonl"
SCORES = "scores.json"
# Two lines for each benchmark: for the 80 columns of a terminal
NUMBERS = ("A\nB", "regressions\nimprovements", "difference\n(interval)", "p worse\np different")
HEADINGS = ("benchmark\nitems", *NUMBERS, "verdict")
LENGTHS = ("benchmark", "mean", "95th\npercentile", "cut at\nthe limit", "p longer", "")


@dataclass(frozen=True, kw_only=True)
class Scores(StaticCost):
    """Everything that is measured of one checkpoint."""

    tasks: tuple[TaskScore, ...]
    retention: TextLosses
    seconds: float = 0.0  # of the whole evaluation


def evaluate_checkpoint(
    src: Path, dst: Path, settings: Evaluate, chat: Chat = NO_CHAT, *, seed: int
) -> Scores:
    """Score the checkpoint in `src`; write dst/scores.json and dst/items.jsonl.

    The files have nothing that was timed: equal models give equal bytes.
    A line of items.jsonl is one answer to an item of a benchmark with right and wrong answers: task, id, sample,
    prompt_digest, correct (0 or 1), prompt (without few-shot examples), answer, target, tokens, truncated.
    Raises InputError for wrong tasks and for a checkpoint that is not supported before the model is loaded.
    """
    started = time.monotonic()
    tasks.check_tasks(settings)
    static = dimensions.static_cost(src)
    pretrained.load_tokenizer(src)

    lm = language_models.language_model(src, settings, chat, seed)
    with contextlib.closing(lm):
        retained = retention.measure(lm, settings)
        scores, items = score_tasks(lm, settings, seed)
    result = Scores(
        **asdict(static), tasks=scores, retention=retained, seconds=time.monotonic() - started
    )
    _write_lines(dst, items)
    raw = asdict(result)
    for record in (raw, *raw["tasks"]):
        del record["seconds"]
    (dst / SCORES).write_text(json.dumps(raw, indent=2) + "\n")
    return result


def score_tasks(
    lm: Any,  # made by language_models.language_model
    settings: Evaluate,
    seed: int,
) -> tuple[tuple[TaskScore, ...], list[Item]]:
    """Every task's score, and the items of all tasks."""
    scored = [score_task(lm, task, settings, seed=seed) for task in settings.tasks]
    return tuple(score for score, _ in scored), [item for _, items in scored for item in items]


def _write_lines(dst: Path, items: Iterable[Item]) -> None:
    dst.mkdir(parents=True, exist_ok=True)
    with (dst / ITEMS).open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def read_items(path: Path) -> list[Item]:
    """The lines of an items.jsonl, or of the one in a folder."""
    if path.is_dir():
        path = path / ITEMS
    if not path.is_file():
        raise InputError(f"no {ITEMS} at {path}", remedy="evaluate the checkpoint first")
    if not path.stat().st_size:  # of tasks that call no item right or wrong
        return []
    items = list(read_json_lines(path, "items", str(path)))
    if not all("task" in item for item in items):
        raise InputError(
            f"{path} has not the items of an evaluation", field="items", remedy=f"give an {ITEMS}"
        )
    return items


def write_items(dst: Path, settings: Evaluate, seed: int) -> int:
    """Write dst/items.jsonl without any model's answers: what recovery must not train on; returns how many items.

    A line is an item that will be scored: task, prompt without few-shot examples, target. A task whose items have no
    prompt (perplexity of whole texts) has one line, with its name alone. Needs the harness and the benchmarks' data,
    but no model: neither tokenizer nor chat template counts.
    """
    lines: list[Item] = []
    number = 0
    for task in settings.tasks:
        name = tasks.score_name(task)
        # The items of a task, or of all members of a group, as they are scored with this seed.
        items = [
            {"task": name, "prompt": prompt, "target": str(loaded.doc_to_target(doc))}
            for loaded in load_tasks(tasks.find(task.name), task, settings, seed).values()
            for _, doc in loaded.doc_iterator(limit=task.limit)
            if (prompt := str(loaded.doc_to_text(doc))).strip()
        ]
        number += len(items)
        lines += items or [{"task": name}]
    _write_lines(dst, lines)
    return number


def compare(
    reference: Sequence[Item],
    candidate: Sequence[Item],
    margin: float,  # loss of accuracy that is tolerated, 0..1
    alpha: float,  # significance level of all tests together
) -> tuple[dict[str, Paired], dict[str, Paired]]:
    """Compare two evaluations on each benchmark; then pass@n of those with several samples, which decides nothing.

    The significance level alpha is shared among the benchmarks, so that equal models are called different with a
    probability of at most alpha in all. Raises InputError when the items or prompts differ.
    """
    if not 0 <= margin < 1 or not 0 < alpha < 0.5:
        problem = f"margin={margin} must be in 0..1 and alpha={alpha} above 0 and below 0.5"
        raise InputError(problem, field="compare")
    # Over all benchmarks first: one that only the candidate has would not be missed below.
    paired.match(reference, candidate)
    names = list(dict.fromkeys(item["task"] for item in reference))
    outcomes = {name: paired.match(reference, candidate, name) for name in names}
    pairs = {
        name: paired.paired(of_task, margin, alpha / len(names))
        for name, of_task in outcomes.items()
    }
    return pairs, paired.pass_at_n(outcomes, pairs)


def comparison_table(pairs: Mapping[str, Paired], pass_at_n: Mapping[str, Paired]) -> str:
    """The comparisons for a terminal."""
    first = next(iter(pairs.values()))
    title = f"B against A, margin {100 * first.margin:g} points, one-sided significance level {first.alpha:g} each"
    rows = []
    for name, pair in pairs.items():
        rows.append(
            _compared(name, f", avg@{pair.samples}" if pair.samples > 1 else "", pair, pair.verdict)
        )
        if name in pass_at_n:
            rows.append(_compared(name, f", pass@{pair.samples}", pass_at_n[name], ""))
    return table_text(title, HEADINGS, rows, numbers=NUMBERS)


def _compared(name: str, score: str, pair: Paired, verdict: str) -> tuple[str, ...]:
    return (
        f"{name}\n{pair.items:,}{score}",
        f"{pair.reference:.1%}\n{pair.candidate:.1%}",
        f"{pair.regressions}\n{pair.improvements}",
        # In percentage points
        f"{100 * pair.difference:+.1f}\n({100 * pair.low:+.1f} to {100 * pair.high:+.1f})",
        f"{pair.p_worse:.2g}\n{pair.p_different:.2g}",
        verdict,
    )


def answers_table(reference: Sequence[Item], candidate: Sequence[Item]) -> str:
    """How long the answers to the same items are, for a terminal; empty where none were generated."""
    rows = []
    for name in dict.fromkeys(item["task"] for item in reference):
        p = paired.p_longer(reference, candidate, name)
        if p is None:
            continue
        both = [
            [item for item in items if item["task"] == name] for items in (reference, candidate)
        ]
        tokens = [[item["tokens"] for item in items] for items in both]
        rambles = paired.rambles(fmean(tokens[0]), fmean(tokens[1]), p)
        rows.append(
            (
                name,
                "\n".join(f"{fmean(lengths):,.1f}" for lengths in tokens),
                "\n".join(f"{np.percentile(lengths, 95):,.0f}" for lengths in tokens),
                "\n".join(f"{fmean(item['truncated'] for item in items):.1%}" for items in both),
                f"{p:.2g}",
                "rambles" if rambles else "",
            )
        )
    return (
        table_text("Tokens of an answer, A above B", LENGTHS, rows, numbers=LENGTHS[1:-1])
        if rows
        else ""
    )
