"""The MLflow runs of a pipeline run: its status follows from those of its steps, whichever reports last.

How far it is, is read by whoever watches it from outside; no torch, no kfp. A pod that is killed cannot end its MLflow
run, nor can a step that never started. Whoever sees that the pipeline run has ended therefore closes what is still
RUNNING.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ptl.lineage import mlflow_client
from ptl.lineage.mlflow_client import NOT_THERE, ignoring

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SETTLING = 5  # times that a status is computed anew when others change theirs at the same time
TAG = 4000  # characters of an error that a tag keeps
MAX_RUNS = 1000  # of one pipeline run; a run of 40 iterations has 125
NOTE = "mlflow.note.content"  # the description on a run's page, in Markdown
RESULT = "ptl.result"  # tag of a parent: the first lines of its report
TAGS = ("attempt", "taken_over_from", "verdict", "error", "loop_ended")  # of a step, without `ptl.`
# how our descriptions begin
LINK, FAILED, ENDED = "[Run in Kubeflow]", "**Failed** in ", "**Result**: "
PARENT = "tags.`ptl.role` = 'parent'"
# A watcher asks again soon: MLflow's own retries take minutes, and its timeout is two.
WATCHING = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
MAX_EARLIER = 20  # unfinished runs to take over from: each step asks for a record of each of them
TAKEN_OVER = "steps with the same inputs and settings may be taken over from"


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
    # ids of unfinished runs whose results may be taken over, the newest first
    earlier: tuple[str, ...] = ()


def records_root(artifact_location: str) -> str:
    """Where the records of an experiment's steps are."""
    return artifact_location.rstrip("/") + "/ptl"


def search(client: MlflowClient, experiment_ids: list[str], run: str, where: str = "") -> list[Run]:
    """The active MLflow runs of a pipeline run that satisfy `where`, the oldest first."""
    query = f"tags.`ptl.run` = '{run}'" + (f" and {where}" if where else "")
    order = ["attributes.start_time ASC"]
    return list(client.search_runs(experiment_ids, query, order_by=order, max_results=MAX_RUNS))


def steps_of(client: MlflowClient, experiment_id: str, run: str) -> dict[str, Run]:
    """The runs of all steps of a pipeline run that have begun, in that order."""
    return by_step(search(client, [experiment_id], run))


def by_step(runs: Iterable[Run]) -> dict[str, Run]:
    """The run of each step, in the order given; of several the one that finished, else the last."""
    steps: dict[str, Run] = {}
    for run in runs:
        step = run.data.tags.get("ptl.step")  # the parent has none
        finished = step in steps and steps[step].info.status == "FINISHED"
        if step and not finished:
            steps[step] = run
    return steps


def parent_among(runs: Iterable[Run]) -> Run | None:
    """The parent of a pipeline run: the one that finished, else the first; None where there is none.

    A run that was begun without Kubeflow's MLflow plugin and retried with it has two; one of them ended it.
    """
    parents = [run for run in runs if run.data.tags.get("ptl.role") == "parent"]
    finished = [run for run in parents if run.info.status == "FINISHED"]
    return next(iter(finished or parents), None)


def settle(client: MlflowClient, step_run: StepRun) -> None:
    """Give the pipeline run's parent the status that follows from all of its steps, whichever reports last.

    A failed control does not fail the run, whose loop continues; the report ends it.
    """
    parent_id = step_run.parent_run_id
    outcome = _status(client, step_run)
    # Steps that end at the same time see one another's status sooner or later.
    for _ in range(SETTLING):
        status, failure = outcome
        parent = client.get_run(parent_id)
        if parent.info.status != status:
            end_or_reopen = client.update_run if status == "RUNNING" else client.set_terminated
            end_or_reopen(parent_id, status)
        _describe(client, parent, step_run.run, failure)
        # Another step may have ended or begun between the search and the write.
        outcome = _status(client, step_run)
        if outcome == (status, failure):
            return


