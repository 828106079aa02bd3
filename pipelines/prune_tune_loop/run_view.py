"""A run and its steps as people see them: Kubeflow's states joined with the steps' own records in MLflow."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.prune_tune_loop.task_list import ENDED, STAGES, Listed
from ptl.progress import RunProgress, StepProgress

NOT_LISTED, WAITING, NOT_STARTED, NOT_NEEDED = "not listed by Kubeflow", "waiting", "not started", "not needed"
SMALLER_BATCH = {  # how a stage needs less memory
    "prune": " or lower calibration.batch_size",
    "recover": " or raise recover.accumulation, which splits the batch",
    "evaluate": " or lower evaluate.batch_size",
}
CAUSES = {  # why no container ran, as far as Kubeflow's list shows it; and where more is said
    "driver": ("its driver failed: no container of the step was started", "logs"),
    "refused": ("no container of the step was started: Kubernetes refused its pod", "workflow"),
    "not started": (
        "its pod did not start before its time ran out, as with an image, a volume or a node that is not there",
        "describe",
    ),
}


@dataclass(frozen=True)
class StepView:
    """One line of the table."""

    name: str
    state: str
    attempt: int | None = None
    seconds: float | None = None
    accuracy: float | None = None
    verdict: str = ""
    progress: str = ""  # of a training, while it runs
    reason: str = ""  # of a failure, with its remedy


@dataclass(frozen=True)
class RunView:
    """A run with its steps in the order of the loop."""

    run_id: str
    name: str
    state: str  # as Kubeflow says, but CANCELED and CANCELING where it was canceled
    steps: list[StepView]
    look: str  # where to look when nothing says why it failed

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def reason(self) -> str:
        """Why it did not succeed, in one line."""
        if self.state != "FAILED":
            return "canceled" if self.state == "CANCELED" else ""
        # The control's failures do not fail the run.
        failed = sorted(
            (step for step in self.steps if step.state == "FAILED"), key=lambda step: "control" in step.name
        )
        return f"{failed[0].name}: {failed[0].reason}" if failed else self.look


def view(
    run: Any, names: dict[str, str], listed: dict[str, Listed], records: RunProgress | None, namespace: str, link: str
) -> RunView:
    """Join what Kubeflow lists (by task key) with the steps' records in MLflow; `names` are the steps by task key.

    A step's record wins over Kubeflow's list, which stops being updated when a run has many tasks. `namespace` and
    `link`, the run's page, are for the sentences that say where to look.
    """
    canceled = canceled_at(run)
    state = ("CANCELED" if run.state in ENDED else "CANCELING") if canceled else run.state
    known = records.steps if records else {}
    current = {step: record for step, record in known.items() if not _before_retry(record, run)}
    last = next((name for name in names.values() if name in known and known[name].loop_ended), None)
    culprits = _culprits(names, listed, current)
    selector = f"-n {namespace} -l pipeline/runid={run.run_id}"
    steps = []
    for key, name in names.items():
        task, record = listed.get(key), current.get(name)
        unneeded = last is not None and _follows(name, last)
        step_state = _state(task, record, state, canceled, unneeded, records is not None)
        reason = ""
        if step_state == "FAILED":
            bystander = bool(culprits) and name not in culprits
            reason = _reason(name, task, record, bystander, _look(task, selector, link))
        steps.append(_step(name, step_state, task, known.get(name), reason))
    return RunView(run.run_id, run.display_name, state, steps, _look(None, selector, link))


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


def _culprits(names: dict[str, str], listed: dict[str, Listed], records: dict[str, StepProgress]) -> set[str]:
    """Steps that made the run fail; a step of the control that says why it could not finish does not."""
    explained = {
        step for step, record in records.items() if record.status == "FAILED" and record.error and "control" not in step
    }
    return explained or {names[key] for key, task in listed.items() if task.state == "FAILED"}


def _state(
    task: Listed | None,
    record: StepProgress | None,
    run_state: str,
    canceled: datetime | None,
    unneeded: bool,
    recorded: bool,
) -> str:
    """A step's state. `recorded`: MLflow was read and knows the run."""
    ended = run_state in ENDED
    if record is not None:
        if record.status == "FINISHED" or (record.status == "RUNNING" and ended and _succeeded(task, run_state)):
            return "SUCCEEDED"
        if record.status == "RUNNING" and not ended:
            return "FAILED" if task and task.state == "FAILED" and not canceled else "RUNNING"
        stopped = record.ended is None or (canceled is not None and record.ended >= canceled)
        return "CANCELED" if canceled and stopped else "FAILED"
    if unneeded and not (task and task.state == "FAILED"):
        return NOT_NEEDED
    if task is None:
        return WAITING if recorded and not ended else NOT_LISTED
    if task.state == "FAILED" and canceled and (task.ended is None or task.ended >= canceled):
        return "CANCELED"
    return task.state or NOT_STARTED


