"""What a TrainJob of Kubeflow Trainer is called, what a coordinator adds to its template, and what its pods say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ptl.errors import InputError, WorkError

Json = dict[str, Any]

GROUP = "trainer.kubeflow.org"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
PLURAL = "trainjobs"
MANAGER = "ptl/recover"  # of what we change of the runtime
JOB = "node"  # of the runtime's JobSet, and
CONTAINER = "node"  # of its pods, as Kubeflow Trainer wants them
OF_JOB_SET = "jobset.sigs.k8s.io/jobset-name"  # label of a pod: the TrainJob's name
ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"  # label of a pod
INDEX = "batch.kubernetes.io/job-completion-index"  # label of a pod: the node's rank

TEMPLATE = "PTL_TRAIN_JOB"  # JSON, which the compiled pipeline sets
CALL = "PTL_NODE_CALL"  # JSON: the step of which a node does its part
RUN = "KFP_RUN_ID"  # in a node as in the pod of any other step
# How the variables begin that Kubeflow sets in a pod: by its MLflow plugin, and for the cluster's proxy
OF_KUBEFLOW = ("MLFLOW_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
RUN_LABEL = "ptl/run"  # of a TrainJob
TERMINATION_LOG = "/dev/termination-log"
LONGEST_MESSAGE = 4096  # bytes that Kubernetes keeps of a container's last words
# reasons of every container that waits for its turn
STARTING = ("ContainerCreating", "PodInitializing")
HEAD = 300  # characters of an error that is too long


def name_of(run: str, step: str) -> str:
    """The same for all attempts of a step, so that each finds what another has started; below 63 characters."""
    digits = "".join(character for character in run.lower() if character in "0123456789abcdef")
    return f"ptl-{digits[:12]}-{step}"


def complete(template: str, name: str, run: str, coordinator: Json, call: Json) -> Json:
    """The TrainJob of one step: the template with its name, the step's call, and what its coordinator's pod has."""
    job: Json = json.loads(template)
    metadata, spec = job["metadata"], job["spec"]
    metadata["name"] = name
    # Deleted with the workflow, but not with a pod that another one follows.
    owners = coordinator["metadata"].get("ownerReferences", [])
    metadata["ownerReferences"] = [
        owner | {"controller": False, "blockOwnerDeletion": False} for owner in owners
    ]
    metadata["labels"][RUN_LABEL] = run
    variables = spec["trainer"]["env"]
    # Kubernetes would replace $(NAME) and $$ in it.
    variables += [
        {"name": RUN, "value": run},
        {"name": CALL, "value": json.dumps(call).replace("$", "$$")},
    ]
    # As they are written in the pod, so that a login stays in its Secret.
    (main,) = [
        container for container in coordinator["spec"]["containers"] if container["name"] == "main"
    ]
    variables += [
        entry for entry in main.get("env", []) if entry["name"].upper().startswith(OF_KUBEFLOW)
    ]
    # The identity by which a cloud gives rights to its store.
    account = coordinator["spec"].get("serviceAccountName")
    if account:
        pod_of(job)["serviceAccountName"] = account
    return job


def pod_of(job: Json) -> Json:
    """What a TrainJob changes of its pods."""
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod: Json = replicated["template"]["spec"]["template"]["spec"]
    return pod


def ended(job: Json) -> Json | None:
    """The condition with which a TrainJob has ended: Complete or Failed; None: it has not."""
    conditions = job.get("status", {}).get("conditions", [])
    by_type = {
        condition["type"]: condition for condition in conditions if condition["status"] == "True"
    }
    return by_type.get("Failed") or by_type.get("Complete")


@dataclass(frozen=True)
class NodePod:
    """The pod of a node, as far as a coordinator reads it."""

    name: str
    attempt: int  # how often the nodes were started before
    node: int  # its rank
    phase: str
    obstacle: str  # why it does not start; empty where Kubernetes says nothing
    failure: str  # why it failed; empty: it has not
    explained: bool  # the failure, by the node itself or by Kubernetes
    exit_code: int
    ended: str  # UTC, to sort by

    @property
    def error(self) -> str:
        """Which node failed, and why."""
        return f"node {self.node}: {self.failure}"


def read_pod(pod: Json) -> NodePod:
    """A pod by its labels and status, of which any part may be missing."""
    labels, status = pod["metadata"]["labels"], pod.get("status", {})
    node = int(labels.get(INDEX, 0))
    states = {
        container["name"]: container.get("state", {})
        for container in status.get("containerStatuses", [])
    }
    terminated = states.get(CONTAINER, {}).get("terminated", {})
    obstacle = waiting(status)
    failure, explained = _failure(status, terminated)
    return NodePod(
        name=pod["metadata"]["name"],
        attempt=int(labels.get(ATTEMPT, 0)),
        node=node,
        phase=status.get("phase", ""),
        obstacle=f"node {node}: {': '.join(filter(None, obstacle[:2]))}" if obstacle else "",
        failure=failure,
        explained=explained,
        exit_code=int(terminated.get("exitCode", 0)),
        ended=terminated.get("finishedAt", ""),
    )


def _failure(status: Json, terminated: Json) -> tuple[str, bool]:
    """Why a node failed, empty where it has not, and whether the node or Kubernetes says so."""
    if status.get("phase") == "Failed" and "reason" in status:
        # Evicted, for example, when a disk is full; the container may be gone.
        return f"{status['reason']}: {status.get('message', '')}", True
    exit_code = terminated.get("exitCode", 0)
    if exit_code == 0:
        return "", False
    if terminated.get("reason") == "OOMKilled":
        return (
            "it was killed, as its memory was used up: raise resources.steps.recover.memory",
            True,
        )
    message = terminated.get("message", "").strip()
    # JSON as a node wrote it, where it had the time; else what it printed last.
    try:
        return str(json.loads(message)["reason"]), True
    except (ValueError, TypeError, KeyError):
        return message or f"its process ended with exit code {exit_code} and without a word", False


def waiting(status: Json) -> tuple[str, str, str] | None:
    """Why a pod does not start, by its status: Kubernetes' own word, its message, and the container that they are of.

    None while it goes through what every pod does.
    """
    for container in [
        *status.get("initContainerStatuses", []),
        *status.get("containerStatuses", []),
    ]:
        reason = container.get("state", {}).get("waiting", {})
        if reason.get("reason", STARTING[0]) not in STARTING:
            return reason["reason"], reason.get("message", ""), container["name"]
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("reason", ""), condition.get("message", ""), ""
    return None


def _cause(failed: Iterable[NodePod]) -> NodePod | None:
    """The failure that the others of the last attempt follow from: wrong input, then the first that says why."""

    def order(pod: NodePod) -> tuple[int, bool, bool, str, int]:
        # exit code 2: a wrong input, on which all nodes agree
        return (
            -pod.attempt,
            pod.exit_code != InputError.exit_code,
            not pod.explained,
            pod.ended,
            pod.node,
        )

    return min(failed, key=order, default=None)


def state(job: Json, pods: list[NodePod], failed: Iterable[NodePod]) -> str:
    """One line for people."""
    condition = ended(job)
    if condition is not None:
        return str(condition["type"]).lower()
    if job["spec"].get("suspend"):
        return "suspended: it waits in its queue"
    newest, running = _newest_attempt(pods)
    line = f"{running} of {job['spec']['trainer']['numNodes']} nodes run"
    obstacles = [pod.obstacle for pod in pods if pod.obstacle]
    if obstacles:
        line += f"; {obstacles[0]}"
    if not newest:
        return line
    before = _cause(pod for pod in failed if pod.attempt < newest)
    return f"{line}, restart {newest}" + (f" ({before.error})" if before else "")


def _newest_attempt(pods: list[NodePod]) -> tuple[int, int]:
    """How often the nodes were started again, and how many run since."""
    newest = max((pod.attempt for pod in pods), default=0)
    return newest, len([pod for pod in pods if pod.attempt == newest and pod.phase == "Running"])


def starting_again(job: Json, pods: list[NodePod]) -> str:
    """For `ptl status`: that the nodes were started again and do not all run yet; else empty."""
    restarts, running = _newest_attempt(pods)
    nodes = job["spec"]["trainer"]["numNodes"]
    if not restarts or running == nodes or ended(job) is not None:
        return ""
    return f"nodes started again (restart {restarts}): {running} of {nodes} run"


def error(condition: Json, failed: Iterable[NodePod], name: str) -> InputError | WorkError:
    """The error of the node that failed first; Kubernetes' own words only where no node left any."""
    cause = _cause(failed)
    if cause is None:
        return WorkError(
            f"TrainJob {name} failed ({condition.get('reason')}): {condition.get('message')}",
            remedy="the log above has what its first node printed",
        )
    kind = InputError if cause.exit_code == InputError.exit_code else WorkError
    return kind(cause.error)


def last_words(reason: str, exit_code: int) -> str:
    """What a node leaves of its failure, for the coordinator to read: JSON that Kubernetes keeps as a whole."""
    words = json.dumps({"reason": reason, "exit_code": exit_code})
    # The beginning says what failed, the end has the last lines of an error.
    tail = len(reason)
    while len(words) > LONGEST_MESSAGE:
        tail //= 2
        words = json.dumps(
            {"reason": f"{reason[:HEAD]} [...] {reason[-tail:]}", "exit_code": exit_code}
        )
    return words