def _status(client: MlflowClient, step_run: StepRun) -> tuple[str, str]:
    """A pipeline run's status by those of its steps, and what failed."""
    runs = steps_of(client, step_run.experiment_id, step_run.run)
    # The report is the last step: one that failed before has been done again since, or the loop ended before it.
    report = runs.get("report")
    if report and report.info.status == "FINISHED":
        return "FINISHED", ""
    for step, run in sorted(runs.items()):
        tags = run.data.tags
        if tags.get("ptl.arm") == "loop" and run.info.status == "FAILED":
            error = tags.get("ptl.error", "")
            return "FAILED", f"{step}: {error}"
    return "RUNNING", ""


def _describe(client: MlflowClient, parent: Run, run: str, error: str) -> None:
    """The short report of a run, on its page in MLflow: its result, or which step failed, why, and how to resume it."""
    existing = parent.data.tags
    tags = {"ptl.error": error[:TAG]}
    # A note that somebody else wrote stays.
    if not existing.get(NOTE) or existing[NOTE].startswith((LINK, FAILED, ENDED)):
        tags[NOTE] = _note(run, error, existing.get(RESULT, ""))
    for key, text in tags.items():
        if existing.get(key, "") != text:
            put_tag(client, parent.info.run_id, key, text)


def _note(run: str, error: str, result: str) -> str:
    paragraphs = []
    if error:
        on_cluster = os.environ.get("KFP_RUN_ID")
        command = f"`ptl retry {run}`" if on_cluster else "the same `ptl run` command"
        paragraphs += [
            f"{FAILED}{error}",
            f"Once that is fixed, {command} resumes it from what is finished.",
        ]
    elif result:
        paragraphs.append(f"{ENDED}{result}")
    page = kubeflow_page(run)
    if page:
        paragraphs.append(f"{LINK}({page})")
    return "\n\n".join(paragraphs)


def put_tag(client: MlflowClient, run_id: str, key: str, text: str) -> None:
    """Set a tag of a run, or delete it where the text is empty."""
    if text:
        client.set_tag(run_id, key, text)
    else:
        with ignoring(NOT_THERE):
            client.delete_tag(run_id, key)


def kubeflow_page(run: str) -> str:
    """The run's page in Kubeflow, where the ConfigMap names the UI's address; else empty."""
    ui = os.environ.get("PTL_KFP_UI", "").rstrip("/")
    return f"{ui}/#/runs/details/{run}" if ui else ""


def tags_of_parent(run: str) -> dict[str, str]:
    """What the parent of a pipeline run is found by, and its link to Kubeflow."""
    page = kubeflow_page(run)  # local runs have none
    return {"ptl.run": run, "ptl.role": "parent"} | ({"ptl.kubeflow": page} if page else {})


@dataclass(frozen=True)
class StepProgress:
    """What one step's MLflow run says of it, as texts; empty where it says nothing."""

    step: str = ""  # name, such as prune-2
    run_id: str = ""  # in MLflow
    status: str = ""  # RUNNING, FINISHED, FAILED or KILLED
    ended: datetime | None = None
    attempt: str = ""  # number of the newest attempt, from 1
    taken_over_from: str = ""  # id of an earlier run that has done the work
    seconds: str = ""  # of work in this run, when it has ended
    accuracy: str = ""  # of an evaluate step, 0 to 1
    verdict: str = ""  # of an evaluate step
    # `51,200 of 500,000 tokens, loss 0.457`, while it trains; or that its nodes start again
    training: str = ""
    error: str = ""  # why the last attempt failed
    loop_ended: str = ""  # why the loop ended with this step, before its last iteration


@dataclass(frozen=True)
class RunProgress:
    """A pipeline run in MLflow: its parent run and the steps that have begun."""

    experiment_id: str
    parent_id: str
    parent_status: str  # as of a step
    steps: dict[str, StepProgress]


def read(run: str, experiment_ids: list[str] | None = None) -> RunProgress | None:
    """The progress of a pipeline run by its id; None where MLflow has no parent run of it.

    One request with `experiment_ids`; without, all experiments are searched, for which they are listed first.
    Raises InputError when MLFLOW_TRACKING_URI is not set, WorkError when MLflow does not answer.
    """
    with _watching() as client:
        if experiment_ids is None:
            experiment_ids = mlflow_client.experiment_ids(client)
        runs = search(client, experiment_ids, run)
    parent = parent_among(runs)
    if parent is None:
        return None
    steps = {step: _step_progress(step, entry) for step, entry in by_step(runs).items()}
    return RunProgress(parent.info.experiment_id, parent.info.run_id, parent.info.status, steps)


