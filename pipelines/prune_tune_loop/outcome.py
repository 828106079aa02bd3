"""What a run that succeeded ended with: its result.json, and whether its gate was passed."""

import os
from typing import Any

from ptl import locate
from ptl.errors import InputError, WorkError


def result_of(run_id: str) -> dict[str, Any]:
    """A run's result.json, from its MLflow run. Raises WorkError: without it nobody knows whether the gate passed."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise WorkError(
            "the run succeeded, but MLFLOW_TRACKING_URI is not set here, so its gate cannot be read; set it (and the "
            "S3 credentials), or do without --wait"
        )
    try:
        return locate.result(run_id)
    except InputError as error:
        raise WorkError(f"the run succeeded, but its result.json cannot be read: {error}") from error


def gate_passed(result: dict[str, Any]) -> tuple[bool, str]:
    """Whether the loop reached its end: its last iteration was accepted."""
    iterations = [row for row in result["rows"] if row["arm"] == "loop" and row["iteration"] > 0]
    if not iterations:
        return False, "no iteration was scored"
    last = max(iterations, key=lambda row: row["iteration"])
    share = result["final"]["share_removed"]
    return last["verdict"] == "accepted", f"iteration {last['iteration']} {last['verdict']}, {share:.1%} removed"