def _succeeded(task: Listed | None, run_state: str) -> bool:
    return run_state == "SUCCEEDED" or (task is not None and task.state == "SUCCEEDED")


def _before_retry(record: StepProgress, run: Any) -> bool:
    """Whether a failure belongs to the time before the run was retried: the step has not begun again."""
    starts = [entry.update_time for entry in run.state_history or [] if entry.state == "RUNNING"]
    failed = record.status in ("FAILED", "KILLED") and record.ended is not None
    return failed and len(starts) > 1 and record.ended < starts[-1]


def _follows(name: str, last: str) -> bool:
    """Whether a step belongs to an iteration of the loop after that of the step `last`."""
    numbers = [text.rpartition("-")[2] for text in (name, last)]
    return all(number.isdigit() for number in numbers) and int(numbers[0]) > int(numbers[1])


def _reason(name: str, task: Listed | None, record: StepProgress | None, bystander: bool, look: str) -> str:
    """Why a step failed; a bystander is one that was at work when another made the run fail."""
    if record is not None and record.error:
        return record.error
    if record is None:
        return f"{CAUSES[task.cause][0]}; {look}" if task and task.cause else look
    if bystander:
        return "it was stopped when the run failed"
    stage = next((stage for stage in STAGES if stage in name), name.partition("-")[0])
    return (
        "killed from outside, most likely out of memory (or past resources.timeout): raise resources.memory or "
        f"resources.steps.{stage}.memory{SMALLER_BATCH.get(stage, '')}; {look}"
    )


def _look(task: Listed | None, selector: str, link: str) -> str:
    """Where the log of a step is, or else its pod."""
    verb = CAUSES[task.cause][1] if task and task.cause else "logs"
    if verb == "workflow":
        return f"see `kubectl get workflow {selector} -o yaml` and {link}"
    pods = f"kubectl get pods {selector}"
    if task is None or not task.pod:
        return f"see `{pods}` and {link}"
    namespace = selector.partition(" -l ")[0]
    return f"see `kubectl {verb} {namespace} $({pods} -o name | grep -e -{task.pod})` and {link}"


def _step(name: str, state: str, task: Listed | None, record: StepProgress | None, reason: str) -> StepView:
    seconds = record.seconds if record else None
    if record is None and state == "SUCCEEDED" and task and task.started and task.ended:
        seconds = (task.ended - task.started).total_seconds()
    if record is None:
        return StepView(name, state, seconds=seconds, reason=reason)
    training = state == "RUNNING" and record.tokens_seen is not None
    return StepView(
        name,
        state,
        record.attempt,
        seconds if state != "RUNNING" else None,
        record.accuracy if state == "SUCCEEDED" else None,
        record.verdict if state == "SUCCEEDED" else "",
        _training(record) if training else "",
        reason,
    )


def _training(record: StepProgress) -> str:
    planned = f" of {record.tokens_planned:,}" if record.tokens_planned else ""
    loss = "" if record.loss is None else f", loss {record.loss:.3f}"
    return f"{record.tokens_seen:,}{planned} tokens{loss}"