def close(
    progress: RunProgress,
    status: str,
    reason: str,
    reasons: dict[str, str],
    succeeded: Collection[str] = (),
) -> bool:
    """End what is still RUNNING of a pipeline run that has ended; returns whether there was anything.

    `status` is FAILED, KILLED or FINISHED; the steps that `succeeded` are FINISHED in any case. `reasons` are those of
    single steps, `reason` that of the parent and of all others; they become the tag `ptl.error`. Raises WorkError when
    MLflow does not answer.
    """
    ends = {}  # status and error by the id of the MLflow run
    for step in progress.steps.values():
        if step.status == "RUNNING":
            end = "FINISHED" if step.step in succeeded else status
            ends[step.run_id] = end, reasons.get(step.step) or reason
    if progress.parent_status == "RUNNING":
        ends[progress.parent_id] = status, reason
    with _watching() as client:
        for run_id, (end, error) in ends.items():
            if end != "FINISHED":
                client.set_tag(run_id, "ptl.error", error[:TAG])
            client.set_terminated(run_id, end)
    return bool(ends)


def reopen(progress: RunProgress) -> None:
    """Set the parent to RUNNING again, without its error: the pipeline run is retried. Steps reopen their own runs."""
    with _watching() as client:
        client.update_run(progress.parent_id, status="RUNNING")
        put_tag(client, progress.parent_id, "ptl.error", "")


def unfinished(name: str) -> list[str]:
    """Ids of the unfinished pipeline runs of a config of this name, the newest first.

    In all experiments: Kubeflow's MLflow plugin chooses one of its own.
    """
    query = f"{PARENT} and attributes.status != 'FINISHED' and attributes.run_name LIKE '{name}-%'"
    order = ["attributes.start_time DESC"]
    with _watching() as client:
        runs = client.search_runs(
            mlflow_client.experiment_ids(client), query, order_by=order, max_results=100
        )
    # The query also fits a longer name; those of runs end with their time and four digits.
    ours = [
        run
        for run in runs
        if re.fullmatch(rf"{re.escape(name)}-\d+-\d+-[0-9a-f]+", run.info.run_name)
    ]
    return [run.data.tags["ptl.run"] for run in ours[:MAX_EARLIER]]


def _step_progress(step: str, run: Run) -> StepProgress:
    tags, metrics = run.data.tags, run.data.metrics
    is_running = run.info.status == "RUNNING"
    ended = run.info.end_time  # milliseconds
    return StepProgress(
        step=step,
        run_id=run.info.run_id,
        status=run.info.status,
        ended=datetime.fromtimestamp(ended / 1000, UTC) if ended else None,
        # What was taken over has the time that the other run took.
        seconds=""
        if is_running or "ptl.taken_over_from" in tags
        else _text(metrics, "seconds", ".0f"),
        accuracy=_text(metrics, "accuracy", ".3f"),
        training=_training(tags, metrics) if is_running else "",
        **{name: tags.get(f"ptl.{name}", "") for name in TAGS},
    )


def _training(tags: dict[str, str], metrics: dict[str, float]) -> str:
    # While its nodes start again the numbers are those from before.
    if tags.get("ptl.nodes"):
        return tags["ptl.nodes"]
    seen = _text(metrics, "train/num_input_tokens_seen", ",.0f")
    planned = f" of {int(tags['ptl.tokens']):,}" if "ptl.tokens" in tags else ""
    loss = _text(metrics, "train/loss", ".3f")
    text = f"{seen}{planned} tokens" if seen else ""
    return f"{text}, loss {loss}" if text and loss else text


def _text(metrics: dict[str, float], name: str, form: str) -> str:
    return format(metrics[name], form) if name in metrics else ""


@contextmanager
def _watching() -> Iterator[MlflowClient]:
    """A client with few retries and a short timeout, unless the environment says otherwise."""
    with mlflow_client.briefly(WATCHING), mlflow_client.connected() as client:
        yield client
