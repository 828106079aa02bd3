"""A run as text for the terminal: a table of its steps, a line for each change, a hint."""

import sys

from pipelines.prune_tune_loop.run_view import RunView, StepView


def hint_to_cancel(view: RunView) -> str:
    """What to do about a run that has failed but has not ended, since the other arm is still running; or ""."""
    # A failure of the control does not fail the run.
    failed = [step.name for step in view.steps if step.state == "FAILED" and not step.name.startswith("control-")]
    working = [step.name for step in view.steps if step.state == "RUNNING"]
    if view.state != "RUNNING" or not failed or not working:
        return ""
    return (
        f"{failed[0]} has failed, and the run ends when {', '.join(working)} has ended; `ptl cancel {view.run_id}` "
        "ends it now, and `ptl retry` then resumes both"
    )


def step_table(view: RunView) -> str:
    """The steps as a table for the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=view.name, title_justify="left")
    for heading in ("Step", "State"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Attempt", "Seconds", "Accuracy"):
        table.add_column(heading, justify="right")
    for heading in ("Verdict", "Training"):
        table.add_column(heading)
    for step in view.steps:
        table.add_row(
            step.name,
            step.state,
            _cell(step.attempt),
            _cell(step.seconds, ".0f"),
            _cell(step.accuracy, ".3f"),
            step.verdict,
            step.progress,
        )
    # A pipe has no width: rich would take 80 columns and wrap the last ones.
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def _cell(number: float | None, format_spec: str = "") -> str:
    return "" if number is None else format(number, format_spec)


def change_line(step: StepView) -> str:
    """A change of a step: its state, and with its end what came out."""
    text = f"{step.name}: {step.state}"
    # The first attempt is the usual case, and says nothing.
    if step.attempt and step.attempt > 1:
        text += f" (attempt {step.attempt})"
    if step.seconds is not None:
        text += f" in {step.seconds:.0f} s"
    if step.accuracy is not None:
        text += f", accuracy {step.accuracy:.3f}"
    if step.verdict:
        text += f", {step.verdict}"
    if step.reason:
        text += f": {step.reason}"
    return text


def state_text(view: RunView) -> str:
    """The state of the whole run."""
    states = {"CANCELED": "canceled", "CANCELING": "is being canceled"}
    return states.get(view.state, view.state)
