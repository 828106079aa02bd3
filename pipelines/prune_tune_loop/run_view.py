"""A run and its steps as people see them: from the steps' own MLflow runs, and pods that cannot start or have failed.

Kubeflow says only how the run as a whole is: its list of tasks stops being updated in a run of many steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.prune_tune_loop.kfp_api import Api, explained
from pipelines.prune_tune_loop.pods import Pod
from ptl.errors import PtlError
from ptl.lineage.progress import RunProgress, StepProgress
from ptl.tables import table_text

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
# States of steps that have no record: what is not known without MLflow is not said to be waiting.
WAITING, NOT_STARTED, NOT_NEEDED, UNKNOWN = "waiting", "not started", "not needed", "unknown"
SOON = 60.0  # seconds in which a pod usually starts
STAGES = ("prune", "recover", "evaluate")
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
    state: str  # RUNNING and so on, or one of the four above
    record: (
        StepProgress | None
    )  # may be of an attempt before a retry: its seconds are shown until the step begins again
    reason: str = ""  # of a failure, or why it has been pending for long; with its remedy
    kind: str = ""  # of the reason to be pending, in one word

    @property
    def progress(self) -> str:
        """`51,200 of 500,000 tokens, loss 0.457`, while it trains."""
        record = self.record
        if self.state != "RUNNING" or record is None or record.tokens_seen is None:
            return ""
        planned = f" of {record.tokens_planned:,}" if record.tokens_planned else ""
        loss = "" if record.loss is None else f", loss {record.loss:.3f}"
        return f"{record.tokens_seen:,}{planned} tokens{loss}"

    @property
    def seconds(self) -> float | None:
        return self.record.seconds if self.record and self.state != "RUNNING" else None

    @property
    def scores(self) -> StepProgress | None:
        """The record with accuracy and verdict, once they are final."""
        return self.record if self.state == "SUCCEEDED" else None


@dataclass(frozen=True)
class RunView:
    """A run with its steps in the order of the loop."""

    run_id: str
    name: str
    state: str  # as Kubeflow says, but CANCELED and CANCELING where it was canceled
    steps: list[StepView]
    reason: str  # why it did not succeed, in one line

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def state_text(self) -> str:
        return {"CANCELED": "canceled", "CANCELING": "is being canceled"}.get(self.state, self.state)

    @property
    def hint_to_cancel(self) -> str:
        """What to do about a run that has failed but has not ended, since the other arm is still running; or ""."""
        # A failure of the control does not fail the run.
        failed = [step.name for step in self.steps if step.state == "FAILED" and not step.name.startswith("control-")]
        working = [step.name for step in self.steps if step.state == "RUNNING"]
        if self.state != "RUNNING" or not failed or not working:
            return ""
        return (
            f"{failed[0]} has failed, and the run ends when {', '.join(working)} has ended; `ptl cancel {self.run_id}` "
            "ends it now, and `ptl retry` then resumes both"
        )


def step_names(api: Api, run: Any) -> list[str]:
    """The steps of a run in the order of the loop, from its pipeline version; empty where that was deleted."""
    spec = run.pipeline_spec
    reference = run.pipeline_version_reference
    try:
        if not spec and reference and reference.pipeline_version_id:
            with explained(api.host):
                version = api.client.get_pipeline_version(reference.pipeline_id, reference.pipeline_version_id)
            spec = version.pipeline_spec
    except PtlError:
        return []
    spec = spec or {}
    spec = spec.get("pipeline_spec", spec)  # with Kubernetes settings it is one of two documents
    tasks = spec.get("root", {}).get("dag", {}).get("tasks", {})
    return sorted((task.get("taskInfo", {}).get("name", key) for key, task in tasks.items()), key=_position)


def _position(name: str) -> tuple[int, int, int]:
    """For sorting: import, the loop by its iterations, the control, the report."""
    before, _, last = name.rpartition("-")
    if last.isdigit():
        return 1, int(last), STAGES.index(before) if before in STAGES else -1
    if before == "control":
        return 2, 0, STAGES.index(last)
    return (0 if name in ("doctor", "import-model") else 3), 0, 0


def view(
    run: Any,
    names: list[str],
    records: RunProgress | None,
    pods: dict[str, Pod],
    look: Callable[[str], str],
) -> RunView:
    """Join what is known of a run (V2beta1Run); `look` says where there is more, with one of kubectl's commands."""
    retried, canceled = _moments(run)
    state = run.state
    if canceled:
        state = "CANCELED" if state in ENDED else "CANCELING"
    all_records = records.steps if records else {}
    names = names or sorted({*all_records, *pods}, key=_position)
    current = {step: record for step, record in all_records.items() if not _is_before(record, retried)}
    culprits = {step for step, record in current.items() if record.status == "FAILED" and record.error}
    # A step of the control that says why it could not finish does not fail the run.
    culprits = {step for step in culprits if "control" not in step}
    # The step with which the gate ended the loop before its last iteration
    end = next((name for name in names if name in all_records and all_records[name].loop_ended), "")
    steps = []
    for name in names:
        record, pod = current.get(name), pods.get(name)
        step_state = _state(name, record, pod, state, canceled)
        if record is None and step_state != "FAILED":
            if end and _is_of_later_iteration(name, end):
                step_state = NOT_NEEDED
            elif step_state in (WAITING, NOT_STARTED) and records is None:
                step_state = UNKNOWN
            elif name == "doctor" and all_records:
                step_state = "SUCCEEDED"  # it leaves no record, and the others begin after it
        reason, kind = "", ""
        if step_state == "FAILED":
            reason = _failure(name, record, pod, bool(culprits) and name not in culprits, look)
        elif step_state == "PENDING" and pod:
            reason, kind = _pending(name, pod, look)
        steps.append(StepView(name, step_state, all_records.get(name), reason, kind))
    return RunView(run.run_id, run.display_name, state, steps, _reason(state, steps, look))


