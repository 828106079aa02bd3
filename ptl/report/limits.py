"""What a run did not compare, in sentences: what a reader must not conclude from the evidence."""

from __future__ import annotations

from ptl.config.schedule import removal
from ptl.evaluation import speed_rows
from ptl.evaluation.paired import factor_to_decide, smallest_inferior_drop
from ptl.report import answer, cells, goal
from ptl.report.result import Result, amount, control_row, dense_row, final_row
from ptl.report.result_rows import Row
from ptl.report.wording import control_failed
from ptl.units import counted

SHORT_OF_TARGET = 0.005  # of the dense model's parameters, from which a run counts as ended early


def sentences(result: Result) -> list[str]:
    """The most important first: what was scored, by how many items, against what, and on which machine."""
    dense = dense_row(result)
    final = final_row(result)
    lines = [_target(result), _benchmarks(dense)]
    if final is not None and final is not dense:
        lines += [_items(result, task) for task in final["scores"]["tasks"]]
        lines += _token_limits(dense, final)
    lines += [
        _chosen_items(result),
        _control(result),
        _gate(result),
        _speed(result),
        _decontamination(result),
        _cut(result),
        *(f"{warning}." for warning in amount(result).warnings()),
    ]
    lines.append(f"One run with seed {result['seed']}: another seed may end with another score.")
    return list(filter(None, lines))


def _target(result: Result) -> str:
    """A loop that ended before its target, or its goal."""
    asked_goal = result["goal"]
    if asked_goal:
        return "" if asked_goal.get("reached") else goal.sentence(asked_goal)
    original = result["original_params"]
    asked = removal(original, result["settings"]["schedule"]["target"]) / original
    removed = result["final"]["share_removed"]
    if removed >= asked - SHORT_OF_TARGET:
        return ""
    shares = f"{cells.percent(removed)} of the parameters were removed, not {cells.percent(asked)}"
    return f"The target was not reached: {shares}."


def _benchmarks(dense: Row) -> str:
    names = [task["task"] for task in dense["scores"]["tasks"]]
    if len(names) == 1:
        return f"Only one benchmark was scored, {names[0]}: nothing is known of any other task."
    return f"Only {len(names)} benchmarks were scored: nothing is known of any other task."


def _items(result: Result, task: Row) -> str:
    """The drop that the items of a benchmark can show; of one that has no right and wrong answers, that it has none."""
    name = task["task"]
    pair = answer.dense_pair(result, name)
    if pair is None:
        return f"The change on {name} was not tested: it was not compared item by item."
    if answer.is_unsolved(pair):
        return (
            f"The dense model solves {answer.solved(pair)} of {name}: a score so low cannot fall by more than the "
            f"margin of {cells.margin(pair)}, so nothing is shown there."
        )
    items = f"{counted(pair['items'], 'item')} of {name}"
    counts = (pair["improvements"], pair["items"])
    improvements = counted(pair["improvements"], "improvement")
    # What the test can show, whatever is tolerated.
    visible = smallest_inferior_drop(*counts, 0, pair["alpha"])
    if visible is None:
        return f"{items} are too few to show any drop."
    if visible > pair["margin"]:
        return (
            f"{items} are too few to see a drop of the margin of {cells.margin(pair)}: beside {improvements}, the "
            f"smallest drop that they show is {cells.points(visible)}.{_more_items(pair)}"
        )
    drop = smallest_inferior_drop(*counts, pair["margin"], pair["alpha"])
    return f"With {items}, a drop below {cells.points(drop or 1)} is not called worse.{_more_items(pair)}"


def _more_items(pair: Row) -> str:
    """How many items would have given a verdict."""
    if pair["verdict"] != "unclear":
        return ""
    factor = factor_to_decide(*(pair[key] for key in ("regressions", "improvements", "items", "margin", "alpha")))
    return f" If the same share of items changed, {factor} times as many would decide." if factor else ""


def _token_limits(dense: Row, final: Row) -> list[str]:
    """Answers and prompts that were truncated, and code that ran out of time, of either model."""
    lines = []
    for before, after in zip(dense["scores"]["tasks"], final["scores"]["tasks"], strict=True):
        name = before["task"]
        shares = {
            "answers hit the token limit": "truncated",
            "prompts did not fit into the context": "cut_prompts",
        }
        for words, key in shares.items():
            if before[key] or after[key]:
                values = (
                    f"{cells.percent(after[key])} of the final model's {words} (dense: {cells.percent(before[key])})"
                )
                lines.append(f"On {name}, {values}.")
        if before["code_timeouts"] or after["code_timeouts"]:
            counts = f"{after['code_timeouts']} of the final model's answers (dense: {before['code_timeouts']})"
            lines.append(f"On {name}, {counts} count as wrong because their code ran out of time.")
    return lines


def _chosen_items(result: Result) -> str:
    """The first N items of each benchmark with a limit."""
    limits = [task.get("limit") for task in result["settings"]["evaluate"]["tasks"]]
    scored = dense_row(result)["scores"]["tasks"]
    limited = [task["task"] for task, limit in zip(scored, limits, strict=True) if limit]
    if not limited:
        return ""
    return f"Only the first items were scored of {', '.join(limited)} (limit in evaluate.tasks)."


def _control(result: Result) -> str:
    if control_row(result) is not None:
        return ""
    return control_failed(result) or "There was no control: the loop was not compared with one-shot pruning."


def _gate(result: Result) -> str:
    """A gate that accepts by the benchmark's items has chosen by them."""
    verdicts = [row["verdict"] for row in result["rows"]]
    if "rejected" not in verdicts or "accepted" not in verdicts:
        return ""
    name = cells.first_task(dense_row(result))["task"]
    return f"The gate chose the final model by the same items of {name}: new items may show a larger drop."


def _speed(result: Result) -> str:
    """Speed that was not measured, or not on a GPU, or beside other work."""
    speed = result["speed"]
    if not speed_rows.rows(speed):
        return f"Speed was not measured: {speed['reason']}." if speed else "Speed was not measured."
    disturbed = speed_rows.disturbance(speed)
    if not speed["device"].startswith("CPU"):
        return disturbed
    return f"Speed was measured on {speed['device']}, not on a GPU. {disturbed}".rstrip()


def _decontamination(result: Result) -> str:
    if result["decontaminated"]:
        return ""
    return "Training rows were not compared with the benchmarks (training.decontaminate): some may contain their items."


def _cut(result: Result) -> str:
    """Sequences of the training whose ends were not trained on."""
    counts = result["sequences"]
    if not counts.get("cut_sequences"):
        return ""
    return (
        f"{counts['cut_sequences']:,} of {counted(counts['sequences'], 'training sequence')} were cut at "
        "recover.max_length: the model was not trained on their ends."
    )
