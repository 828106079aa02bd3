"""What the answer rests on, as one table: accuracy, size and speed beside the dense model, and loop beside control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ptl.data import decontamination
from ptl.evaluation import speed_rows
from ptl.report import answer, cells, goal
from ptl.report.answer import Answer
from ptl.report.result import SAME_SIZE, Result, amount, control_row, dense_row, final_row, total_tokens
from ptl.report.result_rows import Row
from ptl.units import counted, size

NO_ANSWER = Answer("none", "")


class Cell(NamedTuple):
    """A cell with its small print, line by line."""

    text: str
    details: tuple[str, ...] = ()


NO_CELL = Cell("\u2013")


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    label: Cell
    reference: Cell  # of the dense model or the control
    final: Cell
    difference: Cell
    answer: Answer = NO_ANSWER


@dataclass(frozen=True)
class Group:
    """Rows with one reference."""

    title: str
    reference: str  # what the final model is compared with
    lines: list[Line]

    @property
    def verdict(self) -> str:
        """The heading of the last column; empty where no row has a verdict."""
        return "Verdict" if any(line.answer.text for line in self.lines) else ""


def groups(result: Result) -> list[Group]:
    """All of the table; a group without a row is left out."""
    dense = dense_row(result)
    final = final_row(result)
    table = [Group("Score", "Dense", _scores(result, "dense", dense, final))]
    if final is not None and final is not dense:
        table.append(Group("Size and memory", "Dense", _sizes(result, dense, final)))
    table.append(Group("Speed", "Dense", _speeds(result)))
    control = control_row(result)
    if control is not None:
        lines = _scores(result, "control", control, final)
        if final is not None:
            lines += _equal_terms(result, control, final)
        table.append(Group("Loop against one-shot pruning", "Control", lines))
    return [group for group in table if group.lines]


def checks(result: Result) -> list[tuple[str, str]]:
    """What the run itself looked after: its goal, the gate, its tokens, and rows that are in a benchmark."""
    lines = [("Gate", _gate(result))]
    trained = amount(result).sentence
    if trained:
        lines.append(("Recovery", trained))
    reached = goal.sentence(result["goal"])
    if reached:
        lines.insert(0, ("Target", reached))
    if result["decontaminated"]:
        lines.append(("Decontamination", decontamination.sentence(result["decontaminated"])))
    return lines


def caption(result: Result) -> str:
    """How the differences were tested."""
    pairs = [pair for tasks in result["paired_tasks"].values() for pair in tasks.values()]
    if not pairs:
        return ""
    # The first task's comes first.
    alpha = 100 * pairs[0]["alpha"]
    margin = cells.margin(pairs[0])
    sentence = (
        f"Differences are item by item. Worse: the score fell by more than {margin}, and McNemar's exact one-sided "
        f"test calls the fall significant at {alpha:g} %. Not worse: the lower end of the interval is above -{margin}. "
        "p is two-sided."
    )
    others = min(pair["alpha"] for pair in pairs) * 100
    if others < alpha:
        sentence += (
            " Against the dense model the first benchmark decides; the others share the significance level "
            f"({others:.3g} % each)."
        )
    return sentence


def _scores(result: Result, key: str, reference: Row, final: Row | None) -> list[Line]:
    """A row for each benchmark: `key` is that of the reference in the paired comparisons."""
    lines = []
    for position, task in enumerate(reference["scores"]["tasks"]):
        asked = f"{cells.metric_name(task)}, {counted(task['items'], 'item')}, {task['num_fewshot']}-shot"
        label = Cell(task["task"], (asked,))
        before = _score(task)
        if final is None:
            lines.append(Line(label, before, NO_CELL, NO_CELL, Answer("unclear", "Final not scored")))
        elif final is reference:
            lines.append(Line(label, before, before, NO_CELL, Answer("none", "The same model")))
        else:
            scored = final["scores"]["tasks"][position]
            pair = result["paired_tasks"].get(task["task"], {}).get(key)
            words = answer.of_pair(pair, "the dense model") if key == "dense" else _beside_control(result, pair)
            lines.append(Line(label, before, _score(scored), _difference(task, scored, pair), words))
    return lines


def _score(task: Row) -> Cell:
    interval = cells.interval(task)
    return Cell(cells.accuracy(task), (interval,) if interval else ())


def _difference(before: Row, after: Row, pair: Row | None) -> Cell:
    """Item by item where the items are known."""
    if pair:
        details = (cells.pair_interval(pair), cells.changes(pair), cells.p_of(pair))
        return Cell(f"{cells.signed_points(pair['difference'])} points", details)
    difference = after["accuracy"] - before["accuracy"]
    text = f"{cells.signed_points(difference)} points" if cells.is_share(before) else f"{difference:+.3g}"
    return Cell(text, ("not compared item by item",))


def _beside_control(result: Result, pair: Row | None) -> Answer:
    """Whether the loop is better or worse than its control, by the two-sided test at the run's confidence level."""
    if pair is None:
        return Answer("unclear", "Not tested")
    if pair["p_different"] > 1 - result["confidence"]:
        return Answer("unclear", "No difference shown")
    if pair["difference"] > 0:
        return Answer("good", "Final better")
    return Answer("bad", "Control better")


