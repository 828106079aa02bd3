"""A result in sentences: verdict, notes and captions, which claim no more than the numbers."""

from __future__ import annotations

from ptl.data import decontamination
from ptl.evaluation import speed_rows
from ptl.report import exports, goal
from ptl.report.cells import accuracy, comparison, first_task, is_share, level, metric_name, percent, points
from ptl.report.result import SAME_SIZE, Result, arm_rows, control_row, dense_row, final_row, total_tokens, work_seconds
from ptl.report.result_rows import Row
from ptl.report.score_plots import begins_at_zero
from ptl.units import MINUTE, duration


def verdict(result: Result) -> str:
    """The run in one sentence: it claims no more than the numbers."""
    sentence = _headline(result)
    if result["control_failed"]:
        sentence += "; the control arm did not finish"
    return sentence + "."


def _headline(result: Result) -> str:
    dense = dense_row(result)
    final = final_row(result)
    share = percent(result["final"]["share_removed"])
    # It is named without its score where its evaluation belongs to another checkpoint.
    if final is None:
        return f"{share} of the parameters were removed; the final checkpoint was not scored"
    task = first_task(dense)
    before = accuracy(task)
    # A perplexity is called by its name.
    metric = "accuracy" if is_share(task) else metric_name(task)
    if final is dense:
        return f"No iteration passed: the final checkpoint is the dense model, at {before} {metric}"
    after = accuracy(first_task(final))
    sentence = f"Removing {share} of the parameters took {metric} from {before} to {after}"
    control = control_row(result)
    if control is not None:
        beside = _beside_control(result, final, control)
        sentence += f"; {beside}"
    return sentence


def _beside_control(result: Result, final: Row, control: Row) -> str:
    """The one-shot control's score, and whether the loop's is better."""
    reached = accuracy(first_task(control))
    one_shot = f"one-shot pruning reached {reached}"
    # Where the loop stopped early, the control is smaller.
    ratio = control["params"] / final["params"]
    if abs(ratio - 1) > SAME_SIZE:
        share = percent(control["share_removed"])
        one_shot += f" with {share} removed"
    gain = _gain(final, control)
    if gain == 0:
        return f"{one_shot}, the same"
    p = _insignificant_p(result)
    if p is not None:
        return f"{one_shot}: the difference is not significant (p {p:.2g})"
    # Differences of shares are points, not percent.
    size = abs(gain)
    distance = points(size) if is_share(first_task(final)) else f"{size:.3g}"
    if gain < 0:
        return f"{one_shot}: the control is {distance} better than the loop"
    return f"{one_shot}, {distance} worse than the loop"


def _gain(final: Row, control: Row) -> float:
    """How much better the loop's final model scored than the control."""
    difference: float = final["accuracy"] - control["accuracy"]
    # Of a perplexity, less is better.
    higher_is_better = first_task(final)["higher_is_better"]
    return difference if higher_is_better else -difference


def _insignificant_p(result: Result) -> float | None:
    """p where the difference between loop and control was tested and is not significant; else None."""
    pair = result["paired"].get("control")
    if not pair:
        return None
    p: float = pair["p_different"]
    significance_level = 1 - result["confidence"]
    return p if p > significance_level else None


def notes(result: Result) -> list[str]:
    """What a reader of the terminal asks next, which the pages have as a table of evidence and its limits."""
    sentences = [goal.sentence(result["goal"])]
    sentences += [control_failed(result), *_comparisons(result), _tokens_in_all(result), *_about_control(result)]
    sentences += _about_gate(result)
    # Then a checkpoint can be final that is worse than the dense model.
    if not result["settings"]["gate"]["enabled"]:
        sentences.append("The gate was off: no iteration was tested before the next began.")
    if result["decontaminated"]:
        sentences.append(decontamination.sentence(result["decontaminated"]))
    sentences += [speed_rows.sentence(result["speed"]), *exports.sentences(result), wall_clock(result)]
    # Some have nothing to say.
    return list(filter(None, sentences))


def remarks(result: Result) -> list[str]:
    """What the pages say beside the table of evidence and its limits."""
    return [*_about_control(result), *_about_gate(result), wall_clock(result)]


def control_failed(result: Result) -> str:
    """Why the control has no score; empty where it has one, or there was none."""
    reason = result["control_failed"]
    return f"The control arm did not finish: {reason}." if reason else ""


def _comparisons(result: Result) -> list[str]:
    """The final model against the dense one and against the control."""
    final = final_row(result)
    dense = dense_row(result)
    if final is None or final is dense:
        return []
    sentences = [_comparison(result, "dense", "the dense model", final, dense)]
    control = control_row(result)
    if control is not None:
        sentences.append(_comparison(result, "control", "the control", final, control))
    return sentences


def _comparison(
    result: Result,
    key: str,
    name: str,
    final: Row,
    other: Row,
) -> str:
    """Item by item where the items are known, else by the intervals; empty where there are none."""
    pair = result["paired"].get(key)
    if pair:
        return f"Final against {name}, item by item: {comparison(pair)}."
    if final["low"] is None or other["low"] is None:
        return ""
    # The upper one begins where the lower one has ended.
    begin = max(final["low"], other["low"])
    end = min(final["high"], other["high"])
    disjoint = begin > end
    overlap = "do not overlap" if disjoint else "overlap"
    intervals = f"the {level(result)} intervals"
    return f"Final and {name}: {intervals} {overlap}."


