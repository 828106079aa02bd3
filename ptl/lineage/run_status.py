"""The status of a pipeline run in MLflow: it follows from those of its steps, whichever reports last."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptl.lineage import mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SETTLING = 5  # times that a status is computed anew when others change theirs at the same time
TAG = 4000  # characters of an error that a tag keeps
NOTE = "mlflow.note.content"  # the description on a run's page, in Markdown
RESULT = "ptl.result"  # tag of a parent: the first lines of its report
LINK, FAILED, ENDED = "[Run in Kubeflow]", "**Failed** in ", "**Result**: "  # how our descriptions begin


@dataclass(frozen=True)
class StepRun:
    """One step's MLflow run, and where its files go."""

    run_id: str
    parent_run_id: str
    experiment_id: str
    root: str  # where the records are: `records_root` of the experiment
    run: str  # id of the pipeline run
    artifact_uri: str  # of this MLflow run
    step: str  # name, such as prune-2
    arm: str  # loop or control
    earlier: tuple[str, ...] = ()  # ids of unfinished runs whose results may be taken over, the newest first


def records_root(artifact_location: str) -> str:
    """Where the records of an experiment's steps are."""
    return artifact_location.rstrip("/") + "/ptl"


def settle(client: MlflowClient, step_run: StepRun) -> None:
    """Give the pipeline run's parent the status that follows from all of its steps, whichever reports last.

    A failed control does not fail the run, whose loop continues; the report ends it.
    """
    parent_id = step_run.parent_run_id
    status, failure = _status(client, step_run)
    # Steps that end at the same time see one another's status sooner or later.
    for _ in range(SETTLING):
        parent = client.get_run(parent_id)
        if parent.info.status != status:
            client.update_run(parent_id, status="RUNNING")  # a run that has ended may end anew
            if status != "RUNNING":
                client.set_terminated(parent_id, status)
        _describe(client, parent, step_run.run, failure)
        # Another step may have ended or begun between the search and the write.
        before = status
        status, failure = _status(client, step_run)
        if status == before:
            return


def _status(client: MlflowClient, step_run: StepRun) -> tuple[str, str]:
    """A pipeline run's status by those of its steps, and what failed."""
    runs = steps_of(client, step_run.experiment_id, step_run.run)
    for step, run in sorted(runs.items()):
        tags = run.data.tags
        in_loop = tags.get("ptl.arm") == "loop"
        if in_loop and run.info.status == "FAILED":
            return "FAILED", f"{step}: {tags.get('ptl.error', '')}"
    # The report is the last step.
    report = runs.get("report")
    if report and report.info.status == "FINISHED":
        return "FINISHED", ""
    return "RUNNING", ""


def steps_of(client: MlflowClient, experiment_id: str, run: str) -> dict[str, Run]:
    """The runs of all steps of a pipeline run that have begun, in that order."""
    query = f"tags.`ptl.run` = '{run}' and tags.`ptl.role` = 'step'"
    runs = client.search_runs([experiment_id], query)
    return by_step(runs)


def by_step(runs: Iterable[Run]) -> dict[str, Run]:
    """The run of each step, in the order in which they began; of several the one that finished, else the newest."""
    steps: dict[str, Run] = {}
    for run in sorted(runs, key=_start_time):
        step = run.data.tags.get("ptl.step")  # the parent has none
        finished = step in steps and steps[step].info.status == "FINISHED"
        if step and not finished:
            steps[step] = run
    return steps


def _start_time(run: Run) -> int:
    """In milliseconds."""
    return int(run.info.start_time)


def parent_among(runs: list[Run]) -> Run:
    """The parent of a pipeline run: the one that finished, else the oldest.

    A run that was begun without Kubeflow's MLflow plugin and retried with it has two; one of them ended it.
    """
    finished = [run for run in runs if run.info.status == "FINISHED"]
    return min(finished or runs, key=_start_time)


def _describe(client: MlflowClient, parent: Run, run: str, error: str) -> None:
    """The short report of a run, on its page in MLflow: its result, or which step failed, why, and how to resume it."""
    parent_id = parent.info.run_id
    existing = parent.data.tags
    tags = {"ptl.error": error[:TAG]}
    # A note that somebody else wrote stays.
    note = existing.get(NOTE, LINK)
    if note.startswith((LINK, FAILED, ENDED)):
        tags[NOTE] = _note(run, error, existing.get(RESULT, ""))
    for key, text in tags.items():
        if text and existing.get(key) != text:
            client.set_tag(parent_id, key, text)
        elif not text and key in existing:
            untag(client, parent_id, key)


def _note(run: str, error: str, result: str) -> str:
    paragraphs = []
    if error:
        on_cluster = os.environ.get("KFP_RUN_ID")
        command = f"`ptl retry {run}`" if on_cluster else "the same `ptl run` command"
        paragraphs += [f"{FAILED}{error}", f"Once that is fixed, {command} resumes it from what is finished."]
    elif result:
        paragraphs.append(f"{ENDED}{result}")
    page = kubeflow_page(run)
    if page:
        paragraphs.append(f"{LINK}({page})")
    return "\n\n".join(paragraphs)


def untag(client: MlflowClient, run_id: str, key: str) -> None:
    """Delete a tag, unless another step has done so meanwhile."""
    with mlflow_client.ignoring(mlflow_client.NOT_THERE):
        client.delete_tag(run_id, key)


def kubeflow_page(run: str) -> str:
    """The run's page in Kubeflow, where the ConfigMap names the UI's address; else empty."""
    ui = os.environ.get("PTL_KFP_UI", "").rstrip("/")
    return f"{ui}/#/runs/details/{run}" if ui else ""


def tags_of_parent(run: str) -> dict[str, str]:
    """What the parent of a pipeline run is found by, and its link to Kubeflow."""
    tags = {"ptl.run": run}
    # Local runs have no page.
    page = kubeflow_page(run)
    if page:
        tags["ptl.kubeflow"] = page
    return tags


def node() -> str:
    """The machine that this step runs on: a cluster's node, by the pod's environment."""
    return os.environ.get("PTL_NODE") or platform.node()
