"""A result in words and formatted cells: what the page, the card and the terminal say, and no more than it."""

from __future__ import annotations

from typing import Any

from ptl import decontaminate, speed_rows
from ptl.plots import begins_at_zero, is_share
from ptl.result import Result, final_row, overlap, row_of, total_tokens, work_seconds
from ptl.units import duration

MINUTE = 60.0  # seconds: below it two durations count as the same


def verdict(result: Result) -> str:
    """The run in one sentence: it claims no more than the numbers."""
    sentence = _verdict(result)
    if result.get("control_failed"):
        return sentence.removesuffix(".") + "; the control arm did not finish."
    return sentence


def _verdict(result: Result) -> str:
    dense, final, control = row_of(result, "loop", 0), final_row(result), row_of(result, "control")
    share = percent(result["final"]["share_removed"])
    if final is None or dense is None:
        return f"{share} of the parameters were removed; the final checkpoint or the dense model was not scored."
    task = _first(dense)
    what = "accuracy" if is_share(task) else task["metric"].partition(",")[0]
    if final is dense:
        return f"No iteration passed: the final checkpoint is the dense model, at {value(dense)} {what}."
    sentence = f"Removing {share} of the parameters took {what} from {value(dense)} to {value(final)}"
    against_dense = result["paired"].get("dense")
    if against_dense and against_dense["verdict"] == "inferior":
        sentence += f": inferior to the dense model (margin {100 * against_dense['margin']:g} points)"
    if control is None:
        return sentence + "."
    one_shot = f"one-shot pruning reached {value(control)}"
    if abs(control["params"] / final["params"] - 1) > 0.005:
        one_shot += f" with {percent(control['share_removed'])} removed"
    gain = (final["accuracy"] - control["accuracy"]) * (1 if task.get("higher_is_better", True) else -1)
    size = points(abs(gain)) if is_share(task) else f"{abs(gain):.3g}"
    pair = result["paired"].get("control")
    if gain == 0:
        return f"{sentence}; {one_shot}, the same."
    if pair and pair["p_different"] > 1 - result["confidence"]:
        return f"{sentence}; {one_shot}: the two cannot be told apart (p {pair['p_different']:.2g})."
    if gain < 0:
        return f"{sentence}; {one_shot}: the control is {size} better than the loop."
    return f"{sentence}; {one_shot}, {size} worse than the loop."


def notes(result: Result) -> list[str]:
    """What a careful reader asks next: do the intervals overlap, were the tokens equal, what was thrown away."""
    dense, final, control = row_of(result, "loop", 0), final_row(result), row_of(result, "control")
    found = [f"The control arm did not finish: {result['control_failed']}."] if result.get("control_failed") else []
    pairs = [("dense", "the dense model", dense), ("control", "the control", control)]
    for label, name, other in pairs if final and final is not dense else ():
        if other is not None and final is not None:
            found.append(_compared(result, label, name, final, other))
    loop, one_shot = total_tokens(result, "loop"), total_tokens(result, "control")
    if control and loop != one_shot:
        found.append(f"The arms had different recovery tokens: loop {loop:,}, control {one_shot:,}.")
    if _control_is_better(result):
        found.append(f"The control's checkpoint: ptl fetch {result['run_id']} DIR --arm control")
    rejected = sum(row["verdict"] == "rejected" for row in result["rows"])
    if rejected:
        found.append(
            f"The gate rejected {rejected} iteration{'s' * (rejected > 1)}; the next began from the last accepted."
        )
    if not (result["settings"].get("gate") or {}).get("enabled", True):
        found.append("The gate was off: no iteration was tested before the next began.")
    for reason, iterations in not_needed(result):
        found.append(f"Not needed: iteration {', '.join(map(str, iterations))} ({reason}).")
    found.append(decontaminate.sentence(result["decontaminated"]) if result.get("decontaminated") else "")
    found.append(speed_rows.sentence(result.get("speed") or {}))
    found.append(wall_clock(result))
    return [note for note in found if note]


def _control_is_better(result: Result) -> bool:
    """Whether the verdict says that the control is better than the loop."""
    final, control, pair = final_row(result), row_of(result, "control"), result["paired"].get("control")
    if final is None or control is None or (pair and pair["p_different"] > 1 - result["confidence"]):
        return False
    sign = 1 if _first(final).get("higher_is_better", True) else -1
    return bool(sign * control["accuracy"] > sign * final["accuracy"])


