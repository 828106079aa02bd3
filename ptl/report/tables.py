"""A result as tables, which HTML, Markdown, the model card and the terminal show alike."""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

from ptl.address import runs_page
from ptl.evaluation import speed
from ptl.evaluation.evaluate import Scores
from ptl.evaluation.paired import Paired
from ptl.evaluation.retention import Retained
from ptl.evaluation.scoring import TaskScore
from ptl.model.widths import ComparedWidths
from ptl.report import words
from ptl.report.result import ExportedModel, ExportRow, Result, Row
from ptl.report.words import Verdict, beside_control, of_pair
from ptl.units import counted, duration, size

# References of an export's comparisons, as the step names them
REFERENCES = {
    "final": "the final model",
    "dense_export": "the dense model in the same format",
    "dense": "the dense model",
}


class Cell(NamedTuple):
    """A cell with its small print, line by line."""

    text: str
    details: tuple[str, ...] = ()
    kind: str = ""  # code, or how a verdict is coloured
    link: str = ""


class Table(NamedTuple):
    """Rows below a line of headings."""

    columns: tuple[str, ...]
    rows: list[list[Cell]]
    numbers: tuple[str, ...] = ()  # headings of the columns that hold numbers
    kinds: tuple[str, ...] = ()  # of each row: control, rejected, final, for its colour


NONE = Cell("\u2013")
MODELS = ("Dense", "Final", "Difference")  # headings of a comparison


def iterations(result: Result) -> Table:
    """The main table: a row for each scored checkpoint."""
    level = f"{result.confidence * 100:g} % interval"
    numbers = ("Parameters", "Removed", "Accuracy", level, "Items", "Recovery tokens")
    rows, kinds = [], []
    for row in result.rows:
        is_final = row is result.final_row
        cells = _cells(
            f"{row.label} (final)" if is_final else row.label,
            f"{row.params:,}",
            words.percent(row.share_removed),
            words.accuracy(row.first),
            words.interval(row.first),
            f"{row.items:,}",
            f"{row.recovery_tokens:,}",
            row.verdict,
        )
        rows.append(cells)
        kinds.append(f"{'final ' if is_final else ''}{row.arm} {row.verdict}")
    return Table(("Iteration", *numbers, "Verdict"), rows, numbers, tuple(kinds))


def details(result: Result) -> Table:
    """What is left of each checkpoint, its score on every benchmark, and why the gate decided as it did."""
    tasks = result.tasks if len(result.tasks) > 1 else []
    rows = []
    for row in result.rows:
        scores = map(words.score, row.scores.tasks if tasks else [])
        rows.append(
            _cells(
                row.label, _shape(result.dense_row.scores, row), *scores, row.reason or row.verdict
            )
        )
    return Table(("Iteration", "Shape", *tasks, "Verdict"), rows, ("Shape", *tasks))


def _shape(dense: Scores, row: Row) -> Cell:
    """The layers of a checkpoint, their widths and their experts."""
    shape = []
    for label, before, after in _widths(dense, row.scores):
        if _span(before) != _span(after):
            shape.append(f"{label} {_span(before)} \u2192 {_span(after)}")
        elif label == "FFN width":
            shape.append(f"{label} {_span(after)}")
    if row.scores.experts:
        shape += [f"{row.scores.experts} experts", f"{row.scores.active_params:,} active"]
    if row.removed_layers:
        shape.append(f"removed layers {', '.join(map(str, row.removed_layers))}")
    return Cell(f"{len(row.scores.widths)} layers", tuple(shape))


def _widths(dense: Scores, pruned: Scores) -> list[tuple[str, list[int], list[int]]]:
    """Sizes of the layers of both, with their names."""
    return [
        ("hidden size", [dense.hidden_size], [pruned.hidden_size]),
        ("FFN width", dense.widths, pruned.widths),
        ("KV heads", [dense.kv_heads], [pruned.kv_heads]),
    ]


