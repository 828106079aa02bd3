"""Runs that have been started: status, watch, cancel, retry; each returns an exit code."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing.pool import ThreadPool
from typing import Any

from pipelines.prune_tune_loop import pods, run_view
from pipelines.prune_tune_loop.kfp_api import (
    LOGIN_AGAIN,
    Api,
    RefusedError,
    Server,
    connect,
    explained,
    get_run,
    run_id_of,
)
from pipelines.prune_tune_loop.pods import Pod
from pipelines.prune_tune_loop.run_view import CANCELED, ENDED, RunView
from ptl import address, processes
from ptl.errors import InputError, PtlError, WorkError
from ptl.lineage import locate, run_status
from ptl.lineage.run_status import RunProgress
from ptl.log import Show

DONE, FAILED, GATE, TIMEOUT = 0, 1, 3, 4  # exit codes
OUTAGE = 600.0  # seconds without an answer after which a wait gives up; the run does not need us
PATIENCE = 20.0  # seconds for what Kubernetes says of the pods
SETTLING = 60.0  # seconds that `cancel` waits for the end, and `retry` for the begin; 15 were seen
# seconds without a pod that is alive after which that is worth a line; between two steps pass 20 to 30
IDLE = 120.0
TRAINING = 60.0  # seconds between two lines of a training's progress
# States of a step that are no change worth a line.
QUIET = (run_view.WAITING, run_view.NOT_STARTED, run_view.UNKNOWN)
# of a run that was retried; a short one may be done again
UNDER_WAY = ("PENDING", "RUNNING", "SUCCEEDED")
# by the state of a run that ended; else FAILED
MLFLOW_STATUS = {"SUCCEEDED": "FINISHED", CANCELED: "KILLED"}


@dataclass
class Observer:
    """What a command keeps between two looks at a run."""

    api: Api
    show: Show
    step_names: list[str] = field(default_factory=list)
    # the last answer of MLflow, used when the next one does not come
    records: RunProgress | None = None
    is_read: bool = True  # whether MLflow has always answered
    reads_pods: bool = True  # unless they could not be read the first time
    busy: datetime | None = None  # when a pod of the run was last seen alive
    pods: Mapping[str, Pod] | None = None  # that have not succeeded, by step, as last read
    announced: dict[str, str] = field(default_factory=dict)  # what was last printed, by topic
    # time of the last line of a training, by step
    trainings: dict[str, float] = field(default_factory=dict)

    def look(self, run: Any) -> RunView:
        """A run as Kubeflow has just described it, with its records in MLflow and what Kubernetes says of its pods."""
        # The names are those of the run's pipeline version, which does not change.
        self.step_names = self.step_names or run_view.step_names(self.api, run)
        self._read_records(run)
        namespace = self.api.namespace or "kubeflow"
        if self.reads_pods and run.state in ("PENDING", "RUNNING", "FAILED"):
            # A kubeconfig and its login plugins are the user's own, and may fail or wait for ever.
            with suppress(Exception), ThreadPool(1) as pool:
                self.pods = pool.apply_async(pods.read, (namespace, run.run_id)).get(PATIENCE)
            # Without any answer it would be the same again, and may ask for another login.
            self.reads_pods = self.pods is not None

        def where(command: str) -> str:
            selection = f"-n {namespace} -l pipeline/runid={run.run_id}"
            return f"see `kubectl {command} {selection}` and {self.api.link(run.run_id)}"

        records = self.records.steps if self.records else None
        if records is None and self.is_read and run.state not in ENDED:
            records = {}  # the first step makes them
        view = run_view.view(run, self.step_names, records, self.pods or {}, where)
        if view.ended or self._is_at_work(view):
            self.busy = run_view.now()
        busy = max(filter(None, [self.busy, run_view.newest_change(run, records or {})]))
        if (run_view.now() - busy).total_seconds() > IDLE:
            words = self._workflow_words(namespace, run.run_id)
            self.announce_once(
                "idle", f"for {IDLE / 60:.0f} minutes {words}; {where('describe workflows,pods')}"
            )
        return view

    def _is_at_work(self, view: RunView) -> bool:
        """Whether a step's or a driver's pod is alive, or another attempt follows, which has its own line."""
        if self.pods is None:
            return any(step.state in ("PENDING", "RUNNING") for step in view.steps)
        is_alive = any(pod.phase != "Failed" for pod in self.pods.values())
        return is_alive or any(step.state == "PENDING" and step.reason for step in view.steps)

    def _workflow_words(self, namespace: str, run_id: str) -> str:
        words = ""
        if self.reads_pods:
            with suppress(Exception), ThreadPool(1) as pool:
                words = pool.apply_async(pods.workflow, (namespace, run_id)).get(PATIENCE)
        return (
            f"no pod of the run has been alive: {words}"
            if words
            else "no step has been seen running"
        )

    def _read_records(self, run: Any) -> None:
        # The first time all of MLflow's experiments are looked through.
        experiment_ids = [self.records.experiment_id] if self.records else None
        try:
            self.records = run_status.read(run.run_id, experiment_ids) or self.records
        except PtlError as error:
            self.is_read = False
            if "records" not in self.announced:
                self.announce_once("records", f"the steps' own records are not read: {error}")

    def settle(self, view: RunView) -> None:
        """When the run has ended, end what is still RUNNING of it in MLflow; a failure to do so is one line."""
        if not view.ended or self.records is None:
            return
        status = MLFLOW_STATUS.get(view.state, "FAILED")
        reasons = {step.name: step.reason for step in view.steps}
        # MLflow may have been away when they ended.
        succeeded = [step.name for step in view.steps if step.state == "SUCCEEDED"]
        try:
            if run_status.close(self.records, status, view.reason, reasons, succeeded):
                self.show(f"MLflow: what was still RUNNING of this run is {status} now")
        except PtlError as error:
            self.show(f"MLflow: the run could not be closed: {error}")

    def announce(self, view: RunView) -> None:
        """Print each change of a run that is waited for as one line, and nothing twice."""
        now = time.monotonic()
        for step in view.steps:
            if step.state not in QUIET:
                self.announce_once(step.name, step.change)
            training = step.record.training
            if (
                training
                and step.state == "RUNNING"
                and now - self.trainings.get(step.name, -math.inf) >= TRAINING
            ):
                self.trainings[step.name] = now
                self.announce_once(f"training of {step.name}", f"{step.name}: {training}")
        self.announce_once("hint", view.hint_to_cancel)

    def announce_once(self, topic: str, text: str) -> None:
        """Print the text of a topic if it has changed."""
        if text and self.announced.get(topic) != text:
            self.show(text)
        self.announced[topic] = text


def status(
    reference: str,
    server: Server,
    *,
    say: Show = print,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Print a run and its steps as a table; `write` gets the same as JSON. 1 when it failed or was canceled."""
    api = connect(server)
    run_id = run_id_of(api, reference)
    run = get_run(api, run_id)
    observer = Observer(api, say)
    view = observer.look(run)
    if observer.records is None and observer.is_read:
        say("MLflow has no records of this run, or none yet")
    say(view.table)
    # Reasons are longer than a cell of the table.
    reasons = [f"{step.name}: {step.reason}" for step in view.steps if step.reason]
    if view.state == "FAILED" and not reasons:
        reasons = [f"{view.name}: {view.reason}"]
    against_retry = (
        view.advice if view.dead_end or view.is_out_of_memory or view.fails_again else ""
    )
    for line in [*reasons, view.hint_to_cancel, against_retry]:
        if line:
            say(line)
    observer.settle(view)
    say(f"{view.name}: {view.state}  {api.link(run_id)}")
    if write:
        write({**view.document, "link": api.link(run_id)})
    return FAILED if view.state in ("FAILED", CANCELED) else DONE