def wall_clock(result: Result) -> str:
    """How long the run took from start to end, beside the summed work of its steps where the two differ."""
    wall, work, idle = result.get("wall_seconds"), work_seconds(result), result.get("idle_seconds") or 0.0
    if wall is None:
        return ""
    if abs(wall - work) < MINUTE and idle < MINUTE:
        return f"Wall clock: {duration(wall)}."
    summed = f"the work of all steps adds up to {duration(work)}"
    if idle < MINUTE:
        return f"Wall clock: {duration(wall)}; {summed}."
    return (
        f"Wall clock, pauses included: {duration(wall)}, {duration(idle)} of it between the steps (pauses, start-up, "
        f"failed attempts); {summed}, without loading libraries and checkpoints."
    )


def not_needed(result: Result) -> list[tuple[str, list[int]]]:
    """Why iterations of the plan were passed through, and which: reason -> iterations."""
    found: dict[str, list[int]] = {}
    for step in result.get("not_needed") or ():
        iterations = found.setdefault(step["reason"], [])
        if step["iteration"] not in iterations:
            iterations.append(step["iteration"])
    return list(found.items())


def _compared(result: Result, label: str, name: str, final: dict[str, Any], other: dict[str, Any]) -> str:
    pair, shared = result["paired"].get(label), overlap(final, other)
    if pair:
        return f"Final against {name}, item by item: {paired_words(pair)}."
    if shared is None:
        return ""
    return (
        f"Final and {name}: the {result['confidence'] * 100:g} % intervals {'overlap' if shared else 'do not overlap'}."
    )


def paired_words(pair: dict[str, Any]) -> str:
    """A paired comparison with its numbers; p is McNemar's exact two-sided test."""
    change, low, high = (f"{100 * pair[key]:+.1f}" for key in ("difference", "low", "high"))
    return (
        f"{change} points ({low} to {high} at {100 * (1 - 2 * pair['alpha']):g} %), "
        f"{pair['regressions']} regressions and {pair['improvements']} improvements on {pair['items']:,} items, "
        f"p {pair['p_different']:.2g}"
    )


def gate_words(gate: dict[str, Any]) -> list[tuple[str, str]]:
    """A verdict's reason and numbers, one pair of name and text for each."""
    found = []
    numbers = {key: value for key, value in gate.items() if key != "numbers"} | (gate.get("numbers") or {})
    for key, value in numbers.items():
        if isinstance(value, dict) and "p_different" in value:
            found.append((f"against the {key}", paired_words(value)))
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append((key.replace("_", " "), f"{value:,}"))
        else:
            found += [(name.replace("_", " "), text) for name, text in flat(value, key)]
    return found


def value(row: dict[str, Any]) -> str:
    """A row's score as it is printed: percent where it is a share."""
    return percent(row["accuracy"]) if is_share(_first(row)) else f"{row['accuracy']:.4g}"


def _first(row: dict[str, Any]) -> dict[str, Any]:
    return dict(row["scores"]["tasks"][0])


def percent(share: float, digits: int = 1) -> str:
    """0.981 -> `98.1 %`."""
    return f"{share * 100:.{digits}f} %"


def points(difference: float) -> str:
    """0.081 -> `8.1 points`."""
    return f"{difference * 100:.1f} points"


def interval(task: dict[str, Any]) -> str:
    """A task's interval; empty where it has none."""
    if task["low"] is None:
        return ""
    if is_share(task):
        return f"{task['low'] * 100:.1f} to {task['high'] * 100:.1f}"
    return f"{task['low']:.4g} to {task['high']:.4g}"


def score(task: dict[str, Any]) -> str:
    """A task's score with its interval, in percent where it is a share."""
    number = percent(task["accuracy"]) if is_share(task) else f"{task['accuracy']:.4g}"
    return f"{number} ({interval(task)})" if task["low"] is not None else number


