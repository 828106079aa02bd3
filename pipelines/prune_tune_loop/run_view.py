"""A run and its steps as people see them: the steps' own records, Kubeflow's state of the run, pods that cannot start."""

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
COMPLETE = 12  # steps of a run whose list Kubeflow never stops updating; of 18 it listed 12 to 18
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
    pending: str = ""  # why it has been pending for long, with a remedy
    pending_kind: str = ""  # of that, in one word


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


@dataclass(frozen=True)
class Sources:
    """All that is known of a run."""

    run: Any  # as Kubeflow describes it
    names: dict[str, str]  # of the steps, by task key, in the order of the loop
    listed: dict[str, ListedStep]  # by task key
    records: RunProgress | None = None  # in MLflow
    pods: dict[str, Pod] | None = None  # by task key; None where they are not read
    namespace: str = "kubeflow"  # of the pods
    page: str = ""  # the run's address in the UI

    @property
    def canceled(self) -> datetime | None:
        """When the run, since it was last retried, was asked to end; Kubeflow then says FAILED in the end."""
        history = self.run.state_history or []
        for entry in reversed(history):
            if entry.state == "CANCELING":
                return entry.update_time
            if entry.state in ("PENDING", "RUNNING"):
                break
        if self.run.state in ("CANCELING", "CANCELED"):  # just asked: the history does not have it yet
            return history[-1].update_time if history else self.run.created_at
        return None

    @property
    def state(self) -> str:
        if not self.canceled:
            return str(self.run.state)
        return "CANCELED" if self.ended else "CANCELING"

    @property
    def ended(self) -> bool:
        return self.run.state in ENDED

    def is_canceled(self, ended: datetime | None) -> bool:
        """Whether what ended then was ended by a request to cancel the run."""
        return self.canceled is not None and (ended is None or ended >= self.canceled)

    def look(self, command: str) -> str:
        """Where to look for more, with one of kubectl's commands."""
        selector = f"-n {self.namespace} -l pipeline/runid={self.run.run_id}"
        return f"see `kubectl {command} {selector}` and {self.page}"


@dataclass(frozen=True)
class Evidence:
    """What is known of one step."""

    record: StepProgress | None  # in MLflow, since the run was last retried
    task: ListedStep | None
    pod: Pod | None
    is_needed: bool  # the gate has not ended the loop before it

    @property
    def is_pending(self) -> bool:
        """Whether it has a pod that is pending."""
        return self.pod is not None and self.pod.is_pending


def view(sources: Sources) -> RunView:
    """Join what is known of the steps. A step's own record comes first, then its pod, then Kubeflow's list."""
    records = sources.records.steps if sources.records else {}
    retried = retried_at(sources.run)
    current = {step: record for step, record in records.items() if not _is_before(record, retried)}
    # The step with which the gate ended the loop before its last iteration
    ends = [name for name in sources.names.values() if name in records and records[name].loop_ended]
    culprits = _culprits(sources, current)
    steps = []
    for key, name in sources.names.items():
        pod = (sources.pods or {}).get(key)
        is_needed = not (ends and _is_of_later_iteration(name, ends[0]))
        step = Evidence(current.get(name), sources.listed.get(key), pod, is_needed)
        state = _state(step, sources)
        reason = ""
        if state == "FAILED":
            is_bystander = bool(culprits) and name not in culprits
            reason = _failure(name, step, sources, is_bystander)
        # Also of an attempt before the retry: its seconds and its attempt are shown until the step begins again.
        steps.append(_step_view(name, state, step, records.get(name), reason, sources))
    return RunView(sources.run.run_id, sources.run.display_name, sources.state, steps, sources.look("describe pods"))


def _culprits(sources: Sources, records: dict[str, StepProgress]) -> set[str]:
    """Steps that made the run fail; a step of the control that says why it could not finish does not."""
    failed = {step for step, record in records.items() if record.status == "FAILED" and record.error}
    culprits = {step for step in failed if "control" not in step}
    # Without such a record Kubeflow's list is all there is.
    return culprits or {sources.names[key] for key, task in sources.listed.items() if task.state == "FAILED"}


def _is_before(record: StepProgress, retried: datetime | None) -> bool:
    """Whether a failure belongs to the time before the run was retried: the step has not begun again."""
    if retried is None or record.ended is None:
        return False
    return record.status in ("FAILED", "KILLED") and record.ended < retried


