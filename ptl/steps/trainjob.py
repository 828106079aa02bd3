"""What a TrainJob of Kubeflow Trainer is called, what a coordinator adds to its template, and what its pods say."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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
# Variables of the coordinator that its nodes need: which run this is, and what Kubeflow's MLflow plugin has made.
PASSED_ON = ("KFP_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "MLFLOW_WORKSPACE")
TERMINATION_LOG = "/dev/termination-log"
LONGEST_MESSAGE = 4096  # bytes that Kubernetes keeps of a container's last words
HEAD = 300  # characters of an error that is too long


def name_of(run: str, step: str) -> str:
    """The same for all attempts of a step, so that each finds what another has started; below 63 characters."""
    digits = "".join(character for character in run.lower() if character in "0123456789abcdef")
    return f"ptl-{digits[:12]}-{step}"


def complete(template: Json, name: str, coordinator: Json, call: Json) -> Json:
    """The TrainJob of one step: the template with its name, the step's call, and what is the coordinator's own."""
    job: Json = json.loads(json.dumps(template))
    metadata, spec = job["metadata"], job["spec"]
    metadata["name"] = name
    # Deleted with the workflow, but not with a pod that another one follows.
    owners = coordinator["metadata"].get("ownerReferences", [])
    metadata["ownerReferences"] = [owner | {"controller": False, "blockOwnerDeletion": False} for owner in owners]
    variables = {CALL: json.dumps(call)} | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    spec["trainer"]["env"] += [{"name": name, "value": value} for name, value in variables.items()]
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
    by_type = {condition["type"]: condition for condition in conditions if condition["status"] == "True"}
    return by_type.get("Failed") or by_type.get("Complete")


@dataclass(frozen=True)
class NodeFailure:
    """How the container of a node ended."""

    attempt: int  # of all nodes
    node: int
    ended: str  # UTC, to sort by
    reason: str
    exit_code: int
    explained: bool  # by the node itself

    def __str__(self) -> str:
        return f"node {self.node}: {self.reason}"


def failures(pods: Iterable[Json]) -> list[NodeFailure]:
    """Those of the nodes whose container has failed."""
    found = []
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses", []):
            terminated = status.get("state", {}).get("terminated")
            if status["name"] == CONTAINER and terminated and terminated.get("exitCode"):
                found.append(_failure(pod["metadata"]["labels"], terminated))
    return found


def _failure(labels: dict[str, str], terminated: Json) -> NodeFailure:
    message = (terminated.get("message") or "").strip()
    explained = False
    # JSON as a node wrote it, where it had the time; else what it printed last
    with contextlib.suppress(ValueError, TypeError, KeyError):
        message, explained = str(json.loads(message)["reason"]), True
    exit_code = int(terminated["exitCode"])
    reason = message or f"its process ended with exit code {exit_code} and without a word"
    if terminated.get("reason") == "OOMKilled":
        reason, explained = "it was killed, as its memory was used up: raise resources.steps.recover.memory", True
    return NodeFailure(
        attempt=attempt_of(labels),
        node=int(labels.get(INDEX, 0)),
        ended=str(terminated.get("finishedAt", "")),
        reason=reason,
        exit_code=exit_code,
        explained=explained,
    )


def attempt_of(labels: dict[str, str]) -> int:
    """How often the nodes were started before, by a pod's label."""
    return int(labels.get(ATTEMPT, 0))


def cause(seen: Sequence[NodeFailure]) -> NodeFailure | None:
    """The failure that the others of the last attempt follow from: wrong input, then the first that says why."""
    last_attempt = max((failure.attempt for failure in seen), default=0)
    of_it = [failure for failure in seen if failure.attempt == last_attempt]
    # exit code 2: a wrong input, on which all nodes agree
    return min(of_it, key=lambda one: (one.exit_code != 2, not one.explained, one.ended, one.node), default=None)


def last_words(reason: str, exit_code: int) -> str:
    """What a node leaves of its failure, for the coordinator to read: JSON that Kubernetes keeps as a whole."""
    words = json.dumps({"reason": reason, "exit_code": exit_code})
    # The beginning says what failed, the end has the last lines of an error.
    tail = len(reason)
    while len(words) > LONGEST_MESSAGE:
        tail //= 2
        words = json.dumps({"reason": f"{reason[:HEAD]} [...] {reason[-tail:]}", "exit_code": exit_code})
    return words
