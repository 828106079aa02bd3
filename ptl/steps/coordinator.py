"""A step that its nodes do: it starts a TrainJob of Kubeflow Trainer, follows it, and ends with its result.

All attempts of a step use one name, so an attempt whose predecessor was killed follows the TrainJob that this one has
started. A step that fails or is cancelled deletes it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.lineage import tracking
from ptl.log import say
from ptl.steps import trainjob
from ptl.steps.kubernetes_api import Cluster, NoAnswerError
from ptl.steps.trainjob import OF_JOB_SET, Json, NodePod

POLL = 2.0  # seconds
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
                say(
                    step,
                    f"TrainJob {name} was created: {job['spec']['trainer']['numNodes']} nodes",
                )
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
        if "deletionTimestamp" not in existing["metadata"]:
            if trainjob.ended(existing) is None:
                say(step, f"TrainJob {name} was started by an earlier attempt: it is followed")
                return True
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
    """Wait for the end, with each change of state and the first node's log. Raises the error of the failing node."""
    last_state = ""
    failed: dict[str, NodePod] = {}  # by the pod's name
    copied: dict[str, tuple[str, float]] = {}
    began = time.monotonic()
    condition = None
    while condition is None:
        job = cluster.train_job(name)
        if job is None:
            raise WorkError(f"TrainJob {name} was deleted by somebody else", field=step)
        pods = cluster.nodes(name)
        # A restart takes the pod away, with what it says.
        for pod in pods:
            if pod.failure:
                failed.setdefault(pod.name, pod)
        _copy_log(cluster, pods, copied)
        condition = trainjob.ended(job)
        state = _state(job, pods, failed.values()) if condition is None else condition["type"].lower()
        if not pods and time.monotonic() - began > WITHOUT_PODS:
            state += f"; why: kubectl describe jobset {name}"
        if state != last_state:
            say(step, f"TrainJob {name}: {state}")
            last_state = state
        if condition is None:
            time.sleep(POLL)
    if condition["type"] != "Complete":
        raise _error(condition, failed.values(), name)


def _copy_log(cluster: Cluster, pods: list[NodePod], copied: dict[str, tuple[str, float]]) -> None:
    """Print what is new of the first node's log, also after a restart, which makes a pod of another name.

    `copied` has the time of each pod's last line, and time.monotonic() of its last copy.
    """
    # Whatever the client raises: a log is no reason to fail.
    with contextlib.suppress(Exception):
        for pod in pods:
            if pod.node != 0 or pod.phase == "Pending":
                continue
            now = time.monotonic()
            newest, copied_at = copied.get(pod.name, ("", None))
            since = None if copied_at is None else math.ceil(now - copied_at) + 1
            for line in cluster.log(pod.name, since):
                printed_at, _, text = line.partition(" ")
                if printed_at > newest:
                    print(text, flush=True)
                    newest = printed_at
            copied[pod.name] = (newest, now)


def _state(job: Json, pods: list[NodePod], failed: Iterable[NodePod]) -> str:
    """One line for people."""
    if job["spec"].get("suspend"):
        return "suspended: it waits in its queue"
    newest = max((pod.attempt for pod in pods), default=0)
    running = [pod for pod in pods if pod.attempt == newest and pod.phase == "Running"]
    state = f"{len(running)} of {job['spec']['trainer']['numNodes']} nodes run"
    obstacles = [pod.obstacle for pod in pods if pod.obstacle]
    if obstacles:
        state += f"; {obstacles[0]}"
    if newest:
        before = trainjob.cause(pod for pod in failed if pod.attempt < newest)
        state += f", restart {newest}" + (f" ({before.error})" if before else "")
    return state


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
