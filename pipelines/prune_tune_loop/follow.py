"""Runs that have been started: status, watch, cancel, retry; each returns an exit code."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines.prune_tune_loop import outcome, run_view, task_list
from pipelines.prune_tune_loop.kfp_api import CONFLICT, Api, RefusedError, Server, call, connect, get_run
from pipelines.prune_tune_loop.run_view import RunView, StepView
from ptl import processes, progress
from ptl.config import Config
from ptl.errors import InputError, PtlError, WorkError
from ptl.progress import RunProgress

DONE, FAILED, GATE, TIMEOUT = 0, 1, 3, 4
OUTAGE = 600.0  # seconds without an answer after which a wait gives up; the run does not need us
SETTLING = 60.0  # seconds that `cancel` waits for the end, and `retry` for the begin; 15 were seen
TRAINING = 60.0  # seconds between two lines of a training's progress
ANNOUNCED = ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELED", run_view.NOT_NEEDED)
Say = Callable[[str], None]


@dataclass
class Observer:
    """What is asked once in a command: the names of the steps, and where the run is in MLflow."""

    api: Api
    say: Say
    names: dict[str, str] = field(default_factory=dict)
    experiments: list[str] | None = None  # None until the run has been found
    read: RunProgress | None = None  # the last answer of MLflow, used when the next one does not come
    silent: bool = False  # that MLflow does not answer has been said

    def look(self, run: Any) -> tuple[RunView, RunProgress | None]:
        """A run as Kubeflow has just described it, joined with its records in MLflow."""
        if not self.names:
            self.names = task_list.step_names(self.api, run)
        records = self.records(run.run_id)
        listed = task_list.fold(run, self.names)
        namespace = self.api.namespace or "kubeflow"
        return run_view.view(run, self.names, listed, records, namespace, self.api.link(run.run_id)), records

    def records(self, run_id: str) -> RunProgress | None:
        """The steps' own records; when they cannot be read, that is said once."""
        try:
            records = progress.read(run_id, self.experiments)
        except PtlError as error:
            if not self.silent:
                self.say(f"the steps' own records are not read, only Kubeflow's list of tasks: {error}")
            self.silent = True
            return self.read
        if records is not None:
            self.experiments, self.read = [records.experiment_id], records
        return self.read

    def settle(self, view: RunView, records: RunProgress | None) -> None:
        """When the run has ended, end what is still RUNNING of it in MLflow; a failure to do so is one line."""
        if not view.ended or records is None:
            return
        status = {"SUCCEEDED": "FINISHED", "CANCELED": "KILLED"}.get(view.state, "FAILED")
        try:
            if progress.close(records, status, view.reason, {step.name: step.reason for step in view.steps}):
                self.say(f"MLflow: what was still RUNNING of this run is {status} now")
        except PtlError as error:
            self.say(f"MLflow: the run could not be closed: {error}")


def status(run_id: str, server: Server, *, say: Say = print) -> int:
    """Print a run and its steps as a table. 1 when it failed or was canceled."""
    api = connect(server)
    observer = Observer(api, say)
    view, records = observer.look(get_run(api, run_id))
    if records is None and not observer.silent:
        say("MLflow has no records of this run, or none yet: this is only Kubeflow's list of tasks")
    say(table(view))
    for step in view.steps:
        if step.reason:
            say(f"{step.name}: {step.reason}")
    if view.state == "FAILED" and not any(step.reason for step in view.steps):
        say(f"{view.name}: {view.reason}")
    if any(step.state == run_view.NOT_LISTED for step in view.steps):
        say(
            f"{run_view.NOT_LISTED}: its list names a step when it starts, and stops being updated when the run's "
            f"workflow is larger than 1 MiB; {api.link(run_id)} shows all"
        )
    observer.settle(view, records)
    if hint := _still_at_work(view):
        say(hint)
    say(f"{view.name}: {_words(view)}  {api.link(run_id)}")
    return FAILED if view.state in ("FAILED", "CANCELED") else DONE


