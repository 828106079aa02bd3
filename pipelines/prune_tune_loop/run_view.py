"""A run and its steps as people see them: the steps' own records, Kubeflow's list, pods that cannot start."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.prune_tune_loop.pods import Pod
from pipelines.prune_tune_loop.task_list import DRIVER, ENDED, STAGES, ListedStep, retried_at
from ptl.lineage.progress import RunProgress, StepProgress

NOT_LISTED = "not listed by Kubeflow"
WAITING = "waiting"
NOT_STARTED = "not started"
NOT_NEEDED = "not needed"
COMPLETE = 12  # steps of a run whose list Kubeflow never stops updating, however much a step takes of the workflow
SOON = 60.0  # seconds in which a pod usually starts
# How a stage needs less memory.
SMALLER_BATCH = {
    "prune": " or lower calibration.batch_size",
    "recover": " or raise recover.accumulation, which splits the batch",
    "evaluate": " or lower evaluate.batch_size",
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
    pending: str = ""  # why it has been pending for long, with its remedy
    pending_kind: str = ""  # of that, in one word


@dataclass(frozen=True)
class RunView:
    """A run with its steps in the order of the loop."""

    run_id: str
    name: str
    state: str  # as Kubeflow says, but CANCELED and CANCELING where it was canceled
    canceled: datetime | None  # when it was asked to end, since it was last retried
    where: str  # options of kubectl that select its pods
    page: str  # its address in the UI
    is_recorded: bool  # MLflow was read and knows it
    is_long: bool  # Kubeflow may have stopped updating its list
    steps: list[StepView]

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
            return self.look("describe workflows,pods")
        # The control's failures do not fail the run: the first one of the loop comes before them.
        culprit = min(failed, key=lambda step: "control" in step.name)
        return f"{culprit.name}: {culprit.reason}"

    def look(self, command: str) -> str:
        """Where to look for more, with one of kubectl's commands."""
        return f"see `kubectl {command} {self.where}` and {self.page}"


@dataclass(frozen=True)
class Sources:
    """What is known of one step, from where."""

    record: StepProgress | None  # in MLflow, of the time since the run was last retried
    task: ListedStep | None
    pod: Pod | None  # that is pending or has failed
    is_needed: bool  # the gate has not ended the loop before it


def view(
    run: Any,
    names: dict[str, str],
    listed: dict[str, ListedStep],
    pods: dict[str, Pod],
    records: RunProgress | None,
    namespace: str,
    page: str,
) -> RunView:
    """Join what is known of a run's steps: `names`, `listed` and `pods` are by task key.

    A step's own record comes first, then its pod, then Kubeflow's list.
    """
    canceled = _canceled_at(run)
    state = run.state
    if canceled:
        state = "CANCELED" if run.state in ENDED else "CANCELING"
    where = f"-n {namespace} -l pipeline/runid={run.run_id}"
    is_long = len(names) > COMPLETE
    seen = RunView(run.run_id, run.display_name, state, canceled, where, page, records is not None, is_long, [])

    retried = retried_at(run)
    all_records = records.steps if records else {}
    current = {step: record for step, record in all_records.items() if not _is_before(record, retried)}
    # The step with which the gate ended the loop before its last iteration
    ends = [name for name in names.values() if name in all_records and all_records[name].loop_ended]
    culprits = _culprits(current) or {names[key] for key, task in listed.items() if task.state == "FAILED"}
    for key, name in names.items():
        is_needed = not (ends and _is_of_later_iteration(name, ends[0]))
        step = Sources(current.get(name), listed.get(key), pods.get(key), is_needed)
        is_bystander = bool(culprits) and name not in culprits
        # Also of an attempt before the retry: its seconds and its attempt are shown until the step begins again.
        seen.steps.append(_step_view(name, step, all_records.get(name), is_bystander, seen))
    return seen


def _canceled_at(run: Any) -> datetime | None:
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


def _culprits(records: dict[str, StepProgress]) -> set[str]:
    """Steps that made the run fail; a step of the control that says why it could not finish does not."""
    failed = {step for step, record in records.items() if record.status == "FAILED" and record.error}
    return {step for step in failed if "control" not in step}


def _is_before(record: StepProgress, retried: datetime | None) -> bool:
    """Whether a failure belongs to the time before the run was retried: the step has not begun again."""
    if retried is None or record.ended is None:
        return False
    return record.status in ("FAILED", "KILLED") and record.ended < retried


