"""What a comparison says, in plain words that promise no more than the tests: the one place that words a verdict."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ptl.config.rehearsal import is_rehearsal
from ptl.evaluation.paired import Paired
from ptl.report.numbers import accuracy, is_share, margin, metric, percent
from ptl.report.result import Result, Row
from ptl.units import counted, listed

Kind = Literal["good", "bad", "unclear", "none"]  # how the pages colour it
SAME_SIZE = 0.005  # relative difference of parameters below which two models count as equally large


class Verdict(NamedTuple):
    """A verdict for a reader."""

    kind: Kind
    text: str  # without a full stop


REHEARSAL = "Cannot be said: this was a rehearsal, with about 1 % of the work, and no number counts"
WORST_FIRST: tuple[Kind, ...] = ("bad", "unclear", "none", "good")


def first_line(result: Result) -> str:
    """How the report begins: whether the final model may be shipped, and by which scores."""
    return f"{overall(result).text}. {headline(result)}"


def overall(result: Result) -> Verdict:
    """Of all benchmarks together: the worst verdict comes first and gives the colour."""
    final = result.final_row
    if is_rehearsal(result.settings):
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
        return Verdict("unclear", f"The score fell, and whether by more than {tolerated} cannot be said")
    return Verdict("unclear", f"Cannot be said whether the score fell by more than {tolerated}")


def beside_control(pair: Paired | None, confidence: float) -> Verdict:
    """Whether the loop is better or worse than its control, by the two-sided test at the run's confidence level."""
    if pair is None:
        return Verdict("unclear", "Not tested")
    if pair.p_different > 1 - confidence:
        return Verdict("unclear", "No difference shown")
    return Verdict("good", "Final better") if pair.difference > 0 else Verdict("bad", "Control better")


def headline(result: Result) -> str:
    """The scores of the run in one sentence."""
    sentence = _scores(result)
    if result.control_failed:
        sentence += "; the control arm did not finish"
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
    sentence = f"Removing {share} of the parameters took {name} from {before} to {accuracy(final.first)}"
    return f"{sentence}; {_control(result, final, control)}" if control else sentence


def _control(result: Result, final: Row, control: Row) -> str:
    """The one-shot control's score, and whether the loop's is better, where that was tested."""
    sentence = f"one-shot pruning reached {accuracy(control.first)}"
    # Where the loop stopped early, the control is smaller.
    if abs(control.params / final.params - 1) > SAME_SIZE:
        sentence += f" with {percent(control.share_removed)} removed"
    pair = result.pair("control")
    if pair is None:
        return sentence
    outcome = {"good": "worse than the loop", "bad": "better than the loop"}
    words = outcome.get(beside_control(pair, result.confidence).kind, "the difference is not significant")
    return f"{sentence}: {words} (p {pair.p_different:.2g})"
