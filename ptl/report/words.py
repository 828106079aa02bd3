"""A result in words: numbers as they are printed, verdicts that promise no more than the tests, and sentences.

This is the one place that words a verdict. The sentences are beside the tables: what the run checked itself, and what
its scores do not show.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ptl.config.rehearsal import is_rehearsal
from ptl.config.schedule import removal
from ptl.data import decontamination
from ptl.evaluation import retention
from ptl.evaluation.paired import Paired, hidden_drop
from ptl.evaluation.scoring import TaskScore
from ptl.report.result import Result, Row
from ptl.units import counted, duration, listed, numbered

Kind = Literal["good", "bad", "unclear", "none"]  # how the pages colour it
REHEARSAL = "Cannot be said: this was a rehearsal, with about 1 % of the work, and no number counts"
WORST_FIRST: tuple[Kind, ...] = ("bad", "unclear", "none", "good")
SAME_SIZE = 0.005  # relative difference of parameters below which two models count as equally large
SHORT_OF_TARGET = 0.005  # of the dense model's parameters, from which a run counts as ended early


def is_share(task: TaskScore) -> bool:
    """Whether a score is a share of items, shown in percent; perplexities and other means have no interval."""
    return task.low is not None and 0 <= task.accuracy <= 1


def metric(task: TaskScore) -> str:
    """The metric without its filter: `exact_match` of `exact_match,final-number`."""
    return task.metric.partition(",")[0]


def avg_at(task: TaskScore) -> str:
    """What a score of several samples is called, else empty."""
    return f"avg@{task.samples}, " if task.samples > 1 else ""


def percent(share: float) -> str:
    """0.981 -> `98.1 %`."""
    return f"{share * 100:.1f} %"


def accuracy(task: TaskScore) -> str:
    """A score without its interval: percent where it is a share."""
    return percent(task.accuracy) if is_share(task) else f"{task.accuracy:.4g}"


def interval(task: TaskScore) -> str:
    """The interval of a score, in percent where it is a share; empty where it has none."""
    if task.low is None or task.high is None:
        return ""
    if is_share(task):
        return f"{task.low * 100:.1f} to {task.high * 100:.1f}"
    return f"{task.low:.4g} to {task.high:.4g}"


def score(task: TaskScore) -> str:
    """A score with its interval."""
    return f"{accuracy(task)} ({interval(task)})" if task.low is not None else accuracy(task)


def signed_points(difference: float) -> str:
    """-0.016 -> `-1.6`."""
    return f"{100 * difference:+.1f}"


def margin(share: float) -> str:
    """The drop that is tolerated: `2 points`."""
    return f"{100 * share:g} points"


class Verdict(NamedTuple):
    """A verdict for a reader."""

    kind: Kind
    text: str  # without a full stop


def first_line(result: Result) -> str:
    """How the report begins: whether the final model may be shipped, and by which scores."""
    return f"{overall(result).text}. {headline(result)}"


def overall(result: Result) -> Verdict:
    """Of all benchmarks together: the worst verdict comes first and gives the colour."""
    final = result.final_row
    if is_rehearsal(result.settings["name"], result.settings["storage"]["experiment"]):
        return Verdict("unclear", REHEARSAL)
    if final is None:
        return Verdict("unclear", "Cannot be said: the final checkpoint was not scored")
    if final is result.dense_row:
        return Verdict("none", "Nothing to ship: the final checkpoint is the dense model")
    benchmarks: dict[Verdict, list[str]] = {}
    for task in result.tasks:
        pair = result.pair("dense", task)
        items = f"{counted(pair.items, 'item')} of " if pair else ""
        benchmarks.setdefault(of_pair(pair, "the dense model"), []).append(f"{items}{task}")
    worst, *others = sorted(benchmarks, key=lambda verdict: WORST_FIRST.index(verdict.kind))
    text = f"{worst.text} on {listed(benchmarks[worst])}"
    for verdict in others:
        # It continues the sentence.
        continued = verdict.text[0].lower() + verdict.text[1:]
        text += f"; {continued} on {listed(benchmarks[verdict])}"
    return Verdict(worst.kind, text)


def of_pair(pair: Paired | None, reference: str) -> Verdict:
    """On one benchmark; `reference` names the other model: `the dense model`."""
    if pair is None:
        return Verdict("unclear", "Not tested")
    tolerated = f"the margin of {margin(pair.margin)}"
    if pair.verdict == "inferior":
        return Verdict("bad", f"Worse than {reference}")
    if pair.verdict == "not inferior":
        return Verdict("good", f"Not worse than {reference} within {tolerated}")
    if pair.p_worse <= pair.alpha:
        return Verdict(
            "unclear", f"The score fell, and whether by more than {tolerated} cannot be said"
        )
    return Verdict("unclear", f"Cannot be said whether the score fell by more than {tolerated}")


def beside_control(pair: Paired | None, confidence: float) -> Verdict:
    """Whether the loop is better or worse than its control, by the two-sided test at the run's confidence level."""
    if pair is None:
        return Verdict("unclear", "Not tested")
    if pair.p_different > 1 - confidence:
        return Verdict("unclear", "No difference shown")
    return (
        Verdict("good", "Final better") if pair.difference > 0 else Verdict("bad", "Control better")
    )


