"""The items of the benchmarks without any model's answers: what recovery must not train on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptl.config.run import Evaluate, Task
from ptl.evaluation import tasks
from ptl.evaluation.scoring import load_tasks

ITEMS = "items.jsonl"
Item = dict[str, Any]  # task, prompt and target


def write_items(dst: Path, settings: Evaluate, seed: int) -> int:
    """Write dst/items.jsonl, a line for each item that will be scored: task, prompt without few-shot examples, target.

    A task whose items have no prompt (perplexity of whole texts) has one line, with its name alone. Returns the number
    of items. Needs the harness and the benchmarks' data, but no model: neither tokenizer nor chat template counts.
    """
    dst.mkdir(parents=True, exist_ok=True)
    number = 0
    with (dst / ITEMS).open("w", encoding="utf-8") as file:
        for task in settings.tasks:
            items = list(_items(task, settings, seed))
            number += len(items)
            for item in items or [{"task": tasks.score_name(task)}]:
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
    return number


def _items(task: Task, settings: Evaluate, seed: int) -> Iterator[Item]:
    """The items of a task, or of all members of a group, as they are scored with this seed."""
    for loaded in load_tasks(tasks.find(task.name), task, settings, seed).values():
        for _, doc in loaded.doc_iterator(limit=task.limit):
            prompt = str(loaded.doc_to_text(doc))
            if prompt.strip():
                target = str(loaded.doc_to_target(doc))
                yield {"task": tasks.score_name(task), "prompt": prompt, "target": target}
