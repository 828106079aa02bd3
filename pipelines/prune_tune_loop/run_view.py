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
    reason: str = ""  # of a failure, or of being pending for long; with its remedy
    attempt: str = ""
    seconds: str = ""  # once it has ended
    accuracy: str = ""
    verdict: str = ""
    training: str = ""  # `51,200 of 500,000 tokens, loss 0.457`, while it trains

    @property
    def change(self) -> str:
        """A change of the step in one line: its state, and with its end what came out."""
        parts = [
            f"{self.name}: {self.state}",
            # The first attempt is the usual case, and says nothing.
            f" (attempt {self.attempt})" if self.attempt not in ("", "1") else "",
            f" in {self.seconds} s" if self.seconds else "",
            f", accuracy {self.accuracy}" if self.accuracy else "",
            f", {self.verdict}" if self.verdict else "",
            f": {self.reason}" if self.reason else "",
        ]
        return "".join(parts)


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

    @property
    def table(self) -> str:
        """The steps as a table for the terminal."""
        numbers = ("Attempt", "Seconds", "Accuracy")
        headings = ["Step", "State", *numbers, "Verdict", "Training"]
        rows = [
            [step.name, step.state, step.attempt, step.seconds, step.accuracy, step.verdict, step.training]
            for step in self.steps
        ]
        return table_text(self.name, headings, rows, numbers=numbers)


@dataclass(frozen=True)
class Situation:
    """What is known of a run as a whole."""

    state: str  # as in RunView
    canceled: datetime | None  # when it was asked to end
    is_known: bool  # to MLflow, which was read
    has_begun: bool  # a step that leaves a record
    culprits: set[str]  # steps that have failed it, by their own words
    end: str  # the step with which the gate ended the loop before its last iteration
    look: Callable[[str], str]  # where there is more to see, with one of kubectl's commands

    @property
    def ended(self) -> bool:
        return self.state in ENDED


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
    # Failures before the retry: those steps have not begun again.
    current = {step: record for step, record in all_records.items() if not _has_failed_before(record, retried)}
    culprits = {step for step, record in current.items() if record.status == "FAILED" and record.error}
    ends = [name for name in names if name in all_records and all_records[name].loop_ended]
    situation = Situation(
        state,
        canceled,
        is_known=records is not None,
        has_begun=bool(all_records),
        # A step of the control that says why it could not finish does not fail the run.
        culprits={step for step in culprits if "control" not in step},
        end=ends[0] if ends else "",
        look=look,
    )
    steps = []
    for name in names:
        record, pod = current.get(name), pods.get(name)
        step_state = _state(name, record, pod, situation)
        reason = ""
        if step_state == "FAILED":
            reason = _failure(name, record, pod, situation)
        elif step_state == "PENDING" and pod:
            reason = _pending(name, pod, look)
        # Of an attempt before the retry its seconds are shown until the step begins again.
        steps.append(StepView(name, step_state, reason, **_results(step_state, all_records.get(name))))
    return RunView(run.run_id, run.display_name, state, steps, _reason(steps, situation))


def _moments(run: Any) -> tuple[datetime | None, datetime | None]:
    """When a run was last retried, and when after that it was asked to end: Kubeflow then says FAILED in the end."""
    history = run.state_history or []
    ends = [number for number, entry in enumerate(history) if entry.state in ENDED]
    if run.state in ENDED:
        ends = ends[:-1]  # the last one is its own
    current = history[ends[-1] + 1 :] if ends else history
    retried = canceled = None
    # What was just asked for is not in the history yet.
    if ends:
        retried = current[0].update_time if current else _now()
    if run.state in ("CANCELING", "CANCELED"):
        canceled = _now()
    for entry in current:
        if entry.state == "CANCELING":
            canceled = entry.update_time
    return retried, canceled


def _now() -> datetime:
    return datetime.now(UTC)


def _has_failed_before(record: StepProgress, retried: datetime | None) -> bool:
    if retried is None or record.ended is None or record.status not in ("FAILED", "KILLED"):
        return False
    return record.ended < retried


