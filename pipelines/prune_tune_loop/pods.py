"""Steps whose pods cannot start, run or have failed: what Kubernetes says of them. Read as JSON: any field may miss."""

import base64
import gzip
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ptl.preflight import in_cluster
from ptl.steps.trainjob import STARTING, waiting

Json = dict[str, Any]
Reason = tuple[str, str, str]  # Kubernetes' own word, its message, and the container that they are about

LONG = 500  # characters of a message
# In the annotation that Argo gives a pod: WORKFLOW(0).root(0).TASK(0).executor(0), WORKFLOW(0).root(0).TASK-driver(0)
NODE = "workflows.argoproj.io/node-name"
TASK = re.compile(r"\.root\(\d+\)\.([^.()]+?)(-driver)?\(\d+\)")

IMAGE = "check images.registry, images.tag and images.digests, resources.image_pull_policy and image_pull_secrets"
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
    "exceeded quota": "ask for less (resources.steps.{stage}), or have the namespace's quota raised",
}


@dataclass(frozen=True)
class Pod:
    """A step's newest pod that has not succeeded: its driver, or the one of its container."""

    created: datetime
    phase: str = "Pending"  # or Running, Failed; while its driver works a step is pending
    is_driver: bool = False
    reason: str = ""  # such as ErrImageNeverPull or OOMKilled; empty where Kubernetes has none
    message: str = ""
    container: str = ""  # that the reason is about: `main` is the step's

    @property
    def sentence(self) -> str:
        if self.is_driver and self.phase == "Failed" and not self.reason:
            return "its driver failed: no container of the step was started"
        return ": ".join(filter(None, [self.reason, self.message]))

    def remedy(self, stage: str) -> str:
        """What to do about its reason, for a step of this stage; empty where nothing is known to help."""
        if self.is_driver or self.container not in ("", "main"):
            return ""
        kind = "exceeded quota" if "exceeded quota" in self.message else self.reason
        return REMEDIES.get(kind, "").format(stage=stage)


def read(namespace: str, run_id: str) -> dict[str, Pod]:
    """The pods of a run by step; where there is none the workflow says why, as with a quota.

    Raises errors of any kind: a kubeconfig and its login plugins are the user's own.
    """
    api = f"/api/v1/namespaces/{namespace}"
    run = f"pipeline/runid={run_id}"
    pods: dict[str, Pod] = {}
    for entry in in_cluster.objects(f"{api}/pods", labelSelector=run, fieldSelector="status.phase!=Succeeded"):
        task = TASK.search(entry["metadata"].get("annotations", {}).get(NODE, ""))
        if task:
            pod = _pod(entry, f"{api}/events", is_driver=bool(task[2]))
            pods[task[1]] = max(pod, pods.get(task[1], pod), key=lambda pod: pod.created)
    if not pods:
        for workflow in in_cluster.objects(
            f"/apis/argoproj.io/v1alpha1/namespaces/{namespace}/workflows", labelSelector=run
        ):
            pods |= _without_pod(workflow["status"])
    return pods


def _without_pod(status: Json) -> dict[str, Pod]:
    """Tasks whose pods Kubernetes does not accept for now: Argo keeps them pending and asks again."""
    nodes = status.get("nodes", {})
    packed = status.get("compressedNodes")  # in a workflow of more than 1 MiB
    if packed:
        nodes = json.loads(gzip.decompress(base64.b64decode(packed)))
    pods = {}
    for node in nodes.values():
        task = TASK.search(node["name"])
        if task and node["phase"] == "Pending" and node.get("message"):
            pods[task[1]] = Pod(datetime.fromisoformat(node["startedAt"]), message=node["message"][:LONG])
    return pods


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
        for event in sorted(in_cluster.objects(events, fieldSelector=selector), key=_time_of_event):
            reason, message = event["reason"], event["message"]
    # A pull that failed is ErrImagePull and ImagePullBackOff by turns: one reason, with the message of the first.
    reason = reason.replace("ErrImagePull", "ImagePullBackOff")
    message = re.sub(r'^Back-off pulling image "[^"]*": ErrImagePull: ', "", " ".join(message.split()))
    return Pod(
        datetime.fromisoformat(metadata.get("creationTimestamp", "1970-01-01T00:00:00Z")),
        "Pending" if is_driver and phase == "Running" else phase,
        is_driver,
        reason,
        message[:LONG],
        container,
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
