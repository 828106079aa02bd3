"""A result in sentences: verdict, notes and captions, which claim no more than the numbers."""

from __future__ import annotations

from typing import Any

from ptl import decontaminate, speeds
from ptl.cells import accuracy, comparison, first_task, is_share, level, percent, points
from ptl.plots import begins_at_zero
from ptl.result import Result, Row, control_row, dense_row, final_row, overlap, total_tokens, work_seconds
from ptl.units import MINUTE, duration

SAME_SIZE = 0.005  # relative difference of parameters below which two models count as equally large


def verdict(result: Result) -> str:
    """The run in one sentence: it claims no more than the numbers."""
    sentence = _headline(result)
    if result.get("control_failed"):
        return sentence.removesuffix(".") + "; the control arm did not finish."
    return sentence


def _headline(result: Result) -> str:
    dense, final = dense_row(result), final_row(result)
    share = percent(result["final"]["share_removed"])
    if final is None or dense is None:
        return f"{share} of the parameters were removed; the final checkpoint or the dense model was not scored."
    task = first_task(dense)
    before, after = accuracy(task), accuracy(first_task(final))
    metric = "accuracy" if is_share(task) else task["metric"].partition(",")[0]
    if final is dense:
        return f"No iteration passed: the final checkpoint is the dense model, at {before} {metric}."
    sentence = f"Removing {share} of the parameters took {metric} from {before} to {after}"
    paired = result["paired"].get("dense")
    if paired and paired["verdict"] == "inferior":
        sentence += f": inferior to the dense model (margin {100 * paired['margin']:g} points)"
    control = control_row(result)
    if control is not None:
        sentence += f"; {_beside_control(result, final, control)}"
    return sentence + "."


def _beside_control(result: Result, final: Row, control: Row) -> str:
    """The one-shot control's score, and whether the loop's is better."""
    one_shot = f"one-shot pruning reached {accuracy(first_task(control))}"
    if abs(control["params"] / final["params"] - 1) > SAME_SIZE:
        one_shot += f" with {percent(control['share_removed'])} removed"
    gain = _gain(final, control)
    if gain == 0:
        return f"{one_shot}, the same"
    if _may_be_chance(result):
        p = result["paired"]["control"]["p_different"]
        return f"{one_shot}: the difference is not significant (p {p:.2g})"
    size = points(abs(gain)) if is_share(first_task(final)) else f"{abs(gain):.3g}"
    if gain < 0:
        return f"{one_shot}: the control is {size} better than the loop"
    return f"{one_shot}, {size} worse than the loop"


def _gain(final: Row, control: Row) -> float:
    """How much better the loop's final model scored than the control."""
    difference: float = final["accuracy"] - control["accuracy"]
    higher_is_better = first_task(final).get("higher_is_better", True)
    return difference if higher_is_better else -difference


def _may_be_chance(result: Result) -> bool:
    """Whether the difference between loop and control was tested and is not significant."""
    paired = result["paired"].get("control")
    significance_level = 1 - result["confidence"]
    return bool(paired and paired["p_different"] > significance_level)


def notes(result: Result) -> list[str]:
    """What a careful reader asks next: do the intervals overlap, were the tokens equal, what was thrown away."""
    sentences = []
    if result.get("control_failed"):
        sentences.append(f"The control arm did not finish: {result['control_failed']}.")
    sentences += _comparisons(result)
    sentences += _about_control(result)
    sentences += _about_gate(result)
    for reason, iterations in not_needed(result):
        numbers = ", ".join(map(str, iterations))
        sentences.append(f"Not needed: iteration {numbers} ({reason}).")
    if result.get("decontaminated"):
        sentences.append(decontaminate.sentence(result["decontaminated"]))
    sentences.append(speeds.words(result.get("speed") or {}))
    sentences.append(wall_clock(result))
    return [sentence for sentence in sentences if sentence]


def _comparisons(result: Result) -> list[str]:
    """The final model against the dense one and against the control."""
    dense, final, control = dense_row(result), final_row(result), control_row(result)
    if final is None or final is dense:
        return []
    sentences = []
    for label, name, other in (("dense", "the dense model", dense), ("control", "the control", control)):
        paired = result["paired"].get(label)
        if other is None:
            continue
        if paired:
            sentences.append(f"Final against {name}, item by item: {comparison(paired)}.")
        elif overlap(final, other) is not None:
            overlapping = "overlap" if overlap(final, other) else "do not overlap"
            sentences.append(f"Final and {name}: the {level(result)} intervals {overlapping}.")
    return sentences