def _moments(run: Any) -> tuple[datetime | None, datetime | None]:
    """When a run was last retried, and when after that it was asked to end: Kubeflow then says FAILED in the end."""
    history = run.state_history or []
    ends = [number for number, entry in enumerate(history) if entry.state in ENDED]
    if run.state in ENDED:
        ends = ends[:-1]  # the last one is its own
    current = history[ends[-1] + 1 :] if ends else history
    # What was just asked for is not in the history yet.
    retried = (current[0].update_time if current else _now()) if ends else None
    canceled = [entry.update_time for entry in current if entry.state == "CANCELING"]
    if not canceled and run.state in ("CANCELING", "CANCELED"):
        canceled = [_now()]
    return retried, canceled[0] if canceled else None


def _now() -> datetime:
    return datetime.now(UTC)


def _is_before(record: StepProgress, retried: datetime | None) -> bool:
    """Whether a failure belongs to the time before the run was retried: the step has not begun again."""
    is_old = retried is not None and record.ended is not None and record.ended < retried
    return is_old and record.status in ("FAILED", "KILLED")


def _is_of_later_iteration(name: str, last: str) -> bool:
    """Whether a step belongs to an iteration of the loop after that of the step `last`."""
    number, last_number = (step.rpartition("-")[2] for step in (name, last))
    return number.isdigit() and last_number.isdigit() and int(number) > int(last_number)


def _state(name: str, record: StepProgress | None, pod: Pod | None, run_state: str, canceled: datetime | None) -> str:
    """The state of a step. A pod that is killed leaves its record RUNNING."""
    has_ended = run_state in ENDED
    status = record.status if record else ""
    if status == "FINISHED" or (run_state == "SUCCEEDED" and status != "FAILED"):
        return "SUCCEEDED"
    if pod and pod.phase == "Pending" and not has_ended:
        return "PENDING"
    has_failed = pod is not None and pod.phase == "Failed"
    if status in ("", "RUNNING") and not has_failed and not has_ended:
        # Its driver prepares the pod.
        is_working = status == "RUNNING" or (pod and pod.phase == "Running" and not pod.is_driver)
        return "RUNNING" if is_working else "PENDING" if pod else WAITING
    if record is None and not has_failed:
        return NOT_STARTED
    is_canceled = canceled and (record is None or record.ended is None or record.ended >= canceled)
    return "CANCELED" if is_canceled else "FAILED"