def cancel(run_id: str, server: Server, *, say: Say = print, poll: float = 2.0) -> int:
    """Ask Kubeflow to end a run, and close it in MLflow when it has; a run that has ended stays as it is."""
    api = connect(server)
    observer = Observer(api, say)
    run = get_run(api, run_id)
    if run.state not in task_list.ENDED:
        try:
            call(api, api.client.terminate_run, run_id)
        except RefusedError:
            run = get_run(api, run_id)  # 400: it has ended meanwhile
            if run.state not in task_list.ENDED:
                raise
    view, records = observer.look(run)
    if view.ended:
        observer.settle(view, records)
        say(f"{view.name}: has ended before ({_words(view)})")
        return DONE
    # The server's answer is empty, as a proxy's may be: only the run's state shows that the request has come to it.
    run = _until(api, run_id, lambda run: run.state in (*task_list.ENDED, "CANCELING"), poll, "does not end")
    view, records = observer.look(run)
    say(f"{view.name}: asked to end; `ptl status {run_id}` shows when it has")
    deadline = time.monotonic() + SETTLING
    while records is not None and not view.ended and time.monotonic() < deadline:
        time.sleep(poll)
        view, records = observer.look(get_run(api, run_id))
    if view.ended:
        observer.settle(view, records)
        say(f"{view.name}: {_words(view)}")
    return DONE


def _until(api: Api, run_id: str, done: Callable[[Any], bool], poll: float, fault: str) -> Any:
    """The run, once a request has had its effect. Raises WorkError where it has none."""
    deadline = time.monotonic() + SETTLING
    while not done(run := get_run(api, run_id)):
        if time.monotonic() > deadline:
            raise WorkError(
                f"run: {run_id} {fault}: the request was answered, but after {SETTLING:.0f} s the run is {run.state} "
                "as before; the session may have expired: log in again (KFP_TOKEN or --token-file)"
            )
        time.sleep(poll)
    return run


def retry(
    run_id: str,
    server: Server,
    *,
    config: Config | None = None,
    wait: bool = False,
    timeout: float | None = None,
    poll: float = 15.0,
    say: Say = print,
) -> int:
    """Run the failed steps of a run again, under the same id: what was finished is taken from the store."""
    api = connect(server)
    run = get_run(api, run_id)
    if run.state not in ("FAILED", "CANCELED"):
        raise InputError(f"run: {run_id} is {run.state}; only a run that failed or was canceled can be retried")
    observer = Observer(api, say)
    view, records = observer.look(run)
    observer.settle(view, records)
    try:
        call(api, api.client._run_api.run_service_retry_run, run_id)
    except RefusedError as error:
        if error.status != CONFLICT:
            raise
        raise InputError(f"run: {run_id} cannot be retried: {error}; `ptl status {run_id}` shows its state") from error
    before = run.finished_at

    def begun(run: Any) -> bool:
        return run.state not in task_list.ENDED or run.finished_at != before

    _until(api, run_id, begun, min(poll, 2.0), "does not run again")
    if records is not None:
        try:
            progress.reopen(records)
        except PtlError as error:
            say(f"MLflow: the run could not be reopened: {error}")
    say(f"{run.display_name}: runs again  {api.link(run_id)}")
    return watch(api, run_id, config, timeout, poll, say) if wait else DONE


def watch(
    api: Api,
    run_id: str,
    config: Config | None,
    timeout: float | None,
    poll: float,
    say: Say,
) -> int:
    """Follow a run until it ends: 0 succeeded, 1 failed or canceled, 3 gate not passed, 4 out of time.

    kfp's own wait ignores CANCELED (kubeflow/pipelines#14473). A run that is out of time continues. A server that is
    away for up to OUTAGE seconds, as in an upgrade, does not end the wait, nor does one that answers nonsense. Ctrl-C
    ends the wait alone.
    """
    with processes.interruptible(f"the run continues; `ptl status {run_id}` shows it, `ptl cancel {run_id}` ends it"):
        return _watch(api, run_id, config, timeout, poll, say)


def _watch(api: Api, run_id: str, config: Config | None, timeout: float | None, poll: float, say: Say) -> int:
    observer, shown = Observer(api, say), _Shown(say)
    deadline = None if timeout is None else time.monotonic() + timeout
    answered = time.monotonic()
    while True:
        late = deadline is not None and time.monotonic() + poll > deadline
        try:
            run = get_run(api, run_id, again=False)
        except WorkError as error:
            if time.monotonic() - answered > OUTAGE:
                raise
            if late:
                say(f"not seen to finish in {timeout:.0f} s: {error}")
                return TIMEOUT
            shown.outage(str(error))
            time.sleep(poll)
            continue
        answered = time.monotonic()
        view, records = observer.look(run)
        shown.steps(view.steps)
        shown.once(_still_at_work(view))
        if view.ended:
            observer.settle(view, records)
            return _outcome(view, config, say)
        if late:
            say(f"not finished after {timeout:.0f} s ({view.state}); it continues: `ptl status {run_id}`")
            return TIMEOUT
        time.sleep(poll)


