"""The forms for other runtimes as tables: size, score and speed of the dense and the final model."""

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
    rows: tuple[tuple[str, ...], ...] = ()  # model, weights, accuracy, interval, items, speed
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


def tables(result: dict[str, Any]) -> list[ExportTable]:
    """A table for each form."""
    return [_table(result, export) for export in result["exports"]]


def sentences(result: dict[str, Any]) -> list[str]:
    """A sentence for each form, for the terminal."""
    lines = []
    for export, table in zip(result["exports"], tables(result), strict=True):
        if table.failed:
            lines.append(f"Export {table.title} was not made: {table.failed}.")
            continue
        _, weights, accuracy, *_ = table.rows[-1]
        items = export["models"]["final"]["tasks"][0]["items"]
        verdicts = [
            f"{comparison.answer.text[0].lower()}{comparison.answer.text[1:]} (against {comparison.reference})"
            for comparison in table.comparisons[:1]
        ]
        score = f"{accuracy} on {counted(items, 'item')}"
        lines.append(f"Export {table.title}: {', '.join([weights, score, *verdicts])}.")
    return lines


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
    first = model["tasks"][0]
    ratio = model["bytes"] / original
    decode = speed.get("models", {}).get(name, [])
    return (
        label,
        f"{size(model['bytes'])} ({ratio:.2f}x)",
        cells.accuracy(first),
        cells.interval(first),
        f"{first['items']:,}",
        f"{decode[0]['decode_tokens_per_s']:,.0f}" if decode else "\u2013",
    )


def _comparisons(export: Row) -> list[Comparison]:
    comparisons = []
    for task, pairs in export["pairs"].items():
        for reference, words in REFERENCES.items():
            if reference in pairs:
                pair = pairs[reference]
                comparisons.append(Comparison(task, words, cells.comparison(pair), answer.of_pair(pair)))
    return comparisons
