"""How fast models are, side by side: tokens per second of prompts and answers, and seconds per solved problem.

Measured for the evaluate step, and as rows and metrics for the report and MLflow.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ptl.config.chat import NO_CHAT, Chat
from ptl.config.run import Evaluate, Speed
from ptl.evaluation import language_models, tasks
from ptl.evaluation.scoring import TaskScore, score_task
from ptl.model import dimensions

PREFILL_SECONDS = 0.1  # a prompt is read for that long in every repeat ...
PREFILL_PASSES = 20  # ... but no more often than that

Models = Mapping[str, Any]  # by name: of the harness
Measurement = dict[str, Any]  # the speed of one model at one batch size
Times = tuple[float, float]  # seconds of one repeat: reading the prompts, generating the new tokens
# one repeat with a batch size, in which the prompts are read this number of times
Timer = Callable[[int, int], Times]
Metadata = dict[str, Any]  # of side_by_side; {"reason": ...} where nothing was measured
PHASES = ("prefill", "decode")
# Filled in from that metadata, and its models by name.
SETTING = (
    "Both models in one process on {device}, taking turns, median of {repeats}: prompts of {prompt_tokens} tokens, "
    "{new_tokens} new tokens."
)
SOLVING = (
    " Solved problem: {items} items of {task}{times} in batches of up to {batch_size}, seconds in the model divided by "
    "the {dense[solved]} (dense) and {final[solved]} (final) that it solved; its answers have "
    "{dense[answer_tokens]:.1f} and {final[answer_tokens]:.1f} tokens on average."
)


# label with its unit, dense, final, how many times as fast the final model is
Row = tuple[str, str, str, str]


def measure_in_turns(timers: Mapping[str, Timer], settings: Speed) -> dict[str, list[Measurement]]:
    """Prefill and decode speed of models side by side: name -> one row for each batch size.

    Rows: batch, prefill_tokens_per_s, decode_tokens_per_s. Tokens are counted over the whole batch. The models take
    turns in every repeat, so that a busy machine hits all alike; the median is reported. No repeats, no rows.
    """
    rows: dict[str, list[Measurement]] = {name: [] for name in timers}
    for batch in settings.batch_sizes if settings.repeats else ():
        passes = {}
        # The first turn warms up. One pass of a small model is shorter than the system's own pauses: a short prompt is
        # read several times in a repeat.
        for name, time_once in timers.items():
            prefill, _ = time_once(batch, 1)
            passes[name] = min(PREFILL_PASSES, 1 + int(PREFILL_SECONDS / max(prefill, 1e-9)))
        turns = [
            {name: time_once(batch, passes[name]) for name, time_once in timers.items()}
            for _ in range(settings.repeats)
        ]
        for name in timers:
            prefill, decode = (
                statistics.median(turn[name][phase] for turn in turns) for phase in (0, 1)
            )
            rows[name].append(
                {
                    "batch": batch,
                    "prefill_tokens_per_s": batch * Speed.prompt_tokens / prefill,
                    "decode_tokens_per_s": batch * Speed.new_tokens / decode,
                }
            )
    return rows


def _time_once(model: Any, seed: int, batch: int, passes: int) -> Times:
    """Seconds for random prompts, the mean of `passes`, and for the greedy steps after them with the KV cache."""
    import torch

    # transformers 5.24 renamed the argument; the old name goes in 5.40
    parameters = inspect.signature(model.forward).parameters
    cache = "cache" if "cache" in parameters else "past_key_values"
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, Speed.prompt_tokens)
    prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)

    def now() -> float:
        if model.device.type == "cuda":  # it works on after a call has returned
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        started = now()
        # Only the last position's logits: as when the answer begins.
        for _ in range(passes):
            out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        filled = now()
        # One token for each sequence at a time, after the cache of all before it.
        for _ in range(Speed.new_tokens):
            token = out.logits[:, -1:].argmax(-1)  # [batch, 1]
            out = model(
                input_ids=token, use_cache=True, logits_to_keep=1, **{cache: out.past_key_values}
            )
        ended = now()
    return (filled - started) / passes, ended - filled


def side_by_side(
    folders: Mapping[str, Path],  # checkpoints by name
    settings: Evaluate,
    chat: Chat = NO_CHAT,
    *,
    seed: int,
) -> dict[str, Any]:
    """Speed of several checkpoints (dense, compact) in one process, taking turns; all of them are in memory at once.

    Returns how it was measured (device, task, items, batch_size, prompt_tokens, new_tokens, repeats, seconds), and
    `models`: name -> params, speed (rows of measure_in_turns), solved, answer_tokens and seconds_per_solved. The last
    is the median over the repeats of the seconds in the model for `items` of the first task, divided by its right
    answers, so that longer answers count; None where it solved none, or where the task has no accuracy.
    """
    import torch

    started = time.monotonic()
    # A model of the harness refers to itself: what was scored before may still hold its memory.
    gc.collect()
    torch.cuda.empty_cache()  # without a GPU it does nothing
    models = {
        name: language_models.language_model(folder, settings, chat, seed)
        for name, folder in folders.items()
    }
    rows = measure_in_turns(
        {name: partial(_time_once, lm.model, seed) for name, lm in models.items()}, settings.speed
    )
    runs = _solve_in_turns(models, settings, seed)
    measured = {
        name: {
            "params": dimensions.static_cost(folder).params,
            "speed": rows[name],
            **_solving_speed(runs[name]),
        }
        for name, folder in folders.items()
    }
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    # All models have answered the same items.
    scores = next(iter(runs.values()))
    return {
        "device": str(torch.cuda.get_device_name()) if torch.cuda.is_available() else cpu,
        "task": scores[0].task if scores else "",
        "items": scores[0].items if scores else 0,
        "samples": scores[0].samples if scores else 0,
        "batch_size": settings.batch_size,
        "prompt_tokens": Speed.prompt_tokens,
        "new_tokens": Speed.new_tokens,
        "repeats": settings.speed.repeats,
        "models": measured,
        "seconds": time.monotonic() - started,
    }


def _solve_in_turns(models: Models, settings: Evaluate, seed: int) -> dict[str, list[TaskScore]]:
    """The first task's first items, answered by every model in every repeat; no runs where there is no accuracy."""
    runs: dict[str, list[TaskScore]] = {name: [] for name in models}
    task = settings.tasks[0]
    specs = tasks.find(task.name)
    # Without right answers no problem is solved.
    if not all(tasks.is_accuracy(spec, task.metric) for spec in specs):
        return runs
    # A group's limit is that of each member. Of several samples each item has as many answers.
    items = Speed.items // (len(specs) * task.samples)
    limit = max(1, min(items, task.limit or items))
    first_items = task.model_copy(update={"limit": limit})
    turns = [*models.items()] * settings.speed.repeats
    for name, lm in tqdm(turns, desc="answering for the speed, model after model"):
        score, _ = score_task(lm, first_items, settings, seed=seed)
        if score.low is None:  # which the task's YAML did not say
            return runs
        runs[name].append(score)
    return runs