@dataclass
class _Shown:
    """What a wait has printed, so that each change is one line."""

    say: Say
    states: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    trained: dict[str, tuple[float, str]] = field(default_factory=dict)
    error: str = ""
    hint: str = ""

    def steps(self, steps: list[StepView]) -> None:
        self.error = ""
        for step in steps:
            state = (step.state, step.attempt)
            if step.state in ANNOUNCED and self.states.get(step.name) != state:
                self.states[step.name] = state
                self.say(_line(step))
            when, text = self.trained.get(step.name, (float("-inf"), ""))
            if step.progress and step.progress != text and time.monotonic() - when >= TRAINING:
                self.trained[step.name] = (time.monotonic(), step.progress)
                self.say(f"{step.name}: {step.progress}")

    def once(self, hint: str) -> None:
        if hint and hint != self.hint:
            self.say(hint)
        self.hint = hint

    def outage(self, error: str) -> None:
        if error != self.error:
            self.say(f"still waiting: {error}")
        self.error = error


def _still_at_work(view: RunView) -> str:
    """What to do about a run that has failed but has not ended, since the other arm is still at work."""
    failed = [step.name for step in view.steps if step.state == "FAILED" and not step.name.startswith("control-")]
    working = [step.name for step in view.steps if step.state == "RUNNING"]
    if view.state != "RUNNING" or not failed or not working:
        return ""
    return (
        f"{failed[0]} has failed, and the run ends when {', '.join(working)} has ended; `ptl cancel {view.run_id}` "
        "ends it now, and `ptl retry` then resumes both"
    )


def table(view: RunView) -> str:
    """The steps as a table for the terminal."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=view.name, title_justify="left")
    for heading in ("Step", "State"):
        made.add_column(heading, no_wrap=True)
    for heading in ("Attempt", "Seconds", "Accuracy"):
        made.add_column(heading, justify="right")
    for heading in ("Verdict", "Training"):
        made.add_column(heading)
    for step in view.steps:
        seconds = "" if step.seconds is None else f"{step.seconds:.0f}"
        accuracy = "" if step.accuracy is None else f"{step.accuracy:.3f}"
        attempt = "" if step.attempt is None else str(step.attempt)
        made.add_row(step.name, step.state, attempt, seconds, accuracy, step.verdict, step.progress)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.capture() as captured:
        console.print(made)
    return captured.get().rstrip()


def _line(step: StepView) -> str:
    """A change of a step: its state, and with its end what came out."""
    attempt = f" (attempt {step.attempt})" if step.attempt and step.attempt > 1 else ""
    seconds = "" if step.seconds is None else f" in {step.seconds:.0f} s"
    accuracy = "" if step.accuracy is None else f", accuracy {step.accuracy:.3f}"
    verdict = f", {step.verdict}" if step.verdict else ""
    reason = f": {step.reason}" if step.reason else ""
    return f"{step.name}: {step.state}{attempt}{seconds}{accuracy}{verdict}{reason}"


def _words(view: RunView) -> str:
    return {"CANCELED": "canceled", "CANCELING": "is being canceled"}.get(view.state, view.state)


def _outcome(view: RunView, config: Config | None, say: Say) -> int:
    """The last line of a wait, and its exit code."""
    if view.state != "SUCCEEDED":
        reason = f": {view.reason}" if view.state == "FAILED" and view.reason else ""
        again = f"`ptl retry {view.run_id}` resumes from what is finished"
        say(f"{view.name}: {_words(view)}{reason}; {again}")
        return FAILED
    if config is None or not config.gate.enabled:
        say(f"{view.name}: SUCCEEDED")
        return DONE
    passed, why = outcome.gate_passed(outcome.result_of(view.run_id))
    say(f"{view.name}: SUCCEEDED, gate {'passed' if passed else 'not passed'}: {why}")
    return DONE if passed else GATE
