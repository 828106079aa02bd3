"""Scores of a checkpoint: benchmark accuracy by lm-evaluation-harness with every item's outcome, and what it costs."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptl import backends, cost, harness, model_checks, tasks
from ptl.config import Evaluate, Task
from ptl.errors import InputError
from ptl.gate import wilson
from ptl.tasks import check_tasks as check_tasks

ITEMS = "items.jsonl"
SCORES = "scores.json"


@dataclass(frozen=True)
class TaskScore:
    """One benchmark. Metrics that are no share of right answers (perplexity) have neither interval nor items."""

    task: str
    version: str
    metric: str  # metric,filter of lm-eval
    accuracy: float  # the metric's value: 0..1 for accuracies
    low: float | None  # Wilson interval
    high: float | None
    items: int
    num_fewshot: int
    truncated: float  # share of the answers that hit the token limit
    higher_is_better: bool = True
    cut_prompts: float = 0.0  # share of the prompts whose beginning did not fit into the context
    answer_tokens: float = 0.0  # mean length of the generated answers
    seconds: float = 0.0  # in the model; divided by the right answers it is the time per solved problem


@dataclass(frozen=True)
class Scores:
    """Everything that is measured of one checkpoint."""

    tasks: tuple[TaskScore, ...]
    params: int
    bytes: int
    flops_per_token: int
    kv_bytes_per_token: int
    speed: list[dict[str, Any]]
    widths: list[int]
    seconds: float = 0.0  # of the whole evaluation

    @staticmethod
    def load(raw: dict[str, Any]) -> Scores:
        """From the JSON of scores.json."""
        return Scores(**{**raw, "tasks": tuple(TaskScore(**score) for score in raw["tasks"])})


def evaluate_checkpoint(src: Path, dst: Path, settings: Evaluate, *, seed: int, speed: bool = True) -> Scores:
    """Score the checkpoint in `src`; write dst/scores.json and dst/items.jsonl.

    Without `speed` its rows stay empty, and the files have nothing that was timed: equal models give equal bytes.
    A line of items.jsonl is one item of a benchmark with right and wrong answers: task, id, prompt_digest, correct
    (0 or 1), prompt (without few-shot examples), answer, target, tokens, truncated. Raises InputError for wrong tasks
    and for a checkpoint that is not supported before the model is loaded.
    """
    started = time.monotonic()
    check_tasks(settings.tasks, settings)
    static = cost.from_config(src)
    model_checks.load_tokenizer(src)
    lm = backends.language_model(src, settings, seed)
    scores, items = [], []
    for task in settings.tasks:
        score, its_items = run_task(lm, task, settings, seed=seed)
        scores.append(score)
        items += its_items
    rows = cost.measure({"": lm.model}, settings.speed, seed)[""] if speed else []
    result = Scores(
        tasks=tuple(scores),
        params=static.params,
        bytes=static.bytes,
        flops_per_token=static.flops_per_token,
        kv_bytes_per_token=static.kv_bytes_per_token,
        speed=rows,
        widths=static.widths,
        seconds=time.monotonic() - started,
    )
    dst.mkdir(parents=True, exist_ok=True)
    (dst / ITEMS).write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    (dst / SCORES).write_text(json.dumps(asdict(result) if speed else _without_seconds(result), indent=2) + "\n")
    return result


def _without_seconds(scores: Scores) -> dict[str, Any]:
    raw = asdict(scores)
    del raw["seconds"]
    for task in raw["tasks"]:
        del task["seconds"]
    return raw


def side_by_side(folders: Mapping[str, Path], settings: Evaluate, *, seed: int) -> dict[str, Any]:
    """Speed of several checkpoints (dense, compact) in one process, taking turns; all of them are in memory at once.

    Metadata: how it was measured (device, task, items, batch_size, prompt_tokens, new_tokens, repeats, seconds), and
    `models`: name -> `params`; `speed`, the rows of cost.measure; `seconds_per_solved`, the median over the repeats of
    the seconds in the model for `items` of the first task, divided by its right answers (None where it has none, or no
    accuracy), so that longer answers count; `solved` and `answer_tokens` of these items.
    """
    import torch

    started = time.monotonic()
    gc.collect()  # a model of the harness refers to itself: what was scored before may still hold its memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    models = {name: backends.language_model(folder, settings, seed) for name, folder in folders.items()}
    rows = cost.measure({name: lm.model for name, lm in models.items()}, settings.speed, seed)
    runs = _solve_in_turns(models, settings, seed)
    found = {}
    for name, folder in folders.items():
        last = runs[name][-1] if runs[name] else None
        solved = round(last.accuracy * last.items) if last and last.low is not None else 0
        found[name] = {
            "params": cost.from_config(folder).params,
            "speed": rows[name],
            "seconds_per_solved": statistics.median(run.seconds for run in runs[name]) / solved if solved else None,
            "solved": solved,
            "answer_tokens": last.answer_tokens if last else 0.0,
        }
    first = next(iter(runs.values()))
    return {
        "device": _device(),
        "task": first[0].task if first else "",
        "items": first[0].items if first else 0,
        "batch_size": settings.batch_size,
        "prompt_tokens": settings.speed.prompt_tokens,
        "new_tokens": settings.speed.new_tokens,
        "repeats": settings.speed.repeats,
        "models": found,
        "seconds": time.monotonic() - started,
    }


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def _solve_in_turns(models: Mapping[str, Any], settings: Evaluate, seed: int) -> dict[str, list[TaskScore]]:
    """The first task's first items, answered by every model in every repeat; no runs where there is no accuracy."""
    task, speed = settings.tasks[0], settings.speed
    specs = tasks.find(task.name)
    limit = min(speed.items // len(specs), task.limit or speed.items)  # a group's limit is that of each member
    if not limit or not all(tasks.is_accuracy(spec, task.metric) for spec in specs):
        return {name: [] for name in models}
    some = task.model_copy(update={"limit": limit})
    runs: dict[str, list[TaskScore]] = {name: [] for name in models}
    for _ in range(speed.repeats):
        for name, lm in models.items():
            runs[name].append(run_task(lm, some, settings, seed=seed)[0])
    return runs


def read_items(path: Path) -> list[dict[str, Any]]:
    """The lines of an items.jsonl, or of the one in a folder."""
    path = path / ITEMS if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no {ITEMS} at {path}; evaluate the checkpoint first")
    with path.open(encoding="utf-8") as lines:  # str.splitlines would split at U+2028 in an answer too
        return [json.loads(line) for line in lines]


def run_task(lm: Any, task: Task, settings: Evaluate, *, seed: int) -> tuple[TaskScore, list[dict[str, Any]]]:
    """Score one task, or the pooled items of a group."""
    from lm_eval.evaluator import evaluate

    specs = tasks.find(task.name)
    harness.seed_everything(seed)
    loaded = {spec.name: harness.load_task(spec, task, settings, seed) for spec in specs}
    for each in loaded.values():
        harness.check_lengths(lm, each)
    lm.start_notes()
    results = evaluate(
        lm=lm,
        task_dict={"tasks": loaded},
        limit=task.limit,
        bootstrap_iters=0,
        apply_chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.chat_template,
        confirm_run_unsafe_code=settings.allow_code,
    )
    metric, extraction = tasks.choose(specs[0], task.metric)
    samples = [
        (spec.name, sample)
        for spec in specs
        for sample in results["samples"][spec.name]
        if sample["filter"] == extraction
    ]
    values = [sample[metric] for _, sample in samples]
    lengths = list(lm.notes.values())  # (tokens, cut by the limit) of every generated answer
    binary = all(value in (0, 1) for value in values)
    correct = sum(1 for value in values if value == 1)
    low, high = wilson(correct, len(values), settings.confidence) if binary else (None, None)
    if not binary and len(specs) > 1:
        raise InputError(f"evaluate.tasks: the group {task.name!r} has no accuracy to pool; name its tasks one by one")
    name = task.name if len(specs) > 1 else specs[0].name
    score = TaskScore(
        task=name,
        version=", ".join(sorted({str(results["versions"][spec.name]) for spec in specs})),
        metric=f"{metric},{extraction}",
        accuracy=correct / len(values)
        if binary
        else float(results["results"][specs[0].name][f"{metric},{extraction}"]),
        low=low,
        high=high,
        items=len(values),
        num_fewshot=int(results["n-shot"][specs[0].name]),
        truncated=sum(cut for _, cut in lengths) / len(lengths) if lengths else 0.0,
        higher_is_better=bool(results["higher_is_better"][specs[0].name].get(metric, True)),
        answer_tokens=sum(length for length, _ in lengths) / len(lengths) if lengths else 0.0,
        cut_prompts=lm.cut_prompts / len(values),
        seconds=lm.seconds,
    )
    return score, [
        _item(name, loaded[member], sample, metric, lm.notes) for member, sample in samples
    ] if binary else []


def _likeliest(likelihoods: list[float], loaded: Any, doc: Any, metric: str) -> int:
    """The choice that the metric takes for the answer, by what lm_eval.api.task.ConfigurableTask compares."""
    count = len(likelihoods)
    if loaded.get_config("output_type") == "multiple_choice":
        choices = loaded.doc_to_choice(doc)
        count = len(choices)
        if metric == "acc_norm":
            likelihoods = [value / len(text) for value, text in zip(likelihoods, choices, strict=False)]
        elif metric == "acc_bytes":
            likelihoods = [value / len(text.encode()) for value, text in zip(likelihoods, choices, strict=False)]
        elif metric == "acc_mutual_info":  # the second half is without the question
            likelihoods = [likelihoods[i] - likelihoods[count + i] for i in range(count)]
    return likelihoods.index(max(likelihoods[:count]))


def _item(task: str, loaded: Any, sample: dict[str, Any], metric: str, notes: dict[str, Any]) -> dict[str, Any]:
    """One line of items.jsonl from a sample that the harness logged."""
    answer = sample["resps"][0][0]
    length, cut = notes.get(sample["arguments"][0][0], (0, False))
    if not isinstance(answer, str):  # log-likelihoods of the choices
        likelihoods = [float(response[0][0]) for response in sample["resps"]]
        answer = _likeliest(likelihoods, loaded, sample["doc"], metric)
    return {
        "task": task,
        "id": str(sample["doc_id"]) if loaded.task_name == task else f"{loaded.task_name}/{sample['doc_id']}",
        "prompt_digest": sample["prompt_hash"],
        "correct": int(sample[metric]),
        "prompt": str(loaded.doc_to_text(sample["doc"])),
        "answer": answer,
        "target": sample["target"],
        "tokens": length,
        "truncated": cut,
    }