def _tokens_in_all(result: Result) -> str:
    """The loop's tokens, of which a row of the table has those of one iteration; empty where the arms' differ."""
    tokens = total_tokens(result, "loop")
    if control_row(result) is None or tokens != total_tokens(result, "control"):
        return ""
    return f"Recovery tokens are of each iteration alone: the loop had {tokens:,} in all, the control as many."


def _about_control(result: Result) -> list[str]:
    """Whether the arms were trained equally, and how to fetch a control that is better."""
    final = final_row(result)
    control = control_row(result)
    if control is None:
        return []
    sentences = []
    # A control with more tokens would look better than pruning in one shot is.
    loop_tokens = total_tokens(result, "loop")
    control_tokens = total_tokens(result, "control")
    if loop_tokens != control_tokens:
        sentences.append(f"The arms had different recovery tokens: loop {loop_tokens:,}, control {control_tokens:,}.")
    # As the headline says it.
    is_better = final is not None and _gain(final, control) < 0
    if is_better and _insignificant_p(result) is None:
        sentences.append(f"The control's checkpoint: ptl fetch {result['run_id']} DIR --arm control")
    return sentences


def _about_gate(result: Result) -> list[str]:
    """What it rejected, and the iterations after the one that it ended the loop with."""
    sentences = []
    verdicts = [row["verdict"] for row in result["rows"]]
    num_rejected = verdicts.count("rejected")
    if num_rejected:
        plural = "s" if num_rejected > 1 else ""
        sentences.append(f"The gate rejected {num_rejected} iteration{plural}; the next began from the last accepted.")
    for reason, iterations in not_needed(result):
        numbers = ", ".join(map(str, iterations))
        sentences.append(f"Not needed: iteration {numbers} ({reason}).")
    return sentences


def not_needed(result: Result) -> list[tuple[str, list[int]]]:
    """Why iterations of the plan were passed through, and which: reason -> iterations."""
    by_reason: dict[str, list[int]] = {}
    for step in result["not_needed"]:
        iterations = by_reason.setdefault(step["reason"], [])
        # Each of its three steps is listed.
        if step["iteration"] not in iterations:
            iterations.append(step["iteration"])
    return list(by_reason.items())


def wall_clock(result: Result) -> str:
    """How long the run took from start to end, beside the summed work of its steps where the two differ."""
    wall = result["wall_seconds"]
    idle = result["idle_seconds"]
    work = work_seconds(result)
    # Below a minute two durations count as the same.
    difference = abs(wall - work)
    if difference < MINUTE and idle < MINUTE:
        return f"Wall clock: {duration(wall)}."
    # Longer: there were pauses. Shorter: the arms ran side by side.
    summed = f"the work of all steps adds up to {duration(work)}"
    if idle < MINUTE:
        return f"Wall clock: {duration(wall)}; {summed}."
    return (
        f"Wall clock, pauses included: {duration(wall)}, "
        f"{duration(idle)} of it between the steps (pauses, start-up, failed attempts); "
        f"{summed}, without loading libraries and checkpoints."
    )


def table_caption(result: Result, *, drawn: bool = True) -> str:
    """What the main table's numbers are; nothing about columns and marks that it does not have, as in Markdown."""
    rows = result["rows"]
    task = first_task(rows[0])
    sentences = [_about_task(task)]
    if any(row["recovery_tokens"] for row in rows):
        sentences.append("Recovery tokens are those of each iteration alone.")
    # Of a metric that is no accuracy only a row whose items all score 0 or 1 has an interval.
    lows = [row["low"] for row in rows if row["low"] is not None]
    if lows and drawn:
        # The bars would be too short to compare if it began at zero.
        zero = " that does not begin at zero" if min(lows) > 0 else ""
        sentences.append(f"The drawn intervals share one scale{zero}.")
    return " ".join(sentences)


def _about_task(task: Row) -> str:
    """Which metric the scores are, on which version of which task."""
    subject = "Accuracy" if is_share(task) else "The score"
    sentence = f"{subject} is {task['metric']} on {task['task']}"
    # Scores of another version are not comparable.
    return f"{sentence}, version {task['version']}, {task['num_fewshot']}-shot."


def accuracy_caption(result: Result) -> str:
    """What is seen in the chart of scores against parameters."""
    rows = result["rows"]
    sentences = []
    if any(row["low"] is not None for row in rows):
        sentences.append(f"Bars are {level(result)} intervals.")
    if not begins_at_zero(rows):
        sentences.append("The vertical axis does not begin at zero.")
    if final_row(result) is not None:
        sentences.append("The ringed mark is the final checkpoint.")
    if arm_rows(result, "control"):
        sentences.append("The control is drawn a little to the right of its size.")
    return " ".join(sentences)


def loss_caption(result: Result) -> str:
    """What is seen in the chart of losses."""
    caption = "Training loss of each recovery"
    methods = [stage["method"] for stage in result["settings"]["recover"]]
    if "grpo" in methods:
        caption += " (of GRPO its policy loss, which says little: the rewards are on the steps' pages in MLflow)"
    # Only the loop's curves are drawn one after another.
    loop_steps = [step for step in result["curves"] if not step.startswith("control")]
    if loop_steps:
        caption += "; the numbers at the dotted lines are the iterations"
    return caption + "."
