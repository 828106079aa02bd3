"""The status of a pipeline run in MLflow: it follows from those of its steps, whichever reports last."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SETTLING = 5  # times that a status is computed anew when others change theirs at the same time
TAG = 4000  # characters of an error that a tag keeps
NOTE = "mlflow.note.content"  # the description on a run's page, in Markdown
LINK, FAILED = "[Run in Kubeflow]", "**Failed** in "  # how our descriptions begin


@dataclass(frozen=True)
class StepRun:
    """One step's MLflow run, and where its files go."""

    run_id: str
    parent_run_id: str
    experiment_id: str
    root: str  # the experiment's artifact location + /ptl: where records lie
    run: str  # id of the pipeline run
    artifact_uri: str  # of this MLflow run
    step: str = ""
    arm: str = "loop"


def settle(client: MlflowClient, step_run: StepRun) -> None:
    """Give the pipeline run's parent the status that follows from all of its steps, whichever reports last.

    A failed control does not fail the run, whose loop continues; the report ends it.
    """
    status, failed = _status(client, step_run)
    for _ in range(SETTLING):
        parent = client.get_run(step_run.parent_run_id)
        if parent.info.status != status:
            client.update_run(step_run.parent_run_id, status="RUNNING")  # a run that has ended may end anew
            if status != "RUNNING":
                client.set_terminated(step_run.parent_run_id, status)
        _describe(client, parent, step_run.run, failed)
        before, (status, failed) = status, _status(client, step_run)
        if status == before:  # else another step has ended or begun between the search and the write
            return


def _status(client: MlflowClient, step_run: StepRun) -> tuple[str, str]:
    """A pipeline run's status by those of its steps, and what failed."""
    runs = steps_of(client, step_run)
    failed = [run for run in runs if run.info.status == "FAILED" and run.data.tags.get("ptl.arm") == "loop"]
    if failed:
        tags = failed[0].data.tags
        return "FAILED", f"{tags['ptl.step']}: {tags.get('ptl.error', '')}"
    reported = any(run.data.tags["ptl.step"] == "report" and run.info.status == "FINISHED" for run in runs)
    return "FINISHED" if reported else "RUNNING", ""


def steps_of(client: MlflowClient, step_run: StepRun) -> list[Run]:
    """The runs of all steps that have begun, by name."""
    where = f"tags.`ptl.run` = '{step_run.run}' and tags.`ptl.role` = 'step'"
    named = by_step(client.search_runs([step_run.experiment_id], where))
    return [named[name] for name in sorted(named)]


def by_step(runs: Iterable[Run]) -> dict[str, Run]:
    """The run of each step, in the order in which they began; of several the one that finished, else the newest."""
    found: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.info.start_time):
        step = run.data.tags.get("ptl.step")
        if step and (step not in found or found[step].info.status != "FINISHED"):
            found[step] = run
    return found


def _describe(client: MlflowClient, parent: Run, run: str, error: str) -> None:
    """The short report of a run that failed, on its page in MLflow: which step, why, and how it continues."""
    tags, lines = parent.data.tags, []
    if page := kubeflow_page(run):
        lines.append(f"{LINK}({page})")
    if error:
        how = f"`ptl retry {run}`" if os.environ.get("KFP_RUN_ID") else "the same `ptl run` command"
        lines.append(f"{FAILED}{error}\n\nOnce that is fixed, {how} resumes it from what is finished.")
    wanted = {"ptl.error": error[:TAG]}
    if tags.get(NOTE, LINK).startswith((LINK, FAILED)):  # else somebody wrote a note of their own
        wanted[NOTE] = "\n\n".join(lines)
    for key, text in wanted.items():
        if text and tags.get(key) != text:
            client.set_tag(parent.info.run_id, key, text)
        elif not text and key in tags:
            untag(client, parent.info.run_id, key)


def untag(client: MlflowClient, run_id: str, key: str) -> None:
    """Delete a tag, unless another step has done so meanwhile."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_tag(run_id, key)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def kubeflow_page(run: str) -> str:
    """The run's page in Kubeflow, where the ConfigMap names the UI's address; else empty."""
    ui = os.environ.get("PTL_KFP_UI", "").rstrip("/")
    return f"{ui}/#/runs/details/{run}" if ui else ""


def tags_of_parent(run: str) -> dict[str, str]:
    """What the parent of a pipeline run is found by, and its link to Kubeflow."""
    page = kubeflow_page(run)
    return {"ptl.run": run} | ({"ptl.kubeflow": page} if page else {})


def node() -> str:
    """The machine that this step runs on: a cluster's node, by the pod's environment."""
    return os.environ.get("PTL_NODE") or platform.node()