def _sizes(result: Result, dense: Row, final: Row) -> list[Line]:
    before = dense["scores"]
    after = final["scores"]
    active = {"active_params": ("Active parameters", "{:,}".format)} if before["experts"] else {}
    names = {
        "params": ("Parameters", "{:,}".format),
        **active,
        "bytes": ("Weights", size),
        "kv_bytes_per_token": ("KV cache per token", size),
        "flops_per_token": ("FLOPs per token", "{:,}".format),
    }
    lines = []
    for key, (label, printed) in names.items():
        change = 100 * (after[key] / before[key] - 1)
        difference = f"{change:+.1f} %" if change else "the same"
        lines.append(Line(Cell(label), Cell(printed(before[key])), Cell(printed(after[key])), Cell(difference)))
    return lines


def _speeds(result: Result) -> list[Line]:
    """The smallest and the largest batch, and the time for a solved problem."""
    measured = speed_rows.rows(result["speed"])
    decode = [row for row in measured if row.kind == "decode"]
    chosen = [*decode[:1], *decode[1:][-1:], *(row for row in measured if row.kind == "solved")]
    lines = []
    for row in chosen:
        label, dense, final, _ = map(Cell, row.cells)
        lines.append(Line(label, dense, final, Cell(f"{row.times:.2f} times as fast")))
    return lines


def _equal_terms(result: Result, control: Row, final: Row) -> list[Line]:
    """Whether both had the same size and the same tokens."""
    ratio = control["params"] / final["params"] - 1
    pairs = {
        "Parameters": (control["params"], final["params"], abs(ratio) <= SAME_SIZE),
        "Recovery tokens": (total_tokens(result, "control"), total_tokens(result, "loop"), None),
    }
    lines = []
    for label, (before, after, equal) in pairs.items():
        same = before == after if equal is None else equal
        difference = "the same" if same else "not the same"
        lines.append(Line(Cell(label), Cell(f"{before:,}"), Cell(f"{after:,}"), Cell(difference)))
    return lines


def _gate(result: Result) -> str:
    """What it decided, or that it was off."""
    settings = result["settings"]["gate"]
    if not settings["enabled"]:
        return "Off: no iteration was tested before the next began."
    verdicts = [row["verdict"] for row in result["rows"]]
    counts = [f"{counted(verdicts.count(word), 'iteration')} {word}" for word in ("accepted", "rejected")]
    sentence = f"{counts[0]}, {counts[1]} (margin {cells.margin(settings)})"
    reasons = {step["reason"] for step in result["not_needed"]}
    sentence = "; ".join([sentence, *sorted(reasons)]) + "."
    # Otherwise an accepted model may be one of which nothing can be said.
    return sentence if settings["strict"] else f"{sentence} Unclear ones are accepted: gate.strict is off."
