"""A run and its steps as people see them: Kubeflow's states joined with the steps' own records in MLflow."""

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from pipelines.prune_tune_loop.task_list import ENDED, STAGES, ListedStep
from ptl.lineage.progress import RunProgress, StepProgress

NOT_LISTED = "not listed by Kubeflow"
WAITING = "waiting"
NOT_STARTED = "not started"
NOT_NEEDED = "not needed"
# How a stage needs less memory.
SMALLER_BATCH = {
    "prune": " or lower calibration.batch_size",
    "recover": " or raise recover.accumulation, which splits the batch",
    "evaluate": " or lower evaluate.batch_size",
}
# Why no container ran, as far as Kubeflow's list shows it; and the command of kubectl that says more.
CAUSES = {
    "": ("", "logs"),
    "driver": ("its driver failed: no container of the step was started", "logs"),
    "refused": ("no container of the step was started: Kubernetes refused its pod", "get workflow"),
    "not started": (
        "its pod did not start before its time ran out, as with an image, a volume or a node that is not there",
        "describe",
    ),
}


@dataclass(frozen=True)
class StepView:
    """One line of the table."""

    name: str
    state: str  # of Kubeflow, or one of the four above
    attempt: int | None = None
    seconds: float | None = None  # wall-clock, once it has ended
    accuracy: float | None = None  # of an evaluation
    verdict: str = ""  # of the gate
    progress: str = ""  # of a training, while it runs
    reason: str = ""  # of a failure, with its remedy


@dataclass(frozen=True)
class RunView:
    """A run with its steps in the order of the loop."""

    run_id: str
    name: str
    state: str  # as Kubeflow says, but CANCELED and CANCELING where it was canceled
    steps: list[StepView]
    where_to_look: str  # when nothing says why it failed

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def reason(self) -> str:
        """Why it did not succeed, in one line."""
        if self.state == "CANCELED":
            return "canceled"
        if self.state != "FAILED":
            return ""
        failed = [step for step in self.steps if step.state == "FAILED"]
        if not failed:
            return self.where_to_look
        # The control's failures do not fail the run: the first one of the loop comes before them.
        culprit = min(failed, key=lambda step: "control" in step.name)
        return f"{culprit.name}: {culprit.reason}"


def _where_to_look(
    namespace: str,  # of the run's pods
    run_id: str,
    page: str,  # the run's address in the UI
    task: ListedStep | None = None,
) -> str:
    """Where the log of a step is, or else its pod."""
    # A pod that never ran has no log: the workflow or the pod's events say more.
    _, command = CAUSES[task.cause if task else ""]
    selector = f"-n {namespace} -l pipeline/runid={run_id}"
    pods = f"kubectl get pods {selector}"
    if command == "get workflow":
        pods = f"kubectl get workflow {selector} -o yaml"
    elif task and task.pod:
        pods = f"kubectl {command} -n {namespace} $({pods} -o name | grep -e -{task.pod})"
    return f"see `{pods}` and {page}"


def view(
    run: Any,
    names: dict[str, str],
    listed: dict[str, ListedStep],
    records: RunProgress | None,
    namespace: str,
    link: str,
) -> RunView:
    """Join what Kubeflow lists (by task key) with the steps' records in MLflow; `names` are the steps by task key.

    A step's record wins over Kubeflow's list, which stops being updated when a run has many tasks. `namespace` and
    `link`, the run's page, are for the sentences that say where to look.
    """
    where_to_look = partial(_where_to_look, namespace, run.run_id, link)
    canceled = canceled_at(run)
    run_state = run.state
    if canceled:
        run_state = "CANCELED" if run.state in ENDED else "CANCELING"
    all_records = records.steps if records else {}
    current_records = {step: record for step, record in all_records.items() if not _is_before_retry(record, run)}
    # The step with which the gate ended the loop before its last iteration
    ends = [name for name in names.values() if name in all_records and all_records[name].loop_ended]
    culprits = _culprits(names, listed, current_records)
    steps = []
    for key, name in names.items():
        task = listed.get(key)
        record = current_records.get(name)
        if record is not None:
            state = _recorded_state(record, task, run_state, canceled)
        else:
            state = _listed_state(
                task,
                run_state,
                canceled,
                is_needed=not (ends and _is_of_later_iteration(name, ends[0])),
                is_recorded=records is not None,
            )
        reason = ""
        if state == "FAILED":
            is_bystander = bool(culprits) and name not in culprits
            reason = _failure(name, task, record, is_bystander, where_to_look(task))
        # Also of an attempt before the retry: its seconds and its attempt are shown until the step begins again.
        steps.append(_step_view(name, state, task, all_records.get(name), reason))
    return RunView(run.run_id, run.display_name, run_state, steps, where_to_look())


