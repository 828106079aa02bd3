"""A result in sentences beside its tables: what the run checked itself, what it did not compare, and captions."""

from __future__ import annotations

from ptl.config.schedule import removal
from ptl.data import decontamination
from ptl.evaluation import speed_rows
from ptl.evaluation.paired import factor_to_decide, smallest_inferior_drop
from ptl.report.numbers import margin, percent
from ptl.report.result import Goal, Result, Row
from ptl.report.verdict import gain_on_control
from ptl.units import counted, duration, memory_beside, numbered

SHORT_OF_TARGET = 0.005  # of the dense model's parameters, from which a run counts as ended early
NO_CONTROL = "There was no control: the loop was not compared with one-shot pruning."
NOT_DECONTAMINATED = (
    "Training rows were not compared with the benchmarks (training.decontaminate): some may contain their items."
)


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
    needed, dense, excess = (
        memory_beside(number, goal.memory) for number in (goal.final, goal.dense, max(0, goal.final - goal.bytes))
    )
    # Both sizes may be the same when rounded.
    outcome, too_much = ("reached", "") if goal.is_reached else ("not reached", f" ({excess} too much)")
    return (
        f"Goal {outcome}: the final model needs {needed}{too_much} for weights and a KV cache for "
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
    accepted, rejected = (f"{counted(verdicts.count(word), 'iteration')} {word}" for word in ("accepted", "rejected"))
    sentence = f"{accepted}, {rejected} (margin {margin(settings['margin'])})"
    by_reason: dict[str, list[int]] = {}
    for iteration, reason in {step.iteration: step.reason for step in result.not_needed}.items():
        by_reason.setdefault(reason, []).append(iteration)
    for reason, iterations in by_reason.items():
        sentence += f"; not needed: {numbered('iteration', iterations)} ({reason})"
    # Otherwise an accepted model may be one of which nothing can be said.
    return f"{sentence}." if settings["strict"] else f"{sentence}. Unclear ones are accepted: gate.strict is off."


def _control(result: Result) -> str:
    """Whether it finished, and whether the arms were trained equally; how to fetch one that is better."""
    final, control = result.final_row, result.control_row
    if control is None:
        return _control_failed(result)
    loop_tokens, control_tokens = result.total_tokens("loop"), result.total_tokens("control")
    sentence = f"As many recovery tokens as the loop: {loop_tokens:,}."
    # A control with more tokens would look better than pruning in one shot is.
    if loop_tokens != control_tokens:
        sentence = f"The arms had different recovery tokens: loop {loop_tokens:,}, control {control_tokens:,}."
    pair = result.pair("control")
    is_chance = pair is not None and pair.p_different > 1 - result.confidence
    if final is not None and gain_on_control(final, control) < 0 and not is_chance:
        sentence += f" The control's checkpoint: ptl fetch {result.run_id} DIR --arm control"
    return sentence


def _control_failed(result: Result) -> str:
    return f"The control arm did not finish: {result.control_failed}." if result.control_failed else ""


def limits(result: Result) -> list[str]:
    """What a reader must not conclude; the most important first: what was scored, by how many items, against what."""
    dense, final = result.dense_row, result.final_row
    count = counted(len(result.tasks), "benchmark")
    names = f"benchmark was scored, {result.tasks[0]}" if len(result.tasks) == 1 else f"{count} were scored"
    sentences = [
        _target(result),
        f"Only {'one ' * (len(result.tasks) == 1)}{names}: nothing is known of any other task.",
    ]
    if final is not None and final is not dense:
        sentences += [_items(result, task) for task in result.tasks]
        sentences += _token_limits(dense, final)
    sentences += [
        _chosen_items(result),
        (_control_failed(result) or NO_CONTROL) if result.control_row is None else "",
        _chosen_by_gate(result),
        _speed(result),
        "" if result.decontaminated else NOT_DECONTAMINATED,
        _cut_sequences(result),
        *(f"{warning}." for warning in result.amount.warnings()),
        f"One run with seed {result.seed}: another seed may end with another score.",
    ]
    return list(filter(None, sentences))


def _target(result: Result) -> str:
    """A loop that ended before its target, or its goal."""
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
    sentence = f"With {items}, a drop below {drop * 100:.1f} points is not called worse."
    if pair.verdict != "unclear":
        return sentence
    # How many items would have given a verdict.
    factor = factor_to_decide(pair.regressions, pair.improvements, pair.items, pair.margin, pair.alpha)
    return (
        f"{sentence} If the same share of items changed, {factor} times as many would decide." if factor else sentence
    )


def _token_limits(dense: Row, final: Row) -> list[str]:
    """Answers and prompts that were truncated, and code that ran out of time, of either model."""
    sentences = []
    for before, after in zip(dense.scores.tasks, final.scores.tasks, strict=True):
        shares = {
            "answers hit the token limit": (before.truncated, after.truncated),
            "prompts did not fit into the context": (before.cut_prompts, after.cut_prompts),
        }
        for words, (old, new) in shares.items():
            if old or new:
                share = f"{percent(new)} of the final model's {words} (dense: {percent(old)})"
                sentences.append(f"On {before.task}, {share}.")
        if before.code_timeouts or after.code_timeouts:
            counts = f"{after.code_timeouts} of the final model's answers (dense: {before.code_timeouts})"
            sentences.append(f"On {before.task}, {counts} count as wrong because their code ran out of time.")
    return sentences


def _chosen_items(result: Result) -> str:
    """The first N items of each benchmark with a limit."""
    settings = result.settings["evaluate"]["tasks"]
    limited = [task for task, asked in zip(result.tasks, settings, strict=True) if asked.get("limit")]
    return f"Only the first items were scored of {', '.join(limited)} (limit in evaluate.tasks)." if limited else ""


def _chosen_by_gate(result: Result) -> str:
    """A gate that accepts by the benchmark's items has chosen by them."""
    if not {"rejected", "accepted"} <= {row.verdict for row in result.rows}:
        return ""
    return f"The gate chose the final model by the same items of {result.tasks[0]}: new items may show a larger drop."


def _speed(result: Result) -> str:
    """Speed that was not measured, or not on a GPU, or beside other work."""
    speed = result.speed
    if not speed_rows.rows(speed):
        return f"Speed was not measured: {speed['reason']}." if speed else "Speed was not measured."
    disturbed = speed_rows.disturbance(speed)
    if not speed["device"].startswith("CPU"):
        return disturbed
    return f"Speed was measured on {speed['device']}, not on a GPU. {disturbed}".rstrip()


def _cut_sequences(result: Result) -> str:
    """Sequences of the training whose ends were not trained on."""
    counts = result.sequences
    if not counts.cut_sequences:
        return ""
    return (
        f"{counts.cut_sequences:,} of {counted(counts.sequences, 'training sequence')} were cut at recover.max_length: "
        "the model was not trained on their ends."
    )
