"""A forecast as text: every step of a run, and the widths that it may have after each iteration."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from ptl.log import table_text
from ptl.preflight import target
from ptl.preflight.forecast import HOUR, Forecast, narrows, sizes
from ptl.preflight.forecast_model import GIB, NO_GPU, checkpoint_bytes
from ptl.units import decimal_hours, duration, size


def steps(run: Forecast) -> str:
    """Every step as a table."""
    dense = run.shape.dimensions
    headings = ["Step", "Parameters", "Active", "Tokens", "GPUs", "GiB per GPU", "Hours", "Note"]
    rows = []
    for step in run.steps:
        notes = [step.note] if step.fits else ["does not fit", step.note]
        row = [
            step.step,
            f"{step.model.params:,}",
            f"{step.model.active_params:,}",
            f"{step.tokens:,}",
            f"{step.nodes} x {step.gpus}" if step.nodes > 1 else str(step.gpus),
            f"{step.memory / GIB:.1f}",
            decimal_hours(step.hours),
            ", ".join(filter(None, notes)),
        ]
        rows.append(row)
    left_out = [] if dense.experts else ["Active"]  # every token meets all parameters
    if run.kind == NO_GPU:
        left_out.append("GPUs")
        headings[headings.index("GiB per GPU")] = "GiB"
    for name in left_out:
        column = headings.index(name)
        for cells in (headings, *rows):
            del cells[column]
    return table_text(_title(run), headings, rows, numbers=headings[1:-1])


def _title(run: Forecast) -> str:
    """The whole run in a sentence, and where its numbers are from."""
    params = f"{run.shape.params:,} parameters"
    work = f"{duration(run.hours * HOUR)} of work"
    disk = f"at most {size(checkpoint_bytes(run.config, run.shape))} of checkpoints"
    if run.kind == NO_GPU:
        return (
            f"{params} on this machine's CPU: {work}, {disk} (estimates from what it reached in a second just now, "
            "without exports and the start of steps)"
        )
    machines = f"{run.nodes} nodes of " if run.nodes > 1 else ""
    return (
        f"{params} on {machines}{run.gpus['recover']} x {run.kind}: {work}, {decimal_hours(run.gpu_hours)} GPU-hours, "
        f"{disk} (estimates from data sheets, without exports, queues and the start of pods)"
    )


def document(run: Forecast) -> dict[str, Any]:
    """Every step as data: memory in bytes on each GPU, hours of wall-clock time."""
    steps = [
        {
            "step": step.step,
            "params": step.model.params,
            "active_params": step.model.active_params,
            "tokens": step.tokens,
            "nodes": step.nodes,
            "gpus": step.gpus,
            "memory": round(step.memory),
            "fits": step.fits,
            "hours": step.hours,
            "note": step.note,
        }
        for step in run.steps
    ]
    return {
        "params": run.shape.dimensions.params,
        "gpu": run.kind,
        "nodes": run.nodes,
        "hours": run.hours,
        "gpu_hours": run.gpu_hours,
        "steps": steps,
    }


def widths(run: Forecast) -> str | None:
    """The possible sizes after each iteration of the loop as a table; None where the FFN alone gets narrower."""
    paths, model = run.paths["loop"], run.shape.dimensions
    if not narrows(target.ends(paths), model):
        return None
    columns = [ascii_uppercase[i] for i in range(len(paths))]
    rows = [["dense", *(sizes(model) for _ in paths)]]
    for i, (iteration, _) in enumerate(paths[0]):
        rows.append([str(iteration.index), *(sizes(path[i][1]) for path in paths)])
    title = f"Hidden size/{'FFN neurons' if model.narrowable else 'experts'}/KV heads after each iteration"
    text = table_text(title, ["Iteration", *columns], rows, numbers=columns)
    if len(paths) > 1:
        text += (
            "\nThe first prune step takes the column whose last row has the least loss on the calibration text, before "
            "any recovery,\nor A where all losses are above that of guessing. The forecast counts with column A."
        )
    return text
