"""A forecast as it is printed."""

from __future__ import annotations

from typing import Any, Literal

from ptl.preflight.forecast import Forecast
from ptl.preflight.forecast_steps import HOUR, StepForecast
from ptl.preflight.gpus import GIB
from ptl.units import duration

# Heading -> side on which the column is flush: texts left, numbers right.
COLUMNS: dict[str, Literal["left", "right"]] = {
    "Step": "left",
    "Parameters": "right",
    "Tokens": "right",
    "FLOPs": "right",
    "GiB per GPU": "right",
    "Hours": "right",
    "Note": "left",
}


def table(forecast: Forecast) -> Any:
    """A forecast as a rich table; a star marks the steps of the critical path."""
    from rich.table import Table

    # The work of all steps, and the time from start to end where none waits for a GPU.
    work = duration(forecast.hours * HOUR)
    wall_clock = duration(forecast.critical_hours * HOUR)
    model = f"{forecast.params:,} parameters on {forecast.count} x {forecast.gpu}"
    title = f"{model}: {work} of work, {wall_clock} from start to end (estimates)"
    caption = concurrency(forecast)

    # A step that does not fit is red, and says so too where there are no colours.
    rows = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for heading, side in COLUMNS.items():
        rows.add_column(heading, justify=side)
    for step in forecast.steps:
        critical = step.step in forecast.critical_steps
        style = None if step.fits else "red"
        rows.add_row(*_cells(step, critical), style=style)
    return rows


def _cells(step: StepForecast, critical: bool) -> list[str]:
    """A step's row, in the order of COLUMNS."""
    name = f"{step.step} *" if critical else step.step
    notes = [] if step.fits else ["does not fit"]
    if step.note:
        notes.append(step.note)
    memory = step.memory / GIB
    tokens = f"{step.tokens:,}" if step.tokens else ""  # a recovery by steps alone may have none
    return [
        name,
        f"{step.params:,}",
        tokens,
        f"{step.flops:.1e}",
        f"{memory:.1f}",
        f"{step.hours:.2f}",
        "; ".join(notes),
    ]


def concurrency(forecast: Forecast) -> str:
    """What the time from start to end rests on: the steps marked, and the GPUs that must be free at the same time."""
    *others, last = forecast.busiest
    steps = ", ".join(others)
    return (
        "* critical path: no run ends sooner than these steps take, one after another. At its busiest the run holds "
        f"{forecast.busiest_gpus} GPUs: {steps} and {last} at the same time. With fewer, steps wait for each other; on "
        "the GPUs of one step the run takes as long as its work. Start-up of pods and queues are not counted."
    )
