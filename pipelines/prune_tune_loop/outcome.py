"""What a run that succeeded ended with: its result.json, and whether its gate was passed."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ptl.errors import WorkError


def result_of(run_id: str, experiment: str) -> dict[str, Any]:
    """A run's result.json, from its MLflow run. Raises WorkError: without it nobody knows whether the gate passed."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise WorkError(
            "the run succeeded, but MLFLOW_TRACKING_URI is not set here, so its gate cannot be read; set it (and the "
            "S3 credentials), or do without --wait"
        )
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient()
        named = client.get_experiment_by_name(experiment)
        parent = f"tags.`ptl.run` = '{run_id}' and tags.`ptl.role` = 'parent'"
        runs = client.search_runs([named.experiment_id], parent, max_results=1) if named else []
        if not runs:  # Kubeflow's MLflow plugin puts runs into an experiment of its own
            everywhere = [entry.experiment_id for entry in client.search_experiments()]
            runs = client.search_runs(everywhere, parent, max_results=1)
        if not runs:
            raise WorkError(f"the run succeeded, but MLflow has no run {run_id}, in {experiment!r} or elsewhere")
        with tempfile.TemporaryDirectory() as folder:
            path = client.download_artifacts(runs[0].info.run_id, "report/result.json", folder)
            return dict(json.loads(Path(path).read_text()))
    except (MlflowException, OSError) as error:
        raise WorkError(f"the run succeeded, but its result.json cannot be read from MLflow: {error}") from error


def gate_passed(result: dict[str, Any]) -> tuple[bool, str]:
    """Whether the loop reached its end: its last iteration was accepted."""
    iterations = [row for row in result["rows"] if row["arm"] == "loop" and row["iteration"] > 0]
    if not iterations:
        return False, "no iteration was scored"
    last = max(iterations, key=lambda row: row["iteration"])
    share = result["final"]["share_removed"]
    return last["verdict"] == "accepted", f"iteration {last['iteration']} {last['verdict']}, {share:.1%} removed"