def cancel(reference: str, server: Server, *, say: Show = print, poll: float = 2.0) -> int:
    """Ask Kubeflow to end a run, and close it in MLflow when it has; a run that has ended stays as it is."""
    api = connect(server)
    run_id = run_id_of(api, reference)
    run = get_run(api, run_id)
    is_asked = False
    if run.state not in ENDED:
        try:
            with explained(api.host):
                api.client.terminate_run(run_id)
            is_asked = True
        except RefusedError:
            # 400: it has ended meanwhile.
            if get_run(api, run_id).state not in ENDED:
                raise
        # It may end later: what is RUNNING in MLflow can be closed after that only.
        run = _await_state(api, run_id, ENDED, poll, (*ENDED, "CANCELING"))
    observer = Observer(api, say)
    view = observer.look(run)
    observer.settle(view)
    if not view.ended:
        say(f"{view.name}: asked to end; `ptl status {run_id}` shows when it has")
    else:
        say(
            f"{view.name}: {view.state}"
            if is_asked
            else f"{view.name}: has ended before ({view.state})"
        )
    return DONE


def _await_state(
    api: Api, run_id: str, states: Collection[str], poll: float, effects: Collection[str]
) -> Any:
    """The run in one of these states, or in one of `effects` once the time for it is over; else WorkError.

    The server's answer to a request is empty, as a proxy's may be: only the run's state shows that it has arrived.
    """
    deadline = time.monotonic() + SETTLING
    while True:
        run = get_run(api, run_id)
        is_late = time.monotonic() > deadline
        if run.state in states or (is_late and run.state in effects):
            return run
        if is_late:
            raise WorkError(
                f"the request was answered, but after {SETTLING:.0f} s {run_id} is {run.state} as before",
                field="run",
                remedy=LOGIN_AGAIN,
            )
        time.sleep(poll)


