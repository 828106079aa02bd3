"""A step that its nodes do: it starts a TrainJob of Kubeflow Trainer, follows it, and ends with its result.

All attempts of a step use one name, so an attempt whose predecessor was killed follows the TrainJob that this one has
started. A step that fails or is cancelled deletes it.

The Kubernetes API is asked by the plain client, not by Kubeflow's TrainerClient, which hides the status code of a
refusal and whose TrainJobs cannot have an owner.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ptl import kubernetes, processes
from ptl.errors import InputError, WorkError
from ptl.lineage import tracking
from ptl.log import say
from ptl.steps import trainjob
from ptl.steps.trainjob import API_VERSION, CONTAINER, OF_JOB_SET, PLURAL, Json, NodePod, read_pod

POLL = 2.0  # seconds
LAST_LOG = 10  # seconds for the end of the first node's log
DELETION = 600  # seconds within which an earlier TrainJob must be gone
WITHOUT_PODS = 60  # seconds after which their lack has another reason than a queue
SECONDS = 30  # for one request
PATIENCE = 600  # seconds without an answer of the API before we give up
SILENCE = 300  # seconds without a line after which the connection of a log is opened again
CONFLICT, NOT_FOUND = 409, 404
APPLY = "apply manifests/components/trainer with your overlay (docs/install.md, Kubeflow Trainer)"


def train(step: str, call: Json, begin: Callable[[], None], note: Callable[[str], None]) -> None:
    """Have the nodes do the step of this call. Raises InputError or WorkError with the failing node's own error.

    `begin` counts an attempt; following the TrainJob of an earlier one is none. `note` keeps for `ptl status` what
    the nodes are at, or that there is nothing to say: an empty text.
    """
    cluster = Cluster()
    run = tracking.pipeline_run()
    name = trainjob.name_of(run, step)
    job = trainjob.complete(os.environ[trainjob.TEMPLATE], name, run, cluster.own_pod(), call)
    with processes.handling_signals(processes.end_by_signal):
        follows = _follows_earlier(cluster, step, name)
        cluster.nodes(name)  # a right that is missing shows before anything is started
        if not follows:
            begin()
        try:
            # Another attempt of this very moment may be first: then its TrainJob is followed.
            if not follows and cluster.create(job):
                say(
                    step, f"TrainJob {name} was created: {job['spec']['trainer']['numNodes']} nodes"
                )
            _follow(cluster, step, name, note)
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
            say(
                step,
                f"TrainJob {name} of an earlier attempt is being deleted: this one waits for it",
            )
            said = True
        if time.monotonic() - began > DELETION:
            raise WorkError(
                f"TrainJob {name} of an earlier attempt is not gone after {DELETION} s",
                field=step,
                remedy=f"a pod of it may be on a machine that is lost: kubectl get pods -l {OF_JOB_SET}={name}",
            )
        time.sleep(POLL)
    return False


def _follow(cluster: Cluster, step: str, name: str, note: Callable[[str], None]) -> None:
    """Wait for the end, with the first node's log. Raises the error of the node that failed first."""
    # rights that have sufficed, which a server that starts does not know yet
    cluster.passing += (403,)
    ended = threading.Event()
    log = threading.Thread(target=_copy_log, args=(cluster, name, ended), daemon=True)
    log.start()
    try:
        condition, failed = _until_ended(cluster, step, name, note)
    finally:
        ended.set()
    log.join(LAST_LOG)
    if condition["type"] != "Complete":
        raise trainjob.error(condition, failed, name)


def _until_ended(
    cluster: Cluster, step: str, name: str, note: Callable[[str], None]
) -> tuple[Json, list[NodePod]]:
    """The condition with which a TrainJob has ended, and the pods that failed; says what changes until then."""
    last_state, last_restart = "", None  # a coordinator that was killed may have left a note
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
        state = trainjob.state(job, pods, failed.values())
        if not pods and time.monotonic() - began > WITHOUT_PODS:
            state += f"; why: kubectl describe jobset {name}"
        if state != last_state:
            say(step, f"TrainJob {name}: {state}")
            last_state = state
        restart = trainjob.starting_again(job, pods)
        if restart != last_restart:
            note(restart)
            last_restart = restart
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
                if pod.node != 0 or not (
                    pod.phase == "Running" or (is_new and pod.phase != "Pending")
                ):
                    continue
                # What was not copied yet; a line at the seam may come twice.
                since = None if is_new else math.ceil(time.monotonic() - last_line[pod.name])
                last_line.setdefault(pod.name, time.monotonic())
                for line in cluster.log(pod.name, since):
                    print(line, flush=True)
                    last_line[pod.name] = time.monotonic()


