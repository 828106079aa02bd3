"""A run and its steps as people see them: from the steps' own MLflow runs, and pods that cannot start or have failed.

Kubeflow's own list of tasks counts where MLflow says nothing. In a run of many steps it stops being updated.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.prune_tune_loop.kfp_api import Api, explained
from pipelines.prune_tune_loop.pods import ROOT_DRIVER, TWICE, Pod
from ptl.config.dag import ANSWERS, kind_of
from ptl.errors import PtlError
from ptl.lineage.run_status import StepProgress
from ptl.log import table_text

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
# States of steps that have no record: what is not known without MLflow is not said to be waiting.
WAITING, NOT_STARTED, NOT_NEEDED, UNKNOWN = "waiting", "not started", "not needed", "unknown"
SUBMIT_AGAIN = "submit it again, which takes the finished steps over"
CANCELED = "canceled"  # a run; Kubeflow says FAILED
# steps of a run up to which Kubeflow's list was not seen to stop: the workflow is below 1 MiB
LISTED = 17
SOON = 60.0  # seconds in which a pod usually starts
LOGS = "logs -c main --prefix --tail=20"  # one of kubectl's commands
STAGES = ("prune", "recover", "evaluate")
CONTROL = (2, 0, 0)  # position of its first step
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
    reason: str  # of a failure, or of being pending for long; with its remedy
    record: StepProgress  # an empty one where there is none

    @property
    def change(self) -> str:
        """A change of the step in one line: its state, and with its end what came out."""
        record = self.record
        text = f"{self.name}: {self.state}"
        # The first attempt is the usual case, and says nothing.
        if record.attempt not in ("", "1"):
            text += f" (attempt {record.attempt})"
        if record.seconds:
            text += f" in {record.seconds} s"
        if record.taken_over_from:
            text += f", taken over from {record.taken_over_from}"
        if record.accuracy:
            text += f", accuracy {record.accuracy}"
        if record.verdict:
            text += f", {record.verdict}"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass(frozen=True)
class RunView:
    """A run with its steps in the order of the loop."""

    run_id: str
    name: str
    state: str  # as Kubeflow says, but `canceled` and `is being canceled`
    steps: list[StepView]
    reason: str  # why it did not succeed, in one line
    dead_end: str = ""  # why a retry of it can never work
    is_out_of_memory: bool = False  # the step that failed the run
    fails_again: bool = False  # a driver has failed right after the last retry, for whatever reason

    @property
    def advice(self) -> str:
        """What to do about a run that did not succeed."""
        if self.dead_end:
            return f"{self.dead_end}: {SUBMIT_AGAIN}"
        if self.is_out_of_memory:
            return f"a retry has the same memory: {SUBMIT_AGAIN}"
        again = f"; since Kubeflow's driver failed right after the last retry: if it does again, {SUBMIT_AGAIN}"
        return f"`ptl retry {self.run_id}` resumes from what is finished{again if self.fails_again else ''}"

    @property
    def ended(self) -> bool:
        return self.state in (*ENDED, CANCELED)

    @property
    def document(self) -> dict[str, Any]:
        """The run as JSON."""
        steps = []
        for step in self.steps:
            record = asdict(step.record) | {
                "step": step.name,
                "state": step.state,
                "reason": step.reason,
            }
            steps.append(record)
        return {
            "run_id": self.run_id,
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "steps": steps,
        }

    @property
    def hint_to_cancel(self) -> str:
        """What to do about a run that has failed but has not ended, since the other arm is still running; or ""."""
        # A failure of the control does not fail the run.
        failed = [
            step.name
            for step in self.steps
            if step.state == "FAILED" and "control" not in step.name
        ]
        working = [step.name for step in self.steps if step.state == "RUNNING"]
        if self.state != "RUNNING" or not failed or not working:
            return ""
        return (
            f"{failed[0]} has failed, and the run ends when {', '.join(working)} has ended; "
            f"`ptl cancel {self.run_id}` ends it now, and `ptl retry` then resumes both"
        )

    @property
    def table(self) -> str:
        """The steps as a table for the terminal."""
        numbers = ("Attempt", "Seconds", "Accuracy")
        rows = []
        for step in self.steps:
            record = step.record
            # An id is as wide as the other columns together, and nothing trains in such a step.
            origin = f"taken over from {record.taken_over_from}" if record.taken_over_from else ""
            results = [
                record.attempt,
                record.seconds,
                record.accuracy,
                record.verdict,
                record.training or origin,
            ]
            rows.append([step.name, step.state, *results])
        return table_text(
            self.name, ["Step", "State", *numbers, "Verdict", "Note"], rows, numbers=numbers
        )


def step_names(api: Api, run: Any) -> list[str]:
    """The steps of a run in the order of the loop, from its pipeline version; empty where that was deleted."""
    reference = run.pipeline_version_reference
    try:
        with explained(api.host):
            version = api.client.get_pipeline_version(
                reference.pipeline_id, reference.pipeline_version_id
            )
            # With Kubernetes settings it is one of two documents.
            spec = version.pipeline_spec.get("pipeline_spec", version.pipeline_spec)
    except PtlError:
        return []
    tasks = spec["root"]["dag"]["tasks"].values()
    return sorted((task["taskInfo"]["name"] for task in tasks), key=_position)


def _position(name: str) -> tuple[int, int, int]:
    """For sorting: import, the loop by its iterations, the control, exports and the report."""
    before, _, last = name.rpartition("-")
    if before in STAGES:
        return 1, int(last), STAGES.index(before)
    if before == "control":
        return 2, 0, STAGES.index(last)
    if name == ANSWERS:  # after the dense model's evaluation
        return 1, 0, len(STAGES)
    return (0 if name in ("doctor", "import-model") else 3), 0, 0


def view(
    run: Any,
    names: list[str],
    records: Mapping[str, StepProgress] | None,
    pods: Mapping[str, Pod],
    look: Callable[[str], str],
) -> RunView:
    """Join what is known of a run (V2beta1Run): its steps' records (None: not read), and pods that have not succeeded.

    `look` says where there is more to see, with one of kubectl's commands.
    """
    retried, is_canceled = _history(run)
    known = records or {}
    current = {}
    for name, record in known.items():
        # A step that failed before the retry has not begun again.
        is_old = retried and record.ended and record.ended < retried and record.status != "FINISHED"
        if not is_old:
            current[name] = record
    tasks = _tasks(run)
    # A list that has stopped is right about what has ended. Before the first step it is short, and complete.
    is_complete = ROOT_DRIVER in tasks and (len(names) <= LISTED or tasks.keys().isdisjoint(names))
    is_known = records is not None or is_complete
    listed = _listed(tasks, retried, is_complete and run.state not in ENDED)
    situation = _Situation(run.state, is_canceled, current, is_known, listed, pods, look)
    steps = []
    if ROOT_DRIVER in pods and not current and set(pods) == {ROOT_DRIVER}:
        # It is no step, and not worth a line unless it keeps all of them waiting.
        driver = StepView(
            ROOT_DRIVER,
            situation.state_of(ROOT_DRIVER),
            situation.reason_of(ROOT_DRIVER),
            StepProgress(),
        )
        steps += [driver] if driver.reason else []
    for name in names or sorted({*known, *pods} - {ROOT_DRIVER}, key=_position):
        # Of an attempt before the retry its seconds are shown until the step begins again.
        record = known.get(name, StepProgress())
        steps.append(StepView(name, situation.state_of(name), situation.reason_of(name), record))
    state, reason = run.state, ""
    is_out_of_memory = False
    if is_canceled:
        reason = CANCELED
        state = CANCELED if state in ENDED else "is being canceled"
    elif state == "FAILED":
        failed = [step for step in steps if step.state == "FAILED"]
        # The control's failures do not fail the run: the first one of the loop comes before them.
        culprit = min(failed, key=lambda step: "control" in step.name, default=None)
        reason = f"{culprit.name}: {culprit.reason}" if culprit else look("describe workflows,pods")
        is_out_of_memory = culprit is not None and situation.is_out_of_memory(culprit.name)
    is_dead = any(TWICE in pod.last_words for pod in pods.values())
    dead_end = "no retry can work, as Kubeflow has a task of this run twice" if is_dead else ""
    fails_again = state == "FAILED" and _fails_again(tasks, pods, retried)
    return RunView(
        run.run_id, run.display_name, state, steps, reason, dead_end, is_out_of_memory, fails_again
    )


def _fails_again(
    tasks: Mapping[str, Any], pods: Mapping[str, Pod], retried: datetime | None
) -> bool:
    """Whether a driver has failed within a minute of the last retry, by Kubeflow's list or its pod.

    Where its log cannot be read that is all there is to see of a run that no retry can resume.
    """
    if retried is None or any(pod.last_words for pod in pods.values()):
        return False
    failed = [pod.created for pod in pods.values() if pod.is_driver and pod.has_failed_by_itself]
    failed += [
        task.end_time
        for name, task in tasks.items()
        if name.endswith("-driver") and task.state == "FAILED"
    ]
    # A task may have ended without a time.
    return any(0 <= (time - retried).total_seconds() < SOON for time in failed if time)


def _tasks(run: Any) -> dict[str, Any]:
    """What Kubeflow lists of a run by name: its tasks, whose names are those of the steps, drivers and executors."""
    details = run.run_details
    return {task.display_name: task for task in (details and details.task_details) or []}


def _listed(
    tasks: Mapping[str, Any], retried: datetime | None, is_complete: bool
) -> dict[str, str]:
    """The states of tasks by Kubeflow's list: of those that have ended, and if it `is_complete` of those at work."""
    # A task is RUNNING while the pod of its executor is PENDING, and of executors the list has no tasks.
    is_pending = any(
        name.startswith("executor(") and task.state == "PENDING" for name, task in tasks.items()
    )
    states = {}
    for name, task in tasks.items():
        failed_before = (
            retried and task.state == "FAILED" and task.end_time and task.end_time < retried
        )
        if task.state == "SUCCEEDED" or (task.state == "FAILED" and not failed_before):
            states[name] = task.state
        elif task.state == "RUNNING" and is_complete:
            states[name] = "PENDING" if is_pending else "RUNNING"
    # Of a task whose driver failed the list has no state.
    drivers = [
        name for name, state in states.items() if name.endswith("-driver") and state == "FAILED"
    ]
    return {name.removesuffix("-driver"): "FAILED" for name in drivers} | states


