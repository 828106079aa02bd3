"""Steps whose pods cannot start, run or have failed: what Kubernetes and Argo say of them. JSON: any field may miss.

A task has two pods, its driver's and its container's; the run has a driver of its own, before the first step.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ptl import kubernetes
from ptl.steps.trainjob import STARTING, waiting

Json = dict[str, Any]
# Kubernetes' own word, its message, and the container that they are about
Reason = tuple[str, str, str]

WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/{}/workflows"
LONG = 500  # characters of a message
# In the annotation that Argo gives a pod: WORKFLOW(0).root(0).TASK(0).executor(0), WORKFLOW(0).root(0).TASK-driver(0)
NODE, NODE_ID = "workflows.argoproj.io/node-name", "workflows.argoproj.io/node-id"
ROOT_DRIVER = "root-driver"  # of the run itself: WORKFLOW(0).root-driver(0)
TASK = re.compile(rf"\.root\(\d+\)\.([^.()]+?)(-driver)?\(\d+\)|\(\d+\)\.({ROOT_DRIVER})\(\d+\)")
# What Argo says of a container that ended by itself, whose own words are better.
PLAIN_END = re.compile(r"(main: )?Error \(exit code \d+\)")

IMAGE = "check images.registry, images.tag and images.digests, resources.image_pull_policy and image_pull_secrets"
# How Kubeflow's driver says why it ends: glog's fatal line, after the name of the call and all that it was given.
FATAL = re.compile(r"F\d{4} [^\]]*\] (?:.*?\) failed: )?(.*)")
# A driver that ended while the object store was away is started again, and its task is in the metadata store twice:
# then every driver of the run ends with this.
TWICE = "two tasks have the same task name"

VOLUME = "check storage.cache_claim, and the ConfigMaps and Secrets that storage names"
REMEDIES = {
    "ImagePullBackOff": IMAGE,
    "ErrImageNeverPull": IMAGE,
    "InvalidImageName": IMAGE,
    "CreateContainerConfigError": "check that the image runs as user 1000, and the ConfigMaps and Secrets that storage "
    "names",
    "Unschedulable": "check resources.accelerator and accelerators, node_selector and tolerations, cpu and memory (of "
    "this kind of step: resources.steps.{stage})",
    "SchedulingGated": "it waits in the queue of resources.queue",
    "FailedMount": VOLUME,
    "FailedAttachVolume": VOLUME,
}
# Words of a message that say more than the reason.
REMEDIES_BY_MESSAGE = {
    "persistentvolumeclaim": "check storage.cache_claim: the claim must exist in this namespace, and be bound",
    "exceeded quota": "ask for less (resources.steps.{stage}), or have the namespace's quota raised",
}
OF_DRIVER = (
    "it is Kubeflow's own pod, which no field of the config changes: ask whoever runs Kubeflow"
)
REMEDIES_OF_DRIVER = {
    "exceeded quota": "have the namespace's quota raised: it is Kubeflow's own pod",
    "failed quota": "Kubeflow's own containers ask for nothing: give the namespace a LimitRange with defaults",
}


@dataclass(frozen=True)
class Pod:
    """A step's newest pod, of its driver or its container, that has not succeeded or that Kubernetes refuses."""

    created: datetime
    phase: str = "Pending"  # or Running, Failed; while its driver works a step is pending
    is_driver: bool = False
    reason: str = ""  # such as ErrImageNeverPull or OOMKilled; empty where Kubernetes has none
    message: str = ""
    container: str = ""  # that the reason is about: `main` is the step's
    name: str = field(default="", compare=False)
    node: str = field(default="", compare=False)  # id of its node in the workflow
    last_words: str = ""  # of a driver that failed, from its log

    @property
    def sentence(self) -> str:
        return self.last_words or ": ".join(filter(None, [self.reason, self.message]))

    @property
    def has_failed_by_itself(self) -> bool:
        """Whether its container has run: then the log says more of the failure."""
        return self.phase == "Failed" and not self.reason and " is forbidden: " not in self.message

    def remedy(self, stage: str) -> str:
        """What to do about its reason, for a step of this stage; empty where nothing is known to help."""
        by_message = REMEDIES_OF_DRIVER if self.is_driver else REMEDIES_BY_MESSAGE
        # A claim that is not bound is one of "unbound immediate PersistentVolumeClaims".
        by_words = next(
            (remedy for words, remedy in by_message.items() if words in self.message.lower()), ""
        )
        if self.is_driver:
            return by_words or OF_DRIVER
        if self.container not in ("", "main"):
            return ""
        return (by_words or REMEDIES.get(self.reason, "")).format(stage=stage)


def read(namespace: str, run_id: str) -> dict[str, Pod]:
    """The pods of a run by step, that of the run's own driver by ROOT_DRIVER.

    Raises errors of any kind: a kubeconfig and its login plugins are the user's own.
    """
    api = f"/api/v1/namespaces/{namespace}"
    run = f"pipeline/runid={run_id}"
    pods: dict[str, Pod] = {}
    for entry in kubernetes.objects(
        f"{api}/pods", labelSelector=run, fieldSelector="status.phase!=Succeeded"
    ):
        step, is_driver = _step_of(entry["metadata"].get("annotations", {}).get(NODE, ""))
        if step:
            pod = _pod(entry, f"{api}/events", is_driver)
            pods[step] = max(pod, pods.get(step, pod), key=lambda pod: pod.created)
    # An account that may not list them still has the pods.
    with suppress(kubernetes.DoubtError):
        for each in kubernetes.objects(WORKFLOWS.format(namespace), labelSelector=run):
            pods = _with_nodes(pods, _nodes(each.get("status", {})))
    for step, pod in pods.items():
        if pod.is_driver and pod.has_failed_by_itself and pod.name:
            pods[step] = replace(pod, last_words=_last_words(f"{api}/pods/{pod.name}/log"))
    return pods


