"""A forecast as it is printed."""

from __future__ import annotations

from typing import Any

from ptl.forecast import Forecast
from ptl.forecast_steps import HOUR, StepForecast
from ptl.gpus import GIB
from ptl.units import duration

COLUMNS = ("Step", "Parameters", "Tokens", "FLOPs", "GiB per GPU", "Hours", "Note")
TEXTS = ("Step", "Note")  # all others are numbers


def table(forecast: Forecast) -> Any:
    """A forecast as a rich table; a star marks the steps of the critical path."""
    from rich.table import Table

    work = duration(forecast.hours * HOUR)
    wall_clock = duration(forecast.critical_hours * HOUR)
    model = f"{forecast.params:,} parameters on {forecast.count} x {forecast.gpu}"
    title = f"{model}: {work} of work, {wall_clock} from start to end (estimates)"
    rows = Table(title=title, title_justify="left", caption=concurrency(forecast), caption_justify="left")
    for heading in COLUMNS:
        rows.add_column(heading, justify="left" if heading in TEXTS else "right")
    for step in forecast.steps:
        critical = step.step in forecast.critical_steps
        rows.add_row(*_cells(step, critical), style=None if step.fits else "red")
    return rows


def _cells(step: StepForecast, critical: bool) -> list[str]:
    name = f"{step.step} *" if critical else step.step
    notes = [] if step.fits else ["does not fit"]
    if step.note:
        notes.append(step.note)
    return [
        name,
        f"{step.params:,}",
        f"{step.tokens:,}" if step.tokens else "",
        f"{step.flops:.1e}",
        f"{step.memory / GIB:.1f}",
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