def canceled_at(run: Any) -> datetime | None:
    """When the run, since it was last started or retried, was asked to end; Kubeflow then says FAILED in the end."""
    history = run.state_history or []
    for entry in reversed(history):
        if entry.state == "CANCELING":
            return entry.update_time
        if entry.state in ("PENDING", "RUNNING"):
            break
    if run.state in ("CANCELING", "CANCELED"):  # just asked: the history does not have it yet
        return history[-1].update_time if history else run.created_at
    return None


def _culprits(
    names: dict[str, str],
    listed: dict[str, ListedStep],
    records: dict[str, StepProgress],
) -> set[str]:
    """Steps that made the run fail; a step of the control that says why it could not finish does not."""
    failed = {step for step, record in records.items() if record.status == "FAILED" and record.error}
    culprits = {step for step in failed if "control" not in step}
    # Without such a record Kubeflow's list is all there is.
    return culprits or {names[key] for key, task in listed.items() if task.state == "FAILED"}


def _recorded_state(
    record: StepProgress,
    task: ListedStep | None,
    run_state: str,
    canceled: datetime | None,
) -> str:
    """The state of a step that has a record in MLflow. A pod that is killed leaves its record RUNNING."""
    listed_state = task.state if task else ""
    if record.status == "FINISHED":
        return "SUCCEEDED"
    if record.status == "RUNNING" and run_state not in ENDED:
        return "FAILED" if listed_state == "FAILED" and not canceled else "RUNNING"
    if record.status == "RUNNING" and "SUCCEEDED" in (run_state, listed_state):
        return "SUCCEEDED"
    if canceled and (record.ended is None or record.ended >= canceled):
        return "CANCELED"
    return "FAILED"


def _listed_state(
    task: ListedStep | None,
    run_state: str,
    canceled: datetime | None,
    *,
    is_needed: bool,
    is_recorded: bool,
) -> str:
    """The state of a step without a record. `is_recorded`: MLflow was read and knows the run."""
    failed = task is not None and task.state == "FAILED"
    # After the end of the loop a step has nothing to do; only one that failed is worth reporting.
    if not is_needed and not failed:
        return NOT_NEEDED
    if task is None:
        # The steps' records show that one without has not begun; the list alone shows nothing.
        return WAITING if is_recorded and run_state not in ENDED else NOT_LISTED
    if failed and canceled and (task.ended is None or task.ended >= canceled):
        return "CANCELED"
    return task.state or NOT_STARTED


def _is_before_retry(record: StepProgress, run: Any) -> bool:
    """Whether a failure belongs to the time before the run was retried: the step has not begun again."""
    # Each retry adds a RUNNING to the history.
    starts = [entry.update_time for entry in run.state_history or [] if entry.state == "RUNNING"]
    if len(starts) < 2 or record.ended is None:
        return False
    return record.status in ("FAILED", "KILLED") and bool(record.ended < starts[-1])


def _is_of_later_iteration(name: str, last: str) -> bool:
    """Whether a step belongs to an iteration of the loop after that of the step `last`."""
    number, last_number = (step.rpartition("-")[2] for step in (name, last))
    return number.isdigit() and last_number.isdigit() and int(number) > int(last_number)


def _failure(
    name: str,
    task: ListedStep | None,
    record: StepProgress | None,
    is_bystander: bool,
    where_to_look: str,
) -> str:
    """Why a step failed; a bystander is one that was running when another made the run fail."""
    if record is None:
        cause, _ = CAUSES[task.cause if task else ""]
        return f"{cause}; {where_to_look}" if cause else where_to_look
    if record.error:
        return record.error
    if is_bystander:
        return "it was stopped when the run failed"
    stage = next((stage for stage in STAGES if stage in name), name.partition("-")[0])
    return (
        "killed from outside, most likely out of memory (or past resources.timeout): raise resources.memory or "
        f"resources.steps.{stage}.memory{SMALLER_BATCH.get(stage, '')}; {where_to_look}"
    )


def _step_view(
    name: str,
    state: str,
    task: ListedStep | None,
    record: StepProgress | None,
    reason: str,
) -> StepView:
    if record is None:
        # Kubeflow's times are all there is without a record; they include the pod's start.
        seconds = None
        if state == "SUCCEEDED" and task and task.started and task.ended:
            seconds = (task.ended - task.started).total_seconds()
        return StepView(name, state, seconds=seconds, reason=reason)
    succeeded = state == "SUCCEEDED"
    running = state == "RUNNING"
    return StepView(
        name,
        state,
        attempt=record.attempt,
        seconds=None if running else record.seconds,
        accuracy=record.accuracy if succeeded else None,
        verdict=record.verdict if succeeded else "",
        progress=_training_progress(record) if running else "",
        reason=reason,
    )


def _training_progress(record: StepProgress) -> str:
    """`51,200 of 500,000 tokens, loss 0.457`; empty for a step that does not train."""
    if record.tokens_seen is None:
        return ""
    text = f"{record.tokens_seen:,}"
    if record.tokens_planned:
        text += f" of {record.tokens_planned:,}"
    text += " tokens"
    if record.loss is not None:
        text += f", loss {record.loss:.3f}"
    return text