def workflow(namespace: str, run_id: str) -> str:
    """What Argo says of a run as a whole, as that it waits for others. Raises errors of any kind, as `read` does."""
    found = kubernetes.objects(
        WORKFLOWS.format(namespace), labelSelector=f"pipeline/runid={run_id}"
    )
    if not found:
        return "its workflow is not there"
    status = found[-1].get("status", {})
    if not status.get("phase"):
        return "Argo has not begun its workflow: is the workflow controller running?"
    return ": ".join(
        filter(None, [f"its workflow is {status['phase']}", status.get("message", "")[:LONG]])
    )


def _last_words(log: str) -> str:
    """Why a driver ended, from its log; empty where it does not say so or cannot be read."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    query = [("container", "main"), ("tailLines", "20")]
    options = {
        "query_params": query,
        "_preload_content": False,
        "_request_timeout": kubernetes.SECONDS,
    }
    with suppress(ApiException, HTTPError):
        lines = [
            line.decode(errors="replace")
            for line in kubernetes.request(kubernetes.connect(), "GET", log, **options)
        ]
        found = [match[1] for match in map(FATAL.match, lines) if match]
        # The cause comes last.
        return " ".join(found[-1].split())[-LONG:] if found else ""
    return ""


def _step_of(node: str) -> tuple[str, bool]:
    """The step of a node by its name, empty where it is of none, and whether it is a driver's."""
    task = TASK.search(node)
    if task is None:
        return "", False
    return task[1] or task[3], bool(task[2] or task[3])


def _nodes(status: Json) -> Iterable[Json]:
    """The nodes of a workflow, from the first to the last that was started."""
    nodes = status.get("nodes") or {}
    packed = status.get("compressedNodes")  # in a workflow of more than 1 MiB
    if packed:
        nodes = json.loads(gzip.decompress(base64.b64decode(packed)))
    return sorted(nodes.values(), key=lambda node: str(node.get("startedAt")))


def _with_nodes(pods: dict[str, Pod], nodes: Iterable[Json]) -> dict[str, Pod]:
    """Pods with what Argo says of them and of those that Kubernetes did not accept, as with a quota, or has deleted."""
    newest = {}
    for node in nodes:
        step, is_driver = _step_of(node["name"])
        if step and node["type"] == "Pod":
            newest[step] = node, is_driver
    joined = dict(pods)
    for step, (node, is_driver) in newest.items():
        pod = pods.get(step)
        of_node = _pod_of_node(node, is_driver)
        if pod and pod.node == node["id"]:
            # Argo repeats what Kubernetes says, and of a driver knows more.
            if is_driver and not (pod.reason or pod.message) and of_node:
                joined[step] = replace(pod, message=of_node.message)
        elif pod is None or pod.created < datetime.fromisoformat(node["startedAt"]):
            joined.pop(step, None)
            if of_node:
                joined[step] = of_node
    return joined


def _pod_of_node(node: Json, is_driver: bool) -> Pod | None:
    """What Argo says of a pod that it waits for or that failed; None where that is nothing."""
    phases = {"Pending": "Pending", "Failed": "Failed", "Error": "Failed"}
    message = node.get("message", "")
    if (
        node["phase"] not in phases
        or not message
        or (PLAIN_END.fullmatch(message) and not is_driver)
    ):
        return None
    started = datetime.fromisoformat(node["startedAt"])
    return Pod(started, phases[node["phase"]], is_driver, message=message[:LONG], node=node["id"])


def _pod(pod: Json, events: str, is_driver: bool) -> Pod:
    metadata, status = pod["metadata"], pod["status"]
    phase = status["phase"]
    if phase == "Pending":
        reason, message, container = waiting(status) or (STARTING[0], "", "")
    else:
        reason, message, container = _ended(status)
    if reason in STARTING:
        selector = f"involvedObject.name={metadata['name']},type=Warning"
        # The newest is the last one.
        for event in sorted(kubernetes.objects(events, fieldSelector=selector), key=_time_of_event):
            reason, message = event["reason"], event["message"]
    # A pull that failed is ErrImagePull and ImagePullBackOff by turns: one reason, with the message of the first.
    reason = reason.replace("ErrImagePull", "ImagePullBackOff")
    message = re.sub(
        r'^Back-off pulling image "[^"]*": ErrImagePull: ', "", " ".join(message.split())
    )
    return Pod(
        datetime.fromisoformat(metadata.get("creationTimestamp", "1970-01-01T00:00:00Z")),
        "Pending" if is_driver and phase == "Running" else phase,
        is_driver,
        reason,
        message[:LONG],
        container,
        metadata["name"],
        metadata.get("annotations", {}).get(NODE_ID, ""),
    )


def _time_of_event(event: Json) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime"))


def _ended(status: Json) -> Reason:
    """OOMKilled, Evicted, DeadlineExceeded: where Kubernetes and not the program has ended it."""
    if "reason" in status:
        return status["reason"], status.get("message", ""), ""
    for container in status.get("containerStatuses", []):
        end = container["state"].get("terminated", {})
        if container["name"] == "main" and end.get("reason") not in (None, "Completed", "Error"):
            return end["reason"], end.get("message", ""), "main"
    return "", "", ""