def _span(sizes: list[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def compared_widths(result: Result) -> Table:
    """The sizes to end with that iterations chose from, and what each would have lost; no rows without a choice."""
    rows = []
    for row in result.rows:
        if row.compared:
            taken, *others = sorted(row.compared, key=lambda sizes: not sizes.taken)
            listed = tuple(f"{_sizes_text(sizes)}: {sizes.loss:.3f}" for sizes in others)
            rows.append(
                _cells(
                    row.label,
                    _sizes_text(taken),
                    f"{taken.loss:.3f}",
                    Cell(f"{len(listed)}", listed),
                )
            )
    return Table(("Iteration", "Widths to end with", "Loss", "Others compared"), rows)


def _sizes_text(sizes: ComparedWidths) -> str:
    experts = f", {sizes.experts} experts" if sizes.experts else ""
    return f"hidden {sizes.hidden:,}, FFN {sizes.width:,}, KV heads {sizes.kv_heads}{experts}"


def evidence(result: Result) -> list[Table]:
    """What the answer rests on: score, size and speed beside the dense model, and the loop beside its control."""
    dense, final, control = result.dense_row, result.final_row, result.control_row
    tables = [_scores(result, "dense", dense, final)]
    if final is not None and final is not dense:
        retained = [_retained(result.retained, result.forgets)] if result.retained else []
        tables += [_answers(result, dense, final), *retained, _sizes(dense, final)]
    speeds = [_cells(*row) for row in speed.rows(result.speed)]
    if speeds:
        tables.append(Table(("Speed", *MODELS), speeds, MODELS))
    if control is not None:
        tables.append(_scores(result, "control", control, final))
    return tables


def _scores(result: Result, key: str, reference: Row, final: Row | None) -> Table:
    """A row for each benchmark beside the reference, `dense` or `control`."""
    rows = []
    for position, task in enumerate(reference.scores.tasks):
        setting = f"{words.metric(task)}, {words.avg_at(task)}{counted(task.items, 'item')}, {task.num_fewshot}-shot"
        after, difference = NONE, NONE
        if final is None:
            verdict = Verdict("unclear", "Final not scored")
        elif final is reference:
            after = _score(task)
            verdict = Verdict("none", "The same model")
        else:
            scored = final.scores.tasks[position]
            pair = result.pair(key, task.task)
            after = _score(scored)
            difference = _difference(task, scored, pair)
            verdict = (
                of_pair(pair, "the dense model")
                if key == "dense"
                else beside_control(pair, result.confidence)
            )
        name = Cell(task.task, (setting,))
        rows.append([name, _verdict(verdict), _score(task), after, difference])
        passed = result.pass_at_n.get(task.task)
        if passed and key == "dense":
            # How many items at least one of the samples solves.
            shares = words.percent(passed.reference), words.percent(passed.candidate)
            rows.append(
                _cells(f"{task.task}, pass@{task.samples}", NONE, *shares, _comparison(passed))
            )
    title = "Score" if key == "dense" else "Loop against one-shot pruning"
    numbers = (key.capitalize(), "Final", "Difference")
    # The verdict comes first of all: a narrow screen shows only the first columns.
    return Table((title, "Verdict", *numbers), rows, numbers)


def _verdict(verdict: Verdict) -> Cell:
    return Cell(verdict.text, kind=verdict.kind)


def _score(task: TaskScore) -> Cell:
    interval = words.interval(task)
    return Cell(words.accuracy(task), (interval,) if interval else ())


def _difference(before: TaskScore, after: TaskScore, pair: Paired | None) -> Cell:
    """Item by item where the items are known."""
    if pair:
        return _comparison(pair)
    change = after.accuracy - before.accuracy
    text = f"{words.signed_points(change)} points" if words.is_share(before) else f"{change:+.3g}"
    return Cell(text, ("not compared item by item",))


def _comparison(pair: Paired) -> Cell:
    """A paired difference with its interval (two one-sided tests), the items that changed, and p (two-sided)."""
    low, high = map(words.signed_points, (pair.low, pair.high))
    details = (
        f"{low} to {high} at {100 * (1 - 2 * pair.alpha):.3g} %",
        f"{counted(pair.regressions, 'regression')} and {counted(pair.improvements, 'improvement')}",
        f"{pair.items:,} items, p {pair.p_different:.2g}",
    )
    return Cell(f"{words.signed_points(pair.difference)} points", details)


def _answers(result: Result, dense: Row, final: Row) -> Table:
    """How long the answers are, of the benchmarks that have some."""
    rows = []
    for before, after in zip(dense.scores.tasks, final.scores.tasks, strict=True):
        if not before.answer_tokens:
            continue
        p = result.longer.get(before.task)
        details = () if p is None else (f"longer: p {p:.2g}",)
        cells = [
            Cell(f"{task.answer_tokens:,.1f}", _length_details(task)) for task in (before, after)
        ]
        change = _change(before.answer_tokens, after.answer_tokens)
        rows.append(
            [
                Cell(before.task),
                *cells,
                Cell(change, details, "bad" if result.rambles(before.task) else ""),
            ]
        )
    return Table(("Tokens of an answer", *MODELS), rows, MODELS)


def _retained(found: Retained, forgets: bool) -> Table:
    """How well held-out text is still predicted."""
    name = Cell("Perplexity of held-out text", (f"{found.items:,} texts of {found.texts}",))
    interval = f"{found.low:.3g} to {found.high:.3g} at 90 %"
    ratio = Cell(f"\u00d7 {found.ratio:.3g}", (interval,), "bad" if forgets else "")
    row = [name, Cell(f"{found.dense:,.4g}"), Cell(f"{found.candidate:,.4g}"), ratio]
    return Table(("Retention", *MODELS), [row], MODELS)


def _change(before: float, after: float) -> str:
    change = f"{100 * (after / before - 1):+.1f} %"
    return "the same" if change in ("+0.0 %", "-0.0 %") else change


def _length_details(task: TaskScore) -> tuple[str, ...]:
    return (
        f"95th percentile {task.answer_tokens_p95:,.0f}",
        f"{words.percent(task.truncated)} hit the limit",
    )


def _sizes(dense: Row, final: Row) -> Table:
    measures = {
        "params": ("Parameters", "{:,}".format),
        **({"active_params": ("Active parameters", "{:,}".format)} if dense.scores.experts else {}),
        "bytes": ("Weights", size),
        "kv_bytes_per_token": ("KV cache per token", size),
        "flops_per_token": ("FLOPs per token", "{:,}".format),
    }
    rows = []
    for key, (label, printed) in measures.items():
        before, after = getattr(dense.scores, key), getattr(final.scores, key)
        rows.append(_cells(label, printed(before), printed(after), _change(before, after)))
    for label, before, after in _widths(dense.scores, final.scores):
        if _span(before) != _span(after):
            difference = _change(fmean(before), fmean(after))
            rows.append(
                _cells(label[0].upper() + label[1:], _span(before), _span(after), difference)
            )
    return Table(("Size and memory", *MODELS), rows, MODELS)


def export(result: Result, row: ExportRow) -> list[Table]:
    """Dense and final, as they are and in this format; then the final model's export against the others."""
    scores = {other.step: other.scores for other in result.rows}
    original = scores[row.scored["dense"]].bytes
    tasks = [task.task for task in row.models["final"].tasks]
    rows = []
    for name, exported in row.models.items():
        label = name.capitalize()
        as_it_is = scores[row.scored[name]]
        rows.append(_exported(row, name, label, as_it_is, original))
        in_format = f"{label}, {row.type}"
        rows.append(_exported(row, f"{name}_export", in_format, exported, original))
    numbers = ("Weights", *tasks, "Items", "Tokens/s")
    tables = [Table((row.name, *numbers), rows, numbers)]
    if row.pairs:
        tables.append(_export_pairs(row))
    return tables


def _exported(
    row: ExportRow, key: str, label: str, model: ExportedModel | Scores, original: int
) -> list[Cell]:
    """A model's weights beside the `original` bytes, its scores and its speed."""
    measured = row.speed.get("models", {}).get(key)
    return _cells(
        label,
        f"{size(model.bytes)} ({model.bytes / original:.2f}x)",
        *[words.score(task) for task in model.tasks],
        ", ".join(f"{task.items:,}" for task in model.tasks),
        f"{measured[0]['decode_tokens_per_s']:,.0f}" if measured else NONE,
    )


def _export_pairs(row: ExportRow) -> Table:
    rows = []
    for task, by_reference in row.pairs.items():
        for key, name in REFERENCES.items():
            if key in by_reference:
                pair = by_reference[key]
                rows.append(_cells(task, name, _comparison(pair), _verdict(of_pair(pair, name))))
    columns = ("Benchmark", f"Final, {row.type}, against", "Difference", "Verdict")
    return Table(columns, rows)


def lineage(result: Result) -> Table:
    """Each step with its checkpoint, what that was made from, and its page in MLflow."""
    rows = []
    for step in result.steps:
        cells = _cells(
            step.step,
            duration(step.seconds),
            f"{step.params:,}",
            _digest(step.digest),
            _digest(step.parent_digest),
            _run(result, step.run_id),
        )
        rows.append(cells)
    for missing, why in ((result.not_needed, "not needed"), (result.not_finished, "not finished")):
        for absent in missing:
            reason = f"{why}: {absent.reason}"
            rows.append(_cells(absent.step, NONE, NONE, reason, NONE, NONE))
    columns = ("Step", "Time", "Parameters", "Checkpoint", "Parent", "MLflow run")
    return Table(columns, rows, ("Time", "Parameters"))


def _run(result: Result, run_id: str) -> Cell:
    """A step's run in MLflow with a link."""
    url = result.mlflow.url.rstrip("/")
    if not run_id:
        return NONE
    # The result may come from anywhere: `javascript:` would run in the page.
    is_web_address = url.startswith(("http://", "https://"))
    link = runs_page(url, result.mlflow.experiment_id, run_id) if is_web_address else ""
    return Cell(run_id, kind="code", link=link)


def _digest(digest: str) -> Cell:
    """The beginning of a digest, enough to distinguish the checkpoints of a run."""
    return Cell(digest.removeprefix("sha256:")[:12], kind="code") if digest else NONE


def _cells(*cells: str | Cell) -> list[Cell]:
    return [Cell(cell) if isinstance(cell, str) else cell for cell in cells]