def _is_of_later_iteration(name: str, last: str) -> bool:
    """Whether a step belongs to an iteration of the loop after that of the step `last`."""
    number, last_number = (step.rpartition("-")[2] for step in (name, last))
    return number.isdigit() and last_number.isdigit() and int(number) > int(last_number)


def _state(step: Sources, run: RunView) -> str:
    """The state of a step. A pod that is killed leaves its record RUNNING."""
    record, task = step.record, step.task
    if record is not None and record.status == "FINISHED":
        return "SUCCEEDED"
    if step.pod is not None and step.pod.is_pending and not run.ended:
        return "PENDING"
    listed_state = task.state if task else ""
    # After the end of the loop a step has nothing to do; only one that failed is worth reporting.
    if record is None and not step.is_needed and listed_state != "FAILED":
        return NOT_NEEDED
    if record is None and listed_state != "FAILED":
        return listed_state or _unlisted_state(task, run)
    if record is not None and record.status == "RUNNING":
        if not run.ended and (run.canceled or listed_state != "FAILED"):
            return "RUNNING"
        if "SUCCEEDED" in (run.state, listed_state):
            return "SUCCEEDED"
    ended = record.ended if record else task.ended if task else None
    return "CANCELED" if run.canceled and (ended is None or ended >= run.canceled) else "FAILED"


def _unlisted_state(task: ListedStep | None, run: RunView) -> str:
    """The state of a step without a record that Kubeflow does not list, or lists without a state."""
    if task is not None:
        return NOT_STARTED
    # The steps' records show that one without has not begun. The list alone shows it while it is complete.
    if run.is_long and not (run.is_recorded and not run.ended):
        return NOT_LISTED
    return NOT_STARTED if run.ended else WAITING


def _step_view(name: str, step: Sources, record: StepProgress | None, is_bystander: bool, run: RunView) -> StepView:
    """`record` may be of the time before a retry, unlike that of `step`."""
    state = _state(step, run)
    scored = record if state == "SUCCEEDED" else None
    task = step.task
    seconds = None
    if record is not None:
        seconds = None if state == "RUNNING" else record.seconds
    elif state == "SUCCEEDED" and task and task.started and task.ended:
        # Kubeflow's times are all there is without a record; they include the pod's start.
        seconds = (task.ended - task.started).total_seconds()
    pending, kind = _pending(name, step, run) if state == "PENDING" else ("", "")
    return StepView(
        name,
        state,
        attempt=record.attempt if record else None,
        seconds=seconds,
        accuracy=scored.accuracy if scored else None,
        verdict=scored.verdict if scored else "",
        progress=_training_progress(record) if record and state == "RUNNING" else "",
        reason=_failure(name, step, is_bystander, run) if state == "FAILED" else "",
        pending=pending,
        pending_kind=kind,
    )


def _failure(name: str, step: Sources, is_bystander: bool, run: RunView) -> str:
    """Why a step failed; a bystander is one that was running when another made the run fail."""
    record = step.record
    if record is not None and (record.error or is_bystander):
        return record.error or "it was stopped when the run failed"
    cause = step.task.cause if step.task else ""
    if step.pod and step.pod.reason and not step.pod.is_pending:
        cause = step.pod.sentence
    elif record is not None:
        cause = "killed from outside, most likely out of memory (or past resources.timeout)"
    if "OOMKilled" in cause or "out of memory" in cause:
        stage = _stage(name)
        cause += f": raise resources.memory or resources.steps.{stage}.memory{SMALLER_BATCH.get(stage, '')}"
    # Where a container has run, its log says more than its pod.
    has_log = record is None and cause in ("", DRIVER)
    where = run.look("logs -c main --prefix --tail=20" if has_log else "describe workflows,pods")
    return f"{cause}; {where}" if cause else where


def _stage(name: str) -> str:
    return next((stage for stage in STAGES if stage in name), name.partition("-")[0])


def _pending(name: str, step: Sources, run: RunView) -> tuple[str, str]:
    """Why a step has been pending for long, with a remedy, and in one word; empty within the first minute."""
    pod = step.pod
    since = pod.created if pod else step.task and step.task.started
    seconds = (_now() - since).total_seconds() if since else 0.0
    if seconds < SOON:
        return "", ""
    text = f"pending for {seconds // 60:.0f} min"
    if pod is None or not pod.sentence:
        return f"{text}; {run.look('describe workflows,pods')}", "unknown"
    remedy = pod.remedy(_stage(name))
    return f"{text}: {pod.sentence}" + (f"; {remedy}" if remedy else ""), pod.reason or "refused"


def _now() -> datetime:
    return datetime.now(UTC)


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