def headline(result: Result) -> str:
    """The scores of the run in one sentence."""
    sentence = _scores(result)
    if result.control_failed:
        sentence += "; the control arm did not finish"
    for position, task in enumerate(result.tasks):
        if result.final_row and result.rambles(task):
            before, after = (
                row.scores.tasks[position].answer_tokens
                for row in (result.dense_row, result.final_row)
            )
            sentence += f"; it rambles on {task}: {after:,.0f} tokens an answer in the place of {before:,.0f}"
    if result.retained and result.forgets:
        sentence += f"; it forgets other text: {retention.describe(result.retained)}"
    return f"{sentence}."


def _scores(result: Result) -> str:
    dense, final, control = result.dense_row, result.final_row, result.control_row
    share = percent(result.final.share_removed)
    if final is None:
        return f"{share} of the parameters were removed; the final checkpoint was not scored"
    # A perplexity is called by its name.
    name = "accuracy" if is_share(dense.first) else metric(dense.first)
    before = accuracy(dense.first)
    if final is dense:
        return f"No iteration passed: the final checkpoint is the dense model, at {before} {name}"
    sentence = (
        f"Removing {share} of the parameters took {name} from {before} to {accuracy(final.first)}"
    )
    return f"{sentence}; {_control_score(result, final, control)}" if control else sentence


def _control_score(result: Result, final: Row, control: Row) -> str:
    """The one-shot control's score, and whether the loop's is better, where that was tested."""
    sentence = f"one-shot pruning reached {accuracy(control.first)}"
    # Where the loop stopped early, the control is smaller.
    if abs(control.params / final.params - 1) > SAME_SIZE:
        sentence += f" with {percent(control.share_removed)} removed"
    pair = result.pair("control")
    if pair is None:
        return sentence
    outcome = {"good": "worse than the loop", "bad": "better than the loop"}
    words = outcome.get(
        beside_control(pair, result.confidence).kind, "the difference is not significant"
    )
    return f"{sentence}: {words} (p {pair.p_different:.2g})"


def checks(result: Result) -> list[tuple[str, str]]:
    """What the run itself looked after, such as the gate, and training rows that are in a benchmark."""
    found = result.decontaminated
    wall = f"{duration(result.wall_seconds)}; the work of all steps adds up to {duration(result.work_seconds)}"
    lines = [
        ("Gate", _gate(result)),
        ("Recovery", result.amount.sentence),
        ("Control", _control(result)),
        ("Decontamination", decontamination.sentence(found.model_dump()) if found else ""),
        *(
            (f"Export {export.name}", f"Not made: {export.failed}.")
            for export in result.exports
            if export.failed
        ),
        ("Wall clock", f"{wall}."),
    ]
    return [(label, text) for label, text in lines if text]


