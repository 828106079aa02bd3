"""The forms for other runtimes as tables: size, scores and speed of the dense and the final model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptl.report import answer, cells
from ptl.report.answer import Answer
from ptl.report.result_rows import Row
from ptl.units import counted, size

# References of a form's comparisons, as the step names them
REFERENCES = {
    "final": "the final model",
    "dense_export": "the dense model in the same form",
    "dense": "the dense model",
}


@dataclass(frozen=True)
class Comparison:
    """The final model's form against another model, item by item on a benchmark."""

    task: str
    reference: str
    numbers: str
    answer: Answer


@dataclass(frozen=True)
class ExportTable:
    """One form."""

    title: str  # for example gguf-q4_k_m
    failed: str  # why there is none; empty where it was made
    tasks: tuple[str, ...] = ()  # benchmarks
    rows: tuple[tuple[str, ...], ...] = ()  # model, weights, a score for each benchmark, items, speed
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


def tables(result: dict[str, Any]) -> list[ExportTable]:
    """A table for each form."""
    return [_table(result, export) for export in result["exports"]]


def sentences(result: dict[str, Any]) -> list[str]:
    """Each form in a few words, for the terminal."""
    lines = []
    for export, table in zip(result["exports"], tables(result), strict=True):
        if table.failed:
            lines.append(f"Export {table.title} was not made: {table.failed}.")
            continue
        _, weights, *_ = table.rows[-1]
        scored = [_scored(table, task) for task in export["models"]["final"]["tasks"]]
        lines.append(" ".join([f"Export {table.title}: {weights}.", *scored]))
    return lines


def _scored(table: ExportTable, task: Row) -> str:
    """A sentence: the score on a benchmark, with the verdict against the final model where there is one."""
    sentence = f"{task['task']}: {cells.score(task)} on {counted(task['items'], 'item')}"
    for comparison in table.comparisons:
        if (comparison.task, comparison.reference) == (task["task"], REFERENCES["final"]):
            verdict = comparison.answer.text
            sentence += f", against {comparison.reference}: {verdict[0].lower()}{verdict[1:]}"
    return f"{sentence}."


def _table(result: dict[str, Any], export: Row) -> ExportTable:
    if export["failed"]:
        return ExportTable(export["name"], export["failed"])
    notes = list(export["notes"])
    if export["limit"]:
        notes.append(
            f"The forms were scored on the first {export['limit']:,} items of each benchmark at most. Comparisons are "
            "over these items only; the accuracies of the dense and the final model are over all that the run scores."
        )
    reason = export["speed"].get("reason")
    if reason:
        notes.append(f"Speed was not measured: {reason}.")
    else:
        notes.append(export["speed"]["setting"])
    if result["run_id"]:
        notes.append(f"Get the files: ptl fetch {result['run_id']}:{export['step']} DIR")
    return ExportTable(
        title=export["name"],
        failed="",
        tasks=tuple(task["task"] for task in export["models"]["final"]["tasks"]),
        rows=tuple(_rows(result, export)),
        comparisons=tuple(_comparisons(export)),
        notes=tuple(notes),
    )


def _rows(result: dict[str, Any], export: Row) -> list[tuple[str, ...]]:
    """Dense, dense in this form, final, final in this form."""
    scored = {row["step"]: row["scores"] for row in result["rows"]}
    original = scored[export["scored"]["dense"]]["bytes"]
    table = []
    for name in ("dense", "final"):
        plain = scored[export["scored"][name]]
        if name in export["models"]:
            label = name.capitalize()
            table.append(_row(label, plain, original, export["speed"], name))
            made = export["models"][name]
            table.append(_row(f"{label}, {export['type']}", made, original, export["speed"], f"{name}_export"))
    return table


def _row(label: str, model: Row, original: int, speed: Row, name: str) -> tuple[str, ...]:
    ratio = model["bytes"] / original
    decode = speed.get("models", {}).get(name, [])
    return (
        label,
        f"{size(model['bytes'])} ({ratio:.2f}x)",
        *map(cells.score, model["tasks"]),
        ", ".join(f"{task['items']:,}" for task in model["tasks"]),
        f"{decode[0]['decode_tokens_per_s']:,.0f}" if decode else "\u2013",
    )


def _comparisons(export: Row) -> list[Comparison]:
    comparisons = []
    for task, pairs in export["pairs"].items():
        for reference, words in REFERENCES.items():
            if reference in pairs:
                pair = pairs[reference]
                comparisons.append(Comparison(task, words, cells.comparison(pair), answer.of_pair(pair, words)))
    return comparisons