def lines(result: Result) -> list[dict[str, Any]]:
    """The main table, formatted. `bar` is the interval on a scale common to all rows, in percent of its width."""
    final, rows = final_row(result), result["rows"]
    low, high = min((r["low"] or 0 for r in rows), default=0), max((r["high"] or 0 for r in rows), default=1)
    scale = 100 / (high - low or 1)
    return [
        {
            "label": "one-shot control" if r["arm"] == "control" else str(r["iteration"] or "dense"),
            "arm": r["arm"],
            "params": f"{r['params']:,}",
            "removed": percent(r["share_removed"]),
            "accuracy": value(r),
            "interval": interval(_first(r)),
            "num_items": f"{r['items']:,}",
            "tokens": f"{r['recovery_tokens']:,}",
            "verdict": r["verdict"],
            "final": r is final,
            "bar": [] if r["low"] is None else [round((r[x] - low) * scale, 1) for x in ("low", "accuracy", "high")],
            "shape": _shape(r["widths"]),
            "layers": len(r["widths"]) or "",
            "removed_layers": ", ".join(map(str, r.get("removed_layers") or ())),
            "tasks": [{"task": t["task"], "score": score(t), **t} for t in r["scores"]["tasks"]],
            "gate": gate_words(r["gate"]),
        }
        for r in rows
    ]  # fmt: skip


def table_caption(result: Result) -> str:
    """What the main table's numbers are; nothing about columns and marks that it does not have."""
    rows = result["rows"]
    task: dict[str, Any] = rows[0]["scores"]["tasks"][0] if rows else {}
    if not task:
        return ""
    metric = task.get("metric") or "accuracy"
    what = f"Accuracy is {metric}" if is_share(task) else f"The score is {metric}"
    version = f", version {task['version']}" if task.get("version") else ""
    shots = f", {task['num_fewshot']}-shot" if task.get("num_fewshot") is not None else ""
    parts = [f"{what} on {task['task']}{version}{shots}."]
    if any(row["recovery_tokens"] for row in rows):
        parts.append("Recovery tokens are those of each iteration alone.")
    bounds = [row["low"] for row in rows if row["low"] is not None]
    if bounds:
        parts.append(
            "The drawn intervals share one scale" + (" that does not begin at zero." if min(bounds) > 0 else ".")
        )
    return " ".join(parts)


def accuracy_caption(result: Result) -> str:
    """What is seen in the chart of scores against parameters."""
    rows = result["rows"]
    parts = []
    if any(row["low"] is not None for row in rows):
        parts.append(f"Bars are {result['confidence'] * 100:g} % intervals.")
    if rows and not begins_at_zero(rows):
        parts.append("The vertical axis does not begin at zero.")
    if final_row(result) is not None:
        parts.append("The ringed mark is the final checkpoint.")
    if any(row["arm"] == "control" for row in rows):
        parts.append("The control is drawn a little to the right of its size.")
    return " ".join(parts)


def loss_caption(result: Result) -> str:
    """What is seen in the chart of losses."""
    methods = {stage.get("method") for stage in result["settings"].get("recover") or ()}
    what = "Training loss of each recovery"
    if "grpo" in methods:
        what += " (of GRPO its policy loss, which says little: the rewards are on the steps' pages in MLflow)"
    loop = any(step["arm"] == "loop" and result["curves"].get(step["step"]) for step in result["steps"])
    return what + ("; the numbers at the dotted lines are the iterations." if loop else ".")


def _shape(widths: list[int]) -> str:
    if not widths:
        return ""
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def costs(result: Result) -> list[tuple[str, list[str]]]:
    """What each of dense, final and control costs: label -> one cell per column of `columns`."""
    rows = [row["scores"] for _, row in columns(result)]
    labels = {"params": "Parameters", "bytes": "Bytes", "flops_per_token": "FLOPs per token",
              "kv_bytes_per_token": "KV-cache bytes per token"}  # fmt: skip
    table = []
    for key, label in labels.items():
        if all(scores.get(key) is not None for scores in rows):
            first = rows[0][key] or 1
            table.append((label, [f"{scores[key]:,}{_ratio(scores[key] / first, i)}" for i, scores in enumerate(rows)]))
    return table


def _ratio(ratio: float, column: int) -> str:
    return f" ({ratio:.2f}x)" if column else ""


def columns(result: Result) -> list[tuple[str, dict[str, Any]]]:
    """The rows that are set side by side: dense, final (unless it is the dense one), control."""
    dense, final, control = row_of(result, "loop", 0), final_row(result), row_of(result, "control")
    named = [("Dense", dense), ("Final", None if final is dense else final), ("One-shot control", control)]
    return [(name, row) for name, row in named if row is not None]


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested config as dotted names and printed values; empty values are left out."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, (list, tuple)) and any(isinstance(inner, dict) for inner in value):
        return [pair for i, inner in enumerate(value) for pair in flat(inner, f"{prefix}.{i}")]
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, float):
        return [(prefix, f"{value:.6g}")]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))]