def _results(state: str, record: StepProgress | None) -> dict[str, str]:
    """What a step's record adds to its state, as texts."""
    if record is None:
        return {}
    results = {"attempt": str(record.attempt or "")}
    if state != "RUNNING" and record.seconds is not None:
        results["seconds"] = f"{record.seconds:.0f}"
    if state == "SUCCEEDED":
        results["verdict"] = record.verdict
        if record.accuracy is not None:
            results["accuracy"] = f"{record.accuracy:.3f}"
    if state == "RUNNING" and record.tokens_seen is not None:
        planned = f" of {record.tokens_planned:,}" if record.tokens_planned else ""
        loss = "" if record.loss is None else f", loss {record.loss:.3f}"
        results["training"] = f"{record.tokens_seen:,}{planned} tokens{loss}"
    return results


def _state(name: str, record: StepProgress | None, pod: Pod | None, run: Situation) -> str:
    """The state of a step. A pod that is killed leaves its record RUNNING."""
    phase = pod.phase if pod else ""
    if record is None and phase in ("", "Succeeded"):
        return _state_unseen(name, run)
    if record is not None and record.status == "FINISHED":
        return "SUCCEEDED"
    if phase == "Pending" and not run.ended:
        return "PENDING"
    is_running = record is None or record.status == "RUNNING"
    if is_running and phase != "Failed" and not run.ended:
        # Its driver prepares the pod.
        return "PENDING" if record is None and pod and pod.is_driver else "RUNNING"
    if is_running and run.state == "SUCCEEDED":
        return "SUCCEEDED"
    ended = record.ended if record else None
    is_canceled = run.canceled and (ended is None or ended >= run.canceled)
    return "CANCELED" if is_canceled else "FAILED"


def _state_unseen(name: str, run: Situation) -> str:
    """The state of a step that has neither a record nor a pod."""
    number, last_number = (step.rpartition("-")[2] for step in (name, run.end))
    if number.isdigit() and last_number.isdigit() and int(number) > int(last_number):
        return NOT_NEEDED
    # The doctor leaves no record, and the others begin after it.
    if run.state == "SUCCEEDED" or (name == "doctor" and run.has_begun):
        return "SUCCEEDED"
    if not run.is_known:
        return UNKNOWN
    return NOT_STARTED if run.ended else WAITING


def _reason(steps: list[StepView], run: Situation) -> str:
    """Why a run did not succeed."""
    if run.state == "CANCELED":
        return "canceled"
    if run.state != "FAILED":
        return ""
    failed = [step for step in steps if step.state == "FAILED"]
    if not failed:
        return run.look("describe workflows,pods")
    # The control's failures do not fail the run: the first one of the loop comes before them.
    culprit = min(failed, key=lambda step: "control" in step.name)
    return f"{culprit.name}: {culprit.reason}"


def _failure(name: str, record: StepProgress | None, pod: Pod | None, run: Situation) -> str:
    """Why a step failed, in its own words, or Kubernetes'."""
    if record is not None and record.error:
        return record.error
    if record is not None and run.culprits:
        return "it was stopped when the run failed"
    cause = pod.sentence if pod and pod.phase == "Failed" else ""
    if record is not None and not cause:
        cause = "killed from outside, most likely out of memory (or past resources.timeout)"
    if "OOMKilled" in cause or "out of memory" in cause:
        stage = _stage(name)
        cause += f": raise resources.memory or resources.steps.{stage}.memory{SMALLER_BATCH.get(stage, '')}"
    # Where a container has run, its log says more than its pod.
    has_log = record is None and not (pod and pod.reason)
    where = run.look("logs -c main --prefix --tail=20" if has_log else "describe workflows,pods")
    return f"{cause}; {where}" if cause else where


def _stage(name: str) -> str:
    return next((stage for stage in STAGES if stage in name), name.partition("-")[0])


def _pending(name: str, pod: Pod, look: Callable[[str], str]) -> str:
    """Why a step has been pending for long, with a remedy; empty within the first minute."""
    if (_now() - pod.created).total_seconds() < SOON:
        return ""
    text = f"pending since {pod.created:%H:%M} UTC"
    if not pod.sentence:
        return f"{text}; {look('describe workflows,pods')}"
    remedy = pod.remedy(_stage(name))
    return f"{text}: {pod.sentence}" + (f"; {remedy}" if remedy else "")