def retry(
    reference: str,
    server: Server,
    *,
    wait: bool = False,
    timeout: float | None = None,
    poll: float = 15.0,
    say: Show = print,
) -> int:
    """Run the failed steps of a run again, under the same id: what was finished is taken from the store."""
    api = connect(server)
    run_id = run_id_of(api, reference)
    run = get_run(api, run_id)
    if run.state not in ("FAILED", "CANCELED"):
        raise InputError(
            f"{run_id} is {run.state}",
            field="run",
            remedy="only a run that failed or was canceled can be retried",
        )
    # What still is RUNNING in MLflow belongs to the attempt that failed.
    observer = Observer(api, say)
    view = observer.look(run)
    observer.settle(view)
    if view.dead_end:
        raise InputError(
            f"{run_id}: {view.dead_end} ({view.reason})", field="run", remedy=run_view.SUBMIT_AGAIN
        )
    with explained(api.host):
        api.client._run_api.run_service_retry_run(run_id)
    _await_state(api, run_id, UNDER_WAY, min(poll, 2.0), ())
    # The run itself is under way, whatever MLflow answers.
    if observer.records is not None:
        try:
            run_status.reopen(observer.records)
        except PtlError as error:
            say(f"MLflow: the run could not be reopened: {error}")
    say(f"{run.display_name}: runs again  {api.link(run_id)}")
    return watch(api, run_id, False, timeout, poll, say) if wait else DONE


def watch(
    api: Api, run_id: str, is_gated: bool, timeout: float | None, poll: float, say: Show
) -> int:
    """Follow a run until it ends: 0 succeeded, 1 failed or canceled, 3 gate not passed, 4 out of time.

    Of a run that `is_gated` the result must be readable; of others it says itself whether there was a gate. kfp's own
    wait ignores CANCELED (kubeflow/pipelines#14473). A run that is out of time continues. A server that is
    away for up to OUTAGE seconds, as in an upgrade, does not end the wait, nor does one that answers nonsense. Ctrl-C
    ends the wait alone.
    """
    with processes.interruptible(
        f"the run continues; `ptl status {run_id}` shows it, `ptl cancel {run_id}` ends it"
    ):
        observer = Observer(api, say)
        last_answer = time.monotonic()
        deadline = math.inf if timeout is None else last_answer + timeout
        while True:
            is_last_look = time.monotonic() >= deadline
            try:
                run = get_run(api, run_id)
            except WorkError as error:
                if time.monotonic() - last_answer > OUTAGE:
                    raise
                late = f"not seen to finish in {timeout or 0:.0f} s: {error}"
                observer.announce_once("outage", f"still waiting: {error}")
            else:
                last_answer = time.monotonic()
                observer.announced.pop("outage", None)  # the next one is a new one
                view = observer.look(run)
                observer.announce(view)
                if view.ended:
                    observer.settle(view)
                    return _exit_code(view, is_gated, say)
                late = f"not finished after {timeout or 0:.0f} s ({view.state}); it continues: `ptl status {run_id}`"
            if is_last_look:
                say(late)
                return TIMEOUT
            time.sleep(max(0, min(poll, deadline - time.monotonic())))


def _exit_code(view: RunView, is_gated: bool, say: Show) -> int:
    """The exit code of a wait, after its last lines: the result of a run that succeeded, or why it did not."""
    from ptl.report.render import terminal_text
    from ptl.report.result import Result

    if view.state != "SUCCEEDED":
        reason = f": {view.reason}" if view.state == "FAILED" and view.reason else ""
        say(f"{view.name}: {view.state}{reason}; {view.advice}")
        return FAILED
    outcome, code = "", DONE
    try:
        result = Result.model_validate(locate.result(view.run_id))
    except (PtlError, ValueError) as error:  # no answer, or another version's result
        if is_gated:
            raise WorkError(f"the run succeeded, but its result cannot be read: {error}") from error
        say(f"its result cannot be read: {error}")
    else:
        result.mlflow.url = address.mlflow_ui()  # the steps' own may be one within the cluster
        report = f"`ptl fetch {view.run_id} DIR --report` writes it; in MLflow it is an artifact, report/report.html"
        say(terminal_text(result, report))
        if result.settings.get("gate", {}).get("enabled", is_gated):
            # The control has no gate.
            last = [row for row in result.rows if row.arm == "loop"][-1]
            code = DONE if last.verdict == "accepted" else GATE
            outcome = f", gate {'not ' if code else ''}passed: iteration {last.iteration} {last.verdict}, "
            outcome += f"{result.final.share_removed:.1%} removed"
    say(f"{view.name}: SUCCEEDED{outcome}")
    return code