def _gate(result: Result) -> str:
    """What it decided, or that it was off."""
    settings = result.settings["gate"]
    # Then a checkpoint can be final that is worse than the dense model.
    if not settings["enabled"]:
        return "Off: no iteration was tested before the next began."
    verdicts = [row.verdict for row in result.rows]
    accepted = counted(verdicts.count("accepted"), "iteration")
    rejected = counted(verdicts.count("rejected"), "iteration")
    held = f", perplexity at most \u00d7 {settings['retention']:g}" if settings["retention"] else ""
    sentence = (
        f"{accepted} accepted, {rejected} rejected (margin {margin(settings['margin'])}{held})"
    )
    if result.not_needed:
        first, last = result.not_needed[0], result.not_needed[-1]
        iterations = range(first.iteration, last.iteration + 1)
        sentence += f"; not needed: {numbered('iteration', iterations)} ({first.reason})"
    # Otherwise an accepted model may be one of which nothing can be said.
    return (
        f"{sentence}."
        if settings["strict"]
        else f"{sentence}. Unclear ones are accepted: gate.strict is off."
    )


def _control(result: Result) -> str:
    """Whether it finished, and whether the arms were trained equally; how to fetch one that is better."""
    if result.control_row is None:
        return (
            f"The control arm did not finish: {result.control_failed}."
            if result.control_failed
            else ""
        )
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
        if result.retained is None:
            sentences.append(
                "What it retains of other text: the dense model does not predict the held-out texts."
            )
        sentences += [_items(result, task) for task in result.tasks]
        sentences += _token_limits(dense, final)
    asked = result.settings["evaluate"]["tasks"]
    limited = [
        task for task, settings in zip(result.tasks, asked, strict=True) if settings.get("limit")
    ]
    if limited:
        sentences.append(
            f"Only the first items were scored of {', '.join(limited)} (limit in evaluate.tasks)."
        )
    for warning in result.amount.warnings():
        sentences.append(f"{warning}.")
    return sentences


def of_samples(result: Result) -> str:
    """How benchmarks with several samples of each item are compared; empty where there are none."""
    if all(task.samples == 1 for task in result.dense_row.scores.tasks):
        return ""
    return (
        "avg@n: the share of right answers, n to each item. An item regresses where fewer of its answers are right; "
        "the exact test flips the signs of the items' differences, as McNemar's does with one answer. pass@n: the "
        "share of items with at least one right answer; it decides nothing."
    )


def short_of_target(result: Result) -> str:
    """That a loop ended before its target; else empty."""
    asked = (
        removal(result.original_params, result.settings["schedule"]["target"])
        / result.original_params
    )
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
    drop = hidden_drop(pair)
    if drop is None:
        return f"{items} are too few to show any drop, or the dense model solves too few of them."
    return f"With {items}, a drop below {drop * 100:.1f} points is not called worse."


def _token_limits(dense: Row, final: Row) -> list[str]:
    """Answers and prompts that were truncated, and code that ran out of time, of either model."""
    sentences = []
    for before, after in zip(dense.scores.tasks, final.scores.tasks, strict=True):
        counts = (
            ("answers hit the token limit", percent(before.truncated), percent(after.truncated)),
            (
                "prompts did not fit into the context",
                percent(before.cut_prompts),
                percent(after.cut_prompts),
            ),
            (
                "answers are wrong because their code ran out of time",
                before.code_timeouts,
                after.code_timeouts,
            ),
        )
        for words, old, new in counts:
            if old not in (0, "0.0 %") or new not in (0, "0.0 %"):
                sentences.append(
                    f"On {before.task}, {new} of the final model's {words} (dense: {old})."
                )
    return sentences
