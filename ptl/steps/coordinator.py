"""A step that its nodes do: it starts a TrainJob of Kubeflow Trainer, follows it, and ends with its result.

All attempts of a step use one name, so an attempt whose predecessor was killed follows the TrainJob that this one has
started. A step that fails or is cancelled deletes it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.lineage import tracking
from ptl.log import say
from ptl.recovery.machines import NODE_RANK, NODES
from ptl.steps import attempts, trainjob
from ptl.steps.call import Call
from ptl.steps.kubernetes_api import Cluster, NoAnswerError
from ptl.steps.trainjob import CONTAINER, INDEX, Json, NodeFailure

POLL = 2.0  # seconds
LAST_LOG = 10  # seconds for the end of the first node's log


def is_one(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this pod only coordinates: its step asks for several nodes, on a cluster, and it is none of them."""
    several = int(environment.get(NODES, "1")) > 1
    return several and attempts.on_a_cluster() and NODE_RANK not in environment


def train(call: Call) -> None:
    """Have the nodes do the step. Raises InputError or WorkError with the failing node's own error."""
    step = call.step.name
    cluster = Cluster()
    name = trainjob.name_of(tracking.pipeline_run(), step)
    template = json.loads(os.environ[trainjob.TEMPLATE])
    job = trainjob.complete(template, name, cluster.own_pod(), _for_nodes(call))

    def cancelled(number: int) -> NoReturn:
        raise SystemExit(128 + number)

    with processes.handling_signals(cancelled):
        _create(cluster, step, job)
        try:
            _follow(cluster, step, name)
        except NoAnswerError:
            raise
        except BaseException:
            say(step, f"TrainJob {name} is deleted")
            cluster.delete(name)
            raise


def _for_nodes(call: Call) -> Json:
    """The step's call, with what its inputs' files hold."""
    settings = {"step": call.step.name, "experiment": call.step.experiment, **call.settings}
    return {"settings": settings, "inputs": {name: pointer.dump() for name, pointer in call.inputs.items()}}


def _create(cluster: Cluster, step: str, job: Json) -> None:
    """Create the TrainJob, or find the one that an earlier attempt has started and that has not ended."""
    name = job["metadata"]["name"]
    while not cluster.create(job):
        existing = cluster.train_job(name)
        deleted = existing is None or "deletionTimestamp" in existing["metadata"]
        if existing is not None and not deleted:
            if trainjob.ended(existing) is None:
                say(step, f"TrainJob {name} was started by an earlier attempt: it is followed")
                return
            # Of an attempt that was killed before it could delete it; this one begins anew.
            cluster.delete(name)
        time.sleep(POLL)
    nodes = job["spec"]["trainer"]["numNodes"]
    say(step, f"TrainJob {name} was created: {nodes} nodes")


def _follow(cluster: Cluster, step: str, name: str) -> None:
    """Wait for the end, with the first node's log; says what changes."""
    said = ""
    seen: dict[tuple[int, int], NodeFailure] = {}
    logs: dict[str, threading.Thread] = {}
    while True:
        job = cluster.train_job(name)
        pods = cluster.pods(name)
        for failure in trainjob.failures(pods):
            # a restart takes the pod away, with what it says
            seen.setdefault((failure.attempt, failure.node), failure)
        _copy_logs(cluster, pods, logs)
        state = _state(job, pods, list(seen.values()))
        if state != said:
            say(step, f"TrainJob {name}: {state}")
            said = state
        if job is None:
            raise WorkError(f"TrainJob {name} was deleted by somebody else", field=step)
        condition = trainjob.ended(job)
        if condition is not None:
            for log in list(logs.values()):
                log.join(LAST_LOG)
            if condition["type"] == "Complete":
                return
            raise _error(condition, list(seen.values()))
        time.sleep(POLL)


def _copy_logs(cluster: Cluster, pods: list[Json], logs: dict[str, threading.Thread]) -> None:
    """Copy what the first node prints into this step's log; a restart makes a pod of another name."""
    for pod in pods:
        name = pod["metadata"]["name"]
        is_first = pod["metadata"]["labels"].get(INDEX) == "0"
        if is_first and name not in logs and pod.get("status", {}).get("phase") != "Pending":
            logs[name] = threading.Thread(target=_copy_log, args=(cluster, name, logs), daemon=True)
            logs[name].start()


def _copy_log(cluster: Cluster, pod: str, logs: dict[str, threading.Thread]) -> None:
    printed = 0
    try:
        for line in cluster.log(pod, CONTAINER):
            print(line, flush=True)
            printed += 1
    except Exception as error:  # whatever the client raises, a log is no reason to fail
        if printed:
            print(f"the rest of the log of {pod} cannot be read: {type(error).__name__}", flush=True)
        else:
            # at the next look again
            logs.pop(pod, None)


def _state(job: Json | None, pods: list[Json], seen: list[NodeFailure]) -> str:
    """One line for people."""
    if job is None:
        return "gone"
    condition = trainjob.ended(job)
    if condition is not None:
        return str(condition["type"]).lower()
    if job["spec"].get("suspend"):
        return "suspended: it waits in its queue"
    newest = max((trainjob.attempt_of(pod["metadata"]["labels"]) for pod in pods), default=0)
    running = [
        pod
        for pod in pods
        if trainjob.attempt_of(pod["metadata"]["labels"]) == newest and pod.get("status", {}).get("phase") == "Running"
    ]
    state = f"{len(running)} of {job['spec']['trainer']['numNodes']} nodes run"
    if not newest:
        return state
    before = trainjob.cause([failure for failure in seen if failure.attempt < newest])
    return f"{state}, restart {newest}" + (f" ({before})" if before else "")


def _error(condition: dict[str, Any], seen: list[NodeFailure]) -> InputError | WorkError:
    """The error of the node that failed first; Kubernetes' own words only where no node left any."""
    cause = trainjob.cause(seen)
    if cause is None:
        return WorkError(f"the TrainJob failed ({condition.get('reason')}): {condition.get('message')}")
    kind = InputError if cause.exit_code == InputError.exit_code else WorkError
    return kind(str(cause))