class NoAnswerError(WorkError):
    """The Kubernetes API has been silent for too long; what runs on the cluster is not ended by that."""


class Cluster:
    """The namespace in which this pod runs."""

    # What an API server answers for a while: that it throttles, or when it starts and knows no accounts yet
    passing: tuple[int, ...] = (429, 401)

    def __init__(self) -> None:
        from kubernetes import config

        # in a pod that of its account; elsewhere kubectl's
        try:
            self._api = kubernetes.connect()
            if kubernetes.NAMESPACE.is_file():
                namespace = kubernetes.NAMESPACE.read_text().strip()
            else:
                _, active = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
                namespace = active["context"].get("namespace", "default")
        except config.ConfigException as error:
            raise InputError(
                "this pod has no token of a service account, with which it would start its nodes",
                field="resources.steps.recover.nodes",
                remedy="let Kubernetes mount it (automountServiceAccountToken), or train on one node",
            ) from error
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._train_jobs = f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}"

    def own_pod(self) -> Json:
        """This pod. Raises InputError where its account may not read it."""
        name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
        return dict(self._ask("GET", f"{self._pods}/{name}"))

    def create(self, job: Json) -> bool:
        """Create a TrainJob; False where one of its name exists. Raises InputError where it is refused."""
        return self._ask("POST", self._train_jobs, expected=CONFLICT, body=job) is not None

    def train_job(self, name: str) -> Json | None:
        """A TrainJob with its status; None where there is none."""
        job: Json | None = self._ask("GET", f"{self._train_jobs}/{name}", expected=NOT_FOUND)
        return job

    def delete(self, name: str) -> None:
        """Delete a TrainJob, with its pods; nothing where there is none."""
        query = [("propagationPolicy", "Foreground")]
        self._ask("DELETE", f"{self._train_jobs}/{name}", expected=NOT_FOUND, query_params=query)

    def nodes(self, name: str) -> list[NodePod]:
        """The pods of a TrainJob's nodes."""
        query = [("labelSelector", f"{OF_JOB_SET}={name}")]
        return [read_pod(pod) for pod in self._ask("GET", self._pods, query_params=query)["items"]]

    def log(self, pod: str, since: int | None) -> Iterator[str]:
        """The lines that a node prints, until it ends or the connection does; of the last `since` seconds."""
        query = [("container", CONTAINER), ("follow", "true")]
        if since is not None:
            query.append(("sinceSeconds", str(since)))
        path = f"{self._pods}/{pod}/log"
        # A connection that is dropped without a word, as by a load balancer, looks like a node that prints nothing.
        options = {"_preload_content": False, "_request_timeout": (SECONDS, SILENCE)}
        for line in kubernetes.request(self._api, "GET", path, query_params=query, **options):
            yield line.decode(errors="replace").rstrip("\n")

    def _ask(self, method: str, path: str, *, expected: int | None = None, **options: Any) -> Any:
        """One request, again while nobody answers; None for the status `expected`. Raises NoAnswerError, InputError."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        began = time.monotonic()
        while True:
            try:
                return kubernetes.request(
                    self._api, method, path, _request_timeout=SECONDS, **options
                )
            except (ApiException, HTTPError) as error:
                status = getattr(error, "status", None)
                if status is not None and status == expected:
                    return None
                # from 500 on it is an upgrade of the control plane
                if status is not None and status < 500 and status not in self.passing:
                    raise _refused(error, options.get("body")) from error
                if time.monotonic() - began > PATIENCE:
                    raise NoAnswerError(
                        f"the Kubernetes API has not answered for {PATIENCE} s: {kubernetes.message(error)}",
                        remedy="the TrainJob trains meanwhile, and a retry of the step finds it",
                    ) from error
                time.sleep(5)


def _refused(error: Any, job: Json | None) -> InputError:
    """The error of a request that the API refuses, with what helps."""
    message = kubernetes.message(error)
    runtime = job["spec"]["runtimeRef"]["name"] if job else ""
    if "not found: specified" in message:
        return InputError(
            f"the TrainingRuntime {runtime!r} does not exist here",
            field="resources.steps.recover.runtime",
            remedy=f"{APPLY}, or name one that exists",
        )
    if error.status == NOT_FOUND and job:
        return InputError(
            "this cluster has no Kubeflow Trainer: it does not know TrainJobs",
            field="resources.steps.recover.nodes",
            remedy="install Kubeflow Trainer 2 (docs/install.md), or train on one node",
        )
    # a quota and an admission webhook forbid too
    if "forbidden: User" in message:
        return InputError(
            f"this step's account may not do that: {message}",
            field="resources.steps.recover.nodes",
            remedy=f"for its Role {APPLY}",
        )
    return InputError(f"the cluster refuses it: {message}", field="resources.steps.recover")
