"""A forecast as it is printed."""

from __future__ import annotations

from typing import Any, Literal

from ptl.config.dag import stage_of
from ptl.preflight.forecast import Forecast
from ptl.preflight.forecast_steps import HOUR
from ptl.preflight.gpus import GIB
from ptl.units import decimal_hours, duration, listed

# Heading -> side on which the column is flush: texts left, numbers right.
COLUMNS: dict[str, Literal["left", "right"]] = {
    "Step": "left",
    "Parameters": "right",
    "Tokens": "right",
    "FLOPs": "right",
    "GPUs": "right",
    "GiB per GPU": "right",
    "Tokens/s": "right",
    "Hours": "right",
    "GPU-hours": "right",
    "Note": "left",
}

WHOLE = ("Step", "Parameters", "Tokens")  # not wrapped or cut off where the terminal is narrow


def table(forecast: Forecast) -> Any:
    """A forecast as a rich table; a star marks the steps of the critical path."""
    from rich.table import Table

    # The work of all steps, and the time from start to end where none waits for a GPU.
    work = f"{duration(forecast.hours * HOUR)} of work ({decimal_hours(forecast.gpu_hours)} GPU-hours)"
    wall_clock = duration(forecast.critical_hours * HOUR)
    nodes = f"{forecast.nodes} nodes of " if forecast.nodes > 1 else ""
    model = f"{forecast.params:,} parameters on {nodes}{forecast.count} x {forecast.gpu}"
    # A step that does not fit is red, and says so too where there are no colours.
    rows = Table(
        title=f"{model}: {work}, {wall_clock} from start to end (estimates)",
        title_justify="left",
        caption=concurrency(forecast),
        caption_justify="left",
    )
    for heading, side in COLUMNS.items():
        rows.add_column(heading, justify=side, no_wrap=heading in WHOLE)
    for step in forecast.steps:
        # In the order of COLUMNS.
        rows.add_row(
            f"{step.step} *" if step.step in forecast.critical_steps else step.step,
            f"{step.params:,}",
            f"{step.tokens:,}" if step.tokens else "",  # a recovery by steps alone may have none
            f"{step.flops:.1e}",
            f"{step.nodes} x {step.gpus // step.nodes}" if step.nodes > 1 else f"{step.gpus}",
            f"{step.memory / GIB:.1f}",
            f"{step.tokens_per_second:,.0f}" if stage_of(step.step) == "recover" and step.tokens else "",
            decimal_hours(step.hours),
            decimal_hours(step.gpu_hours),
            step.note if step.fits else "; ".join(filter(None, ["does not fit", step.note])),
            style=None if step.fits else "red",
        )
    rows.add_section()
    totals = decimal_hours(forecast.hours), decimal_hours(forecast.gpu_hours)
    rows.add_row("all steps", *[""] * (len(COLUMNS) - 4), *totals, "")
    return rows


def concurrency(forecast: Forecast) -> str:
    """What the time from start to end rests on: the steps marked, and the GPUs that must be free at the same time."""
    steps = listed(forecast.busiest)
    return (
        "* critical path: no run ends sooner than these steps take, one after another. At its busiest the run holds "
        f"{forecast.busiest_gpus} GPUs: {steps} at the same time. With fewer, steps wait for each other; on "
        "the GPUs of one step the run takes as long as its work. Start-up of pods and queues are not counted."
    )