def _reason(state: str, steps: list[StepView], look: Callable[[str], str]) -> str:
    if state == "CANCELED":
        return "canceled"
    if state != "FAILED":
        return ""
    failed = [step for step in steps if step.state == "FAILED"]
    if not failed:
        return look("describe workflows,pods")
    # The control's failures do not fail the run: the first one of the loop comes before them.
    culprit = min(failed, key=lambda step: "control" in step.name)
    return f"{culprit.name}: {culprit.reason}"


def _failure(
    name: str, record: StepProgress | None, pod: Pod | None, is_bystander: bool, look: Callable[[str], str]
) -> str:
    """Why a step failed; a bystander is one that was running when another made the run fail."""
    if record is not None and (record.error or is_bystander):
        return record.error or "it was stopped when the run failed"
    cause = pod.sentence if pod and pod.phase == "Failed" else ""
    # Where a container has run, its log says more than its pod.
    has_log = record is None and (pod is None or not pod.reason)
    if record is not None and not cause:
        cause = "killed from outside, most likely out of memory (or past resources.timeout)"
    if "OOMKilled" in cause or "out of memory" in cause:
        stage = _stage(name)
        cause += f": raise resources.memory or resources.steps.{stage}.memory{SMALLER_BATCH.get(stage, '')}"
    where = look("logs -c main --prefix --tail=20" if has_log else "describe workflows,pods")
    return f"{cause}; {where}" if cause else where


def _stage(name: str) -> str:
    return next((stage for stage in STAGES if stage in name), name.partition("-")[0])


def _pending(name: str, pod: Pod, look: Callable[[str], str]) -> tuple[str, str]:
    """Why a step has been pending for long, with a remedy, and in one word; empty within the first minute."""
    seconds = (_now() - pod.created).total_seconds()
    if seconds < SOON:
        return "", ""
    text = f"pending for {seconds // 60:.0f} min"
    if not pod.sentence:
        return f"{text}; {look('describe workflows,pods')}", "unknown"
    remedy = pod.remedy(_stage(name))
    return f"{text}: {pod.sentence}" + (f"; {remedy}" if remedy else ""), pod.reason or "refused"


def step_table(view: RunView) -> str:
    """The steps as a table for the terminal."""
    numbers = ("Attempt", "Seconds", "Accuracy")
    return table_text(
        view.name, ["Step", "State", *numbers, "Verdict", "Training"], map(_cells, view.steps), numbers=numbers
    )


def _cells(step: StepView) -> list[str]:
    attempt = step.record.attempt if step.record else None
    accuracy = step.scores.accuracy if step.scores else None
    return [
        step.name,
        step.state,
        str(attempt or ""),
        "" if step.seconds is None else f"{step.seconds:.0f}",
        "" if accuracy is None else f"{accuracy:.3f}",
        step.scores.verdict if step.scores else "",
        step.progress,
    ]


def change_line(step: StepView) -> str:
    """A change of a step: its state, and with its end what came out."""
    text = f"{step.name}: {step.state}"
    # The first attempt is the usual case, and says nothing.
    if step.record and (step.record.attempt or 1) > 1:
        text += f" (attempt {step.record.attempt})"
    if step.seconds is not None:
        text += f" in {step.seconds:.0f} s"
    if step.scores and step.scores.accuracy is not None:
        text += f", accuracy {step.scores.accuracy:.3f}"
    if step.scores and step.scores.verdict:
        text += f", {step.scores.verdict}"
    return f"{text}: {step.reason}" if step.state == "FAILED" else text
