"""The pods of a run's steps that cannot start or have failed: why, as Kubernetes says it.

They are read as plain JSON with the account of this pod or the kubeconfig's: the client's own classes refuse a pod in
which a field is missing. A pod's step is in the annotation that Argo gives it.
"""

import base64
import gzip
import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Json = dict[str, Any]
Get = Callable[..., Json]  # of the Kubernetes API: a path, and selectors

NODE = "workflows.argoproj.io/node-name"  # WORKFLOW(0).root(0).TASK(0).executor(0), or WORKFLOW(0).root(0).TASK-driver(0)
TASK = re.compile(r"\.root\(\d+\)\.([^.()]+)\(\d+\)")
SECONDS = 5  # for one request
PATIENCE = 20  # seconds for all of them
LONG = 500  # characters of a message
STARTING = ("ContainerCreating", "PodInitializing")  # reasons of every container that waits for its turn

IMAGE = "check images.registry, images.tag and images.digests, and resources.image_pull_secrets of a private registry"
SCHEDULING = (
    "check resources.accelerator and accelerators, node_selector and tolerations, cpu and memory (for this kind of step: "
    "resources.steps.{stage})"
)
VOLUME = "check storage.cache_claim, and the ConfigMaps and Secrets that storage names"
REMEDIES = {
    "ImagePullBackOff": IMAGE,
    "ErrImageNeverPull": f"{IMAGE}; or change resources.image_pull_policy",
    "InvalidImageName": IMAGE,
    "CreateContainerConfigError": "check resources.run_as_user, and the ConfigMaps and Secrets that storage names",
    "Unschedulable": SCHEDULING,
    "SchedulingGated": "it waits in the queue of resources.queue",
    "FailedMount": VOLUME,
    "FailedAttachVolume": VOLUME,
    "exceeded quota": "ask for less (resources.steps.{stage}), or have the namespace's quota raised",
}


@dataclass(frozen=True)
class Pod:
    """A step's newest pod that is pending or has failed."""

    name: str  # empty where there is none yet
    created: datetime
    is_pending: bool = True  # else it has failed
    reason: str = ""  # Kubernetes' own word, such as ErrImagePull or OOMKilled; empty where it has none
    message: str = ""
    is_own: bool = True  # what waits is the step's container, not one of Kubeflow's or Argo's

    @property
    def sentence(self) -> str:
        """`OOMKilled`, `FailedMount: MountVolume.SetUp failed for ...`."""
        return ": ".join(filter(None, [self.reason, self.message]))

    def remedy(self, stage: str) -> str:
        """What to do about its reason, for a step of this stage; empty where nothing is known to help."""
        kind = "exceeded quota" if "exceeded quota" in self.message else self.reason
        return REMEDIES.get(kind, "").format(stage=stage) if self.is_own else ""


def read(namespace: str, run_id: str, waiting: Collection[str]) -> dict[str, Pod]:
    """By task key: the pods of a run that are pending or have failed.

    For a task of `waiting` that has no pod the workflow says why, as with a quota. Raises errors of any kind: a
    kubeconfig and its login plugins are the user's own.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    try:
        config.load_incluster_config(settings)
    except config.ConfigException:
        config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
    settings.retries = 0

    with client.ApiClient(settings) as api:

        def get(path: str, **selectors: str) -> Json:
            answer = api.call_api(
                path,
                "GET",
                query_params=list(selectors.items()),
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=SECONDS,
            )
            return dict(answer)

        run = f"pipeline/runid={run_id}"
        found = _pods(get, namespace, run)
        if set(waiting) - found.keys():
            found = _without_pod(get, namespace, run) | found
    return found


def _pods(get: Get, namespace: str, run: str) -> dict[str, Pod]:
    path = f"/api/v1/namespaces/{namespace}"
    phases = "status.phase!=Running,status.phase!=Succeeded"
    newest: dict[str, Json] = {}
    for pod in get(f"{path}/pods", labelSelector=run, fieldSelector=phases)["items"]:
        task = _task(pod["metadata"].get("annotations", {}).get(NODE, ""))
        if task not in newest or _created(newest[task]) < _created(pod):
            newest[task] = pod
    return {task: _pod(pod, lambda **query: get(f"{path}/events", **query)) for task, pod in newest.items() if task}


def _pod(pod: Json, get_events: Get) -> Pod:
    name = pod["metadata"]["name"]
    is_pending = pod["status"]["phase"] == "Pending"
    reason, message, container = _waiting(pod) if is_pending else _failed(pod["status"])
    if reason in STARTING:
        reason, message = _newest_warning(get_events, name) or (reason, message)
    # A pull that failed is ErrImagePull and ImagePullBackOff by turns: one reason, with the message of the first.
    reason = reason.replace("ErrImagePull", "ImagePullBackOff")
    message = re.sub(r'^Back-off pulling image "[^"]*": ErrImagePull: ', "", " ".join(message.split()))
    is_own = container in ("", "main") and "-driver(" not in pod["metadata"]["annotations"][NODE]
    return Pod(name, _created(pod), is_pending, reason, message[:LONG], is_own)


def _created(pod: Json) -> datetime:
    return datetime.fromisoformat(pod["metadata"].get("creationTimestamp", "1970-01-01T00:00:00Z"))


def _waiting(pod: Json) -> tuple[str, str, str]:
    """Why a pod is pending: a reason, its message, and the container that it is about."""
    status = pod["status"]
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in containers:
        waiting = container["state"].get("waiting", {})
        if waiting.get("reason", STARTING[0]) not in STARTING:
            return waiting["reason"], waiting.get("message", ""), container["name"]
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("reason", ""), condition.get("message", ""), ""
    return STARTING[0], "", ""


def _failed(status: Json) -> tuple[str, str, str]:
    """Why a pod has failed, where Kubernetes and not its program ended it: OOMKilled, Evicted, DeadlineExceeded."""
    if "reason" in status:
        return status["reason"], status.get("message", ""), ""
    for container in status.get("containerStatuses", []):
        end = container["state"].get("terminated", {})
        if container["name"] == "main" and end.get("reason") not in (None, "Completed", "Error"):
            return end["reason"], end.get("message", ""), "main"
    return "", "", ""


def _newest_warning(get_events: Get, pod: str) -> tuple[str, str] | None:
    events = get_events(fieldSelector=f"involvedObject.name={pod},type=Warning")["items"]

    def time(event: Json) -> str:
        return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]

    newest = max(events, key=time, default=None)
    return (newest["reason"], newest["message"]) if newest else None


def _without_pod(get: Get, namespace: str, run: str) -> dict[str, Pod]:
    """Tasks whose pods Kubernetes does not accept for now: Argo keeps them pending and asks again."""
    tasks = {}
    for workflow in get(f"/apis/argoproj.io/v1alpha1/namespaces/{namespace}/workflows", labelSelector=run)["items"]:
        status = workflow["status"]
        packed = status.get("compressedNodes")  # in a workflow of more than 1 MiB
        nodes = json.loads(gzip.decompress(base64.b64decode(packed))) if packed else status.get("nodes", {})
        for node in nodes.values():
            if node["phase"] == "Pending" and node.get("message"):
                created = datetime.fromisoformat(node["startedAt"])
                tasks[_task(node["name"])] = Pod("", created, True, "", node["message"][:LONG])
    return tasks


def _task(node: str) -> str:
    """The task's key in the name of a node, of its executor or of its driver."""
    match = TASK.search(node)
    return match[1].removesuffix("-driver") if match else ""
