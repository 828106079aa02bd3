"""A result in sentences beside its tables: what the run checked itself, and what its scores do not show."""

from __future__ import annotations

from ptl.config.schedule import removal
from ptl.data import decontamination
from ptl.evaluation.paired import smallest_inferior_drop
from ptl.report.numbers import margin, percent
from ptl.report.result import Goal, Result, Row
from ptl.report.verdict import beside_control
from ptl.units import counted, duration, memory_beside, numbered

SHORT_OF_TARGET = 0.005  # of the dense model's parameters, from which a run counts as ended early


def checks(result: Result) -> list[tuple[str, str]]:
    """What the run itself looked after, such as its goal, the gate, and training rows that are in a benchmark."""
    found = result.decontaminated
    wall = f"{duration(result.wall_seconds)}; the work of all steps adds up to {duration(result.work_seconds)}"
    lines = [
        ("Target", _goal(result.goal) if result.goal else ""),
        ("Gate", _gate(result)),
        ("Recovery", result.amount.sentence),
        ("Control", _control(result)),
        ("Decontamination", decontamination.sentence(found.model_dump()) if found else ""),
        *((f"Export {export.name}", f"Not made: {export.failed}.") for export in result.exports if export.failed),
        ("Wall clock", f"{wall}."),
    ]
    return [(label, text) for label, text in lines if text]


def _goal(goal: Goal) -> str:
    """What was asked and what was reached."""
    if goal.final is None:
        return "Whether the goal is reached is not known: the final checkpoint was not scored."
    needed, dense = memory_beside(goal.final, goal.memory), memory_beside(goal.dense, goal.memory)
    # Both sizes may be the same when rounded.
    outcome = "reached" if goal.is_reached else "not reached"
    return (
        f"Goal {outcome}: the final model needs {needed} for weights and a KV cache for "
        f"{counted(goal.sequences, 'sequence')} of {goal.tokens:,} tokens in {goal.dtype}, the dense one {dense}; the "
        f"goal is {goal.memory}."
    )


def _gate(result: Result) -> str:
    """What it decided, or that it was off."""
    settings = result.settings["gate"]
    # Then a checkpoint can be final that is worse than the dense model.
    if not settings["enabled"]:
        return "Off: no iteration was tested before the next began."
    verdicts = [row.verdict for row in result.rows]
    accepted = counted(verdicts.count("accepted"), "iteration")
    rejected = counted(verdicts.count("rejected"), "iteration")
    sentence = f"{accepted} accepted, {rejected} rejected (margin {margin(settings['margin'])})"
    if result.not_needed:
        first, last = result.not_needed[0], result.not_needed[-1]
        iterations = range(first.iteration, last.iteration + 1)
        sentence += f"; not needed: {numbered('iteration', iterations)} ({first.reason})"
    # Otherwise an accepted model may be one of which nothing can be said.
    return f"{sentence}." if settings["strict"] else f"{sentence}. Unclear ones are accepted: gate.strict is off."


def _control(result: Result) -> str:
    """Whether it finished, and whether the arms were trained equally; how to fetch one that is better."""
    if result.control_row is None:
        return f"The control arm did not finish: {result.control_failed}." if result.control_failed else ""
    # A control with more tokens would look better than pruning in one shot is.
    sentence = f"Recovery tokens: loop {result.total_tokens('loop'):,}, control {result.total_tokens('control'):,}."
    if beside_control(result.pair("control"), result.confidence).kind != "bad":
        return sentence
    return f"{sentence} The control's checkpoint: ptl fetch {result.run_id} DIR --arm control"


def scored_too_little(result: Result) -> list[str]:
    """What the scores do not show: the drops that their items hide, answers that were cut off, items left out."""
    dense, final = result.dense_row, result.final_row
    sentences = []
    if final is not None and final is not dense:
        sentences += [_items(result, task) for task in result.tasks]
        sentences += _token_limits(dense, final)
    asked = result.settings["evaluate"]["tasks"]
    limited = [task for task, settings in zip(result.tasks, asked, strict=True) if settings.get("limit")]
    if limited:
        sentences.append(f"Only the first items were scored of {', '.join(limited)} (limit in evaluate.tasks).")
    for warning in result.amount.warnings():
        sentences.append(f"{warning}.")
    return sentences


def short_of_target(result: Result) -> str:
    """That a loop ended before its target, or its goal; else empty."""
    if result.goal:
        return "" if result.goal.is_reached else _goal(result.goal)
    asked = removal(result.original_params, result.settings["schedule"]["target"]) / result.original_params
    removed = result.final.share_removed
    if removed >= asked - SHORT_OF_TARGET:
        return ""
    return f"The target was not reached: {percent(removed)} of the parameters were removed, not {percent(asked)}."


def _items(result: Result, task: str) -> str:
    """The drop that the items of a benchmark can show; of one that has no right and wrong answers, that it has none."""
    pair = result.pair("dense", task)
    if pair is None:
        return f"The change on {task} was not tested: it was not compared item by item."
    items = f"{counted(pair.items, 'item')} of {task}"
    drop = smallest_inferior_drop(pair.improvements, pair.items, pair.margin, pair.alpha)
    if drop is None or drop > pair.reference:
        return f"{items} are too few to show any drop, or the dense model solves too few of them."
    return f"With {items}, a drop below {drop * 100:.1f} points is not called worse."


def _token_limits(dense: Row, final: Row) -> list[str]:
    """Answers and prompts that were truncated, and code that ran out of time, of either model."""
    sentences = []
    for before, after in zip(dense.scores.tasks, final.scores.tasks, strict=True):
        counts = (
            ("answers hit the token limit", percent(before.truncated), percent(after.truncated)),
            ("prompts did not fit into the context", percent(before.cut_prompts), percent(after.cut_prompts)),
            ("answers are wrong because their code ran out of time", before.code_timeouts, after.code_timeouts),
        )
        for words, old, new in counts:
            if old not in (0, "0.0 %") or new not in (0, "0.0 %"):
                sentences.append(f"On {before.task}, {new} of the final model's {words} (dense: {old}).")
    return sentences