def _about_control(result: Result) -> list[str]:
    final, control = final_row(result), control_row(result)
    sentences = []
    loop_tokens = total_tokens(result, "loop")
    control_tokens = total_tokens(result, "control")
    if control and loop_tokens != control_tokens:
        tokens = f"loop {loop_tokens:,}, control {control_tokens:,}"
        sentences.append(f"The arms had different recovery tokens: {tokens}.")
    if final and control and _gain(final, control) < 0 and not _may_be_chance(result):
        sentences.append(f"The control's checkpoint: ptl fetch {result['run_id']} DIR --arm control")
    return sentences


def _about_gate(result: Result) -> list[str]:
    sentences = []
    num_rejected = sum(row["verdict"] == "rejected" for row in result["rows"])
    if num_rejected:
        iterations = "1 iteration" if num_rejected == 1 else f"{num_rejected} iterations"
        sentences.append(f"The gate rejected {iterations}; the next began from the last accepted.")
    gate = result["settings"].get("gate") or {}
    if not gate.get("enabled", True):
        sentences.append("The gate was off: no iteration was tested before the next began.")
    return sentences


def not_needed(result: Result) -> list[tuple[str, list[int]]]:
    """Why iterations of the plan were passed through, and which: reason -> iterations."""
    by_reason: dict[str, list[int]] = {}
    for step in result.get("not_needed") or ():
        iterations = by_reason.setdefault(step["reason"], [])
        if step["iteration"] not in iterations:
            iterations.append(step["iteration"])
    return list(by_reason.items())


def wall_clock(result: Result) -> str:
    """How long the run took from start to end, beside the summed work of its steps where the two differ."""
    wall = result.get("wall_seconds")
    if wall is None:
        return ""
    work = work_seconds(result)
    idle = result.get("idle_seconds") or 0.0
    # Below a minute two durations count as the same.
    if abs(wall - work) < MINUTE and idle < MINUTE:
        return f"Wall clock: {duration(wall)}."
    summed = f"the work of all steps adds up to {duration(work)}"
    if idle < MINUTE:
        return f"Wall clock: {duration(wall)}; {summed}."
    return (
        f"Wall clock, pauses included: {duration(wall)}, {duration(idle)} of it between the steps (pauses, start-up, "
        f"failed attempts); {summed}, without loading libraries and checkpoints."
    )


def table_caption(result: Result) -> str:
    """What the main table's numbers are; nothing about columns and marks that it does not have."""
    rows = result["rows"]
    if not rows:
        return ""
    sentences = [_metric(first_task(rows[0]))]
    if any(row["recovery_tokens"] for row in rows):
        sentences.append("Recovery tokens are those of each iteration alone.")
    bounds = [row["low"] for row in rows if row["low"] is not None]
    if bounds and min(bounds) > 0:
        sentences.append("The drawn intervals share one scale that does not begin at zero.")
    elif bounds:
        sentences.append("The drawn intervals share one scale.")
    return " ".join(sentences)


def _metric(task: dict[str, Any]) -> str:
    """Which metric the scores are, on which version of which task."""
    metric = task.get("metric") or "accuracy"
    sentence = f"Accuracy is {metric}" if is_share(task) else f"The score is {metric}"
    sentence += f" on {task['task']}"
    if task.get("version"):
        sentence += f", version {task['version']}"
    if task.get("num_fewshot") is not None:
        sentence += f", {task['num_fewshot']}-shot"
    return sentence + "."


def accuracy_caption(result: Result) -> str:
    """What is seen in the chart of scores against parameters."""
    rows = result["rows"]
    sentences = []
    if any(row["low"] is not None for row in rows):
        sentences.append(f"Bars are {level(result)} intervals.")
    if rows and not begins_at_zero(rows):
        sentences.append("The vertical axis does not begin at zero.")
    if final_row(result) is not None:
        sentences.append("The ringed mark is the final checkpoint.")
    if control_row(result) is not None:
        sentences.append("The control is drawn a little to the right of its size.")
    return " ".join(sentences)


def loss_caption(result: Result) -> str:
    """What is seen in the chart of losses."""
    stages = result["settings"].get("recover") or ()
    caption = "Training loss of each recovery"
    if any(stage.get("method") == "grpo" for stage in stages):
        caption += " (of GRPO its policy loss, which says little: the rewards are on the steps' pages in MLflow)"
    curves = result["curves"]
    if any(step["arm"] == "loop" and step["step"] in curves for step in result["steps"]):
        return caption + "; the numbers at the dotted lines are the iterations."
    return caption + "."