def _history(run: Any) -> tuple[datetime | None, bool]:
    """When a run was last retried, and whether it was asked to end since: Kubeflow then says FAILED in the end."""
    retried, is_canceled = None, False
    last_state = ""
    for entry in run.state_history or []:
        if last_state in ENDED:
            retried, is_canceled = entry.update_time, False
        last_state = entry.state
        is_canceled = is_canceled or last_state == "CANCELING"
    # What was just asked for is not in the history yet.
    if last_state in ENDED and run.state not in ENDED:
        retried, is_canceled = now(), False
    return retried, is_canceled or run.state in ("CANCELING", "CANCELED")


def now() -> datetime:
    """The time, which tests set."""
    return datetime.now(UTC)


def newest_change(run: Any, records: Mapping[str, StepProgress]) -> datetime:
    """When anything of a run last began or ended, as far as Kubeflow and the steps' records say."""
    times = [run.created_at, *(entry.update_time for entry in run.state_history or [])]
    times += [record.ended for record in records.values()]
    for task in _tasks(run).values():
        times += [task.start_time, task.end_time]
    return max(filter(None, times), default=now())


@dataclass(frozen=True)
class _Situation:
    """What is known of a run, from which the states of its steps follow."""

    state: str  # as Kubeflow says
    is_canceled: bool
    records: Mapping[str, StepProgress]  # since it was last retried
    is_known: bool  # whether steps without a record have not begun
    listed: Mapping[str, str]  # states by Kubeflow's list
    pods: Mapping[str, Pod]
    look: Callable[[str], str]

    def state_of(self, name: str) -> str:
        """The state of a step. A pod that is killed leaves its record RUNNING."""
        record, pod = self.records.get(name), self.pods.get(name)
        if record is None and pod is None:
            return self._state_unseen(name)
        status = record.status if record else ""
        is_open = status in ("", "RUNNING")
        # A step of the control that failed has SUCCEEDED to Kubeflow, so that the run continues.
        if status == "FINISHED" or (is_open and "SUCCEEDED" in (self.state, self.listed.get(name))):
            return "SUCCEEDED"
        if self.state not in ENDED:
            # After a pod that has failed Kubeflow starts another, while attempts are left.
            if pod and (pod.phase == "Pending" or (is_open and pod.phase == "Failed")):
                return "PENDING"
            if is_open:
                return "RUNNING"
        # A step that failed by itself says so.
        return "CANCELED" if self.is_canceled and status != "FAILED" else "FAILED"

    def _state_unseen(self, name: str) -> str:
        """The state of a step that has neither a record nor a pod."""
        ends = [_position(step) for step, record in self.records.items() if record.loop_ended]
        if ends and max(ends) < _position(name) < CONTROL:
            return NOT_NEEDED
        # The doctor leaves no record, and the others begin after it.
        if self.state == "SUCCEEDED" or (name == "doctor" and self.records):
            return "SUCCEEDED"
        if name in self.listed:
            state = self.listed[name]
            return "CANCELED" if self.is_canceled and state == "FAILED" else state
        if not self.is_known:
            return UNKNOWN
        return NOT_STARTED if self.state in ENDED else WAITING

    def reason_of(self, name: str) -> str:
        """Why a step failed, or has been pending for long; with a remedy."""
        state = self.state_of(name)
        if state == "FAILED":
            return self.failure_of(name)
        return self.why_pending(name) if state == "PENDING" else ""

    def failure_of(self, name: str) -> str:
        """Why a step failed, in its own words, or Kubernetes'."""
        record, pod = self.records.get(name), self.pods.get(name)
        if record and record.error:
            return record.error
        failed = [
            step for step, other in self.records.items() if other.error and other.status == "FAILED"
        ]
        # A step of the control that says why it could not finish does not fail the run.
        if record and any("control" not in step for step in failed):
            return "it was stopped when the run failed"
        if pod and pod.is_driver and pod.phase == "Failed":
            return self._failure_of_driver(name, pod)
        cause = pod.sentence if pod and pod.phase == "Failed" else ""
        if record and not cause:
            cause = "killed from outside, most likely out of memory (or past resources.timeout)"
        if "OOMKilled" in cause or "out of memory" in cause:
            kind = kind_of(name)
            # Whether it is set or not: it comes before resources.memory, which may be the wrong one.
            cause += f": raise resources.steps.{kind}.memory{SMALLER_BATCH.get(kind, '')}"
        # Where a container has run, its log says more than its pod.
        has_log = not record and not (pod and pod.reason)
        where = self.look(LOGS if has_log else "describe workflows,pods")
        return f"{cause}; {where}" if cause else where

    def is_out_of_memory(self, name: str) -> bool:
        """Whether Kubernetes says that a step's container had used up its memory."""
        pod = self.pods.get(name)
        return pod is not None and not pod.is_driver and "OOMKilled" in pod.sentence

    def _failure_of_driver(self, name: str, pod: Pod) -> str:
        """Why the pod failed that Kubeflow starts before that of a step, or before all steps."""
        if name == ROOT_DRIVER:
            cause = pod.sentence or "it failed: no step was started"
        else:
            cause = f"its driver failed: {pod.sentence or 'no container of the step was started'}"
        if pod.last_words:
            return cause
        # Where no container has run there is no log.
        return f"{cause}; {self.look(LOGS) if pod.has_failed_by_itself else pod.remedy('')}"

    def why_pending(self, name: str) -> str:
        """Why a step has been pending for long, with a remedy; empty within the first minute."""
        pod = self.pods.get(name)
        if pod is None:  # only Kubeflow's list says so
            return ""
        if pod.phase == "Failed":
            return f"another attempt follows, unless it was the last: {self.failure_of(name)}"
        if (now() - pod.created).total_seconds() < SOON:
            return ""
        text = f"pending since {pod.created:%H:%M} UTC"
        if not pod.sentence:
            return f"{text}; {self.look('describe workflows,pods')}"
        remedy = pod.remedy("" if pod.is_driver else kind_of(name))
        return f"{text}: {pod.sentence}; {remedy}" if remedy else f"{text}: {pod.sentence}"