def _is_of_later_iteration(name: str, last: str) -> bool:
    """Whether a step belongs to an iteration of the loop after that of the step `last`."""
    number, last_number = (step.rpartition("-")[2] for step in (name, last))
    return number.isdigit() and last_number.isdigit() and int(number) > int(last_number)


def _state(step: Evidence, run: Sources) -> str:
    """The state of a step. A pod that is killed leaves its record RUNNING."""
    record = step.record
    if record is not None and record.status == "FINISHED":
        return "SUCCEEDED"
    if step.is_pending and not run.ended:
        return "PENDING"
    if record is None:
        return _state_without_record(step, run)
    listed_state = step.task.state if step.task else ""
    if record.status == "RUNNING" and not run.ended:
        return "FAILED" if listed_state == "FAILED" and not run.canceled else "RUNNING"
    if record.status == "RUNNING" and "SUCCEEDED" in (run.state, listed_state):
        return "SUCCEEDED"
    return "CANCELED" if run.is_canceled(record.ended) else "FAILED"


def _state_without_record(step: Evidence, run: Sources) -> str:
    task = step.task
    failed = task is not None and task.state == "FAILED"
    # After the end of the loop a step has nothing to do; only one that failed is worth reporting.
    if not step.is_needed and not failed:
        return NOT_NEEDED
    if task is not None:
        return "CANCELED" if failed and run.is_canceled(task.ended) else task.state or NOT_STARTED
    # The steps' records show that one without has not begun. The list alone shows it while it is complete.
    if run.records is not None and not run.ended:
        return WAITING
    if len(run.names) > COMPLETE:
        return NOT_LISTED
    return NOT_STARTED if run.ended else WAITING


def _failure(name: str, step: Evidence, run: Sources, is_bystander: bool) -> str:
    """Why a step failed; a bystander is one that was running when another made the run fail."""
    record = step.record
    if record is not None and (record.error or is_bystander):
        return record.error or "it was stopped when the run failed"
    pod = step.pod if step.pod and not step.pod.is_pending else None
    cause = step.task.cause if step.task else ""
    out_of_memory = False
    if pod and pod.reason:
        cause = pod.sentence
        out_of_memory = pod.reason == "OOMKilled"
    elif record is not None:
        cause = "killed from outside, most likely out of memory (or past resources.timeout)"
        out_of_memory = True
    if out_of_memory:
        stage = _stage(name)
        memory = f"raise resources.memory or resources.steps.{stage}.memory{SMALLER_BATCH.get(stage, '')}"
        cause = f"{cause}: {memory}"
    # Where a container has run, its log says more than its pod.
    has_log = record is None and cause in ("", DRIVER)
    where = run.look("logs -c main --prefix --tail=20" if has_log else "describe workflows,pods")
    return f"{cause}; {where}" if cause else where


def _stage(name: str) -> str:
    return next((stage for stage in STAGES if stage in name), name.partition("-")[0])


def _step_view(
    name: str,
    state: str,
    step: Evidence,
    record: StepProgress | None,
    reason: str,
    run: Sources,
) -> StepView:
    """`record` may be of the time before a retry."""
    pending, kind = _pending(name, step, run) if state == "PENDING" else ("", "")
    task = step.task
    if record is None:
        # Kubeflow's times are all there is without a record; they include the pod's start.
        seconds = None
        if state == "SUCCEEDED" and task and task.started and task.ended:
            seconds = (task.ended - task.started).total_seconds()
        return StepView(name, state, seconds=seconds, reason=reason, pending=pending, pending_kind=kind)
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
        pending=pending,
        pending_kind=kind,
    )


def _pending(name: str, step: Evidence, run: Sources) -> tuple[str, str]:
    """Why a step has been pending for long, with a remedy, and the reason in one word; empty within the first minute."""
    since = step.pod.created if step.pod else step.task and step.task.started
    seconds = (_now() - since).total_seconds() if since else 0.0
    if seconds < SOON:
        return "", ""
    minutes = f"pending for {seconds // 60:.0f} min"
    pod = step.pod
    if pod is None or not pod.sentence:
        return f"{minutes}; {run.look('describe workflows,pods')}", "unknown"
    remedy = pod.remedy(_stage(name))
    return f"{minutes}: {pod.sentence}{'; ' if remedy else ''}{remedy}", pod.reason or "refused"


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