def _solving_speed(runs: list[TaskScore]) -> dict[str, Any]:
    """Seconds per solved problem of one model, from the same items in every repeat."""
    if not runs:
        return {"seconds_per_solved": None, "solved": 0, "answer_tokens": 0.0}
    last = runs[-1]
    solved = round(last.accuracy * last.items * last.samples)
    seconds = statistics.median(run.seconds for run in runs)
    return {
        "seconds_per_solved": seconds / solved if solved else None,
        "solved": solved,
        "answer_tokens": last.answer_tokens,
    }


def rows(speed: Metadata) -> list[Row]:
    """One for each measure, formatted; none where nothing was measured."""
    if "models" not in speed:
        return []
    dense, final = speed["models"]["dense"], speed["models"]["final"]
    measures = []
    for phase in PHASES:
        for old, new in zip(dense["speed"], final["speed"], strict=True):
            before, after = (row[f"{phase}_tokens_per_s"] for row in (old, new))
            label = f"{phase.capitalize()}, batch {old['batch']} (tokens/s)"
            measures.append(_row(label, before, after, after / before))
    # Seconds: less is faster. None where a model solved nothing.
    before, after = dense["seconds_per_solved"], final["seconds_per_solved"]
    if before and after:
        scale, unit = (1, "s") if max(before, after) >= 1 else (1000, "ms")
        measures.append(
            _row(f"Solved problem ({unit})", before * scale, after * scale, before / after)
        )
    return measures


def _row(label: str, dense: float, final: float, times: float) -> Row:
    return label, _digits(dense), _digits(final), f"{times:.2f} times as fast"


def _digits(value: float) -> str:
    """Three significant digits below 1,000, whole numbers above."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def setting(speed: Metadata) -> str:
    """How it was measured."""
    if not rows(speed):
        return ""
    template = SETTING + SOLVING if speed["items"] else SETTING
    times = f", {speed['samples']} answers each," if speed["samples"] > 1 else ""
    return template.format(**speed, **speed["models"], times=times)


def metrics(models: dict[str, Any]) -> dict[str, float]:
    """MLflow's metrics of the `models` of speed.side_by_side."""
    numbers = {}
    for name, model in models.items():
        for row in model["speed"]:
            for field in (f"{phase}_tokens_per_s" for phase in PHASES):
                numbers[f"speed/{name}/{field}/batch_{row['batch']}"] = row[field]
        # None where nothing was solved: MLflow takes numbers only.
        if model["seconds_per_solved"] is not None:
            numbers[f"speed/{name}/seconds_per_solved"] = model["seconds_per_solved"]
    return numbers
