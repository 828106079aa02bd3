"""A step that its nodes do: it starts a TrainJob of Kubeflow Trainer, follows it, and ends with its result.

All attempts of a step use one name, so an attempt whose predecessor was killed follows the TrainJob that this one has
started. A step that fails or is cancelled deletes it.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.lineage import tracking
from ptl.log import say
from ptl.steps import trainjob
from ptl.steps.kubernetes_api import Cluster, NoAnswerError
from ptl.steps.trainjob import CONTAINER, OF_JOB_SET, Json, NodePod

POLL = 2.0  # seconds
LAST_LOG = 10  # seconds for the end of the first node's log
DELETION = 600  # seconds within which an earlier TrainJob must be gone
WITHOUT_PODS = 60  # seconds after which their lack has another reason than a queue


def train(step: str, call: Json, begin: Callable[[], None]) -> None:
    """Have the nodes do the step of this call. Raises InputError or WorkError with the failing node's own error.

    `begin` counts an attempt; following the TrainJob of an earlier one is none.
    """
    cluster = Cluster()
    run = tracking.pipeline_run()
    name = trainjob.name_of(run, step)
    job = trainjob.complete(
        os.environ[trainjob.TEMPLATE],
        name,
        run,
        cluster.own_pod(),
        call,
    )
    with processes.handling_signals(processes.end_by_signal):
        follows = _follows_earlier(cluster, step, name)
        if not follows:
            begin()
        try:
            # Another attempt of this very moment may be first: then its TrainJob is followed.
            if not follows and cluster.create(job):
                say(step, f"TrainJob {name} was created: {job['spec']['trainer']['numNodes']} nodes")
            _follow(cluster, step, name)
        except NoAnswerError:
            raise  # it could not be deleted either
        except BaseException:
            say(step, f"TrainJob {name} is deleted")
            cluster.delete(name)
            raise


def _follows_earlier(cluster: Cluster, step: str, name: str) -> bool:
    """Whether an earlier attempt has started a TrainJob that has not ended. One that has ended is deleted."""
    began = time.monotonic()
    said = False
    while (existing := cluster.train_job(name)) is not None:
        deleted = "deletionTimestamp" in existing["metadata"]
        if not deleted and trainjob.ended(existing) is None:
            say(step, f"TrainJob {name} was started by an earlier attempt: it is followed")
            return True
        if not deleted:
            # Of an attempt that was killed before it could delete it; this one begins anew.
            cluster.delete(name)
        if not said:
            say(step, f"TrainJob {name} of an earlier attempt is being deleted: this one waits for it")
            said = True
        if time.monotonic() - began > DELETION:
            raise WorkError(
                f"TrainJob {name} of an earlier attempt is not gone after {DELETION} s",
                field=step,
                remedy=f"a pod of it may be on a machine that is lost: kubectl get pods -l {OF_JOB_SET}={name}",
            )
        time.sleep(POLL)
    return False


def _follow(cluster: Cluster, step: str, name: str) -> None:
    """Wait for the end, with the first node's log. Raises the error of the node that failed first."""
    ended = threading.Event()
    log = threading.Thread(
        target=_copy_log,
        args=(cluster, name, ended),
        daemon=True,
    )
    log.start()
    try:
        condition, failed = _until_ended(cluster, step, name)
    finally:
        ended.set()
    log.join(LAST_LOG)
    if condition["type"] != "Complete":
        raise _error(condition, failed, name)


def _until_ended(cluster: Cluster, step: str, name: str) -> tuple[Json, list[NodePod]]:
    """The condition with which a TrainJob has ended, and the pods that failed; says what changes until then."""
    last_state = ""
    failed: dict[tuple[int, int], NodePod] = {}  # by attempt and rank
    began = time.monotonic()
    while True:
        job = cluster.train_job(name)
        if job is None:
            raise WorkError(f"TrainJob {name} was deleted by somebody else", field=step)
        pods = cluster.nodes(name)
        for pod in pods:
            # A restart takes the pod away, with what it says.
            if pod.failure:
                failed.setdefault((pod.attempt, pod.node), pod)
        state = _state(job, pods, failed.values())
        if not pods and time.monotonic() - began > WITHOUT_PODS:
            state += f"; why: kubectl describe jobset {name}"
        if state != last_state:
            say(step, f"TrainJob {name}: {state}")
            last_state = state
        condition = trainjob.ended(job)
        if condition is not None:
            return condition, list(failed.values())
        time.sleep(POLL)


def _copy_log(cluster: Cluster, name: str, ended: threading.Event) -> None:
    """Copy the first node's log into this step's own, also after a restart, which makes a pod of another name."""
    last_line: dict[str, float] = {}  # time.monotonic(), by pod
    is_last = False
    while not is_last:
        is_last = ended.wait(POLL)
        # Whatever ends the connection, and whatever the client raises: a log is no reason to fail.
        with contextlib.suppress(Exception):
            for pod in cluster.nodes(name):
                is_new = pod.name not in last_line
                if pod.node != 0 or not (pod.phase == "Running" or (is_new and pod.phase != "Pending")):
                    continue
                # What was not copied yet; a line at the seam may come twice.
                since = None if is_new else math.ceil(time.monotonic() - last_line[pod.name])
                last_line.setdefault(pod.name, time.monotonic())
                for line in cluster.log(pod.name, CONTAINER, since):
                    print(line, flush=True)
                    last_line[pod.name] = time.monotonic()


def _state(job: Json, pods: list[NodePod], failed: Iterable[NodePod]) -> str:
    """One line for people."""
    condition = trainjob.ended(job)
    if condition is not None:
        return str(condition["type"]).lower()
    if job["spec"].get("suspend"):
        return "suspended: it waits in its queue"
    newest = max((pod.attempt for pod in pods), default=0)
    running = [pod for pod in pods if pod.attempt == newest and pod.phase == "Running"]
    state = f"{len(running)} of {job['spec']['trainer']['numNodes']} nodes run"
    obstacles = [pod.obstacle for pod in pods if pod.obstacle]
    if obstacles:
        state += f"; {obstacles[0]}"
    if not newest:
        return state
    before = trainjob.cause(pod for pod in failed if pod.attempt < newest)
    return f"{state}, restart {newest}" + (f" ({before.error})" if before else "")


def _error(condition: Json, failed: Iterable[NodePod], name: str) -> InputError | WorkError:
    """The error of the node that failed first; Kubernetes' own words only where no node left any."""
    cause = trainjob.cause(failed)
    if cause is None:
        return WorkError(
            f"TrainJob {name} failed ({condition.get('reason')}): {condition.get('message')}",
            remedy="the log above has what its first node printed",
        )
    kind = InputError if cause.exit_code == InputError.exit_code else WorkError
    return kind(cause.error)
