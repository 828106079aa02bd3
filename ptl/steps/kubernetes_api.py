"""What a coordinator asks of the Kubernetes API: its own pod, a TrainJob, and the pods of its nodes.

By the plain client, not by Kubeflow's TrainerClient, which hides the status code of a refusal and whose TrainJobs
cannot have an owner.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from ptl.errors import InputError, WorkError
from ptl.preflight.in_cluster import NAMESPACE
from ptl.steps.trainjob import GROUP, OF_JOB_SET, PLURAL, VERSION, Json, NodePod, read_pod

SECONDS = 30  # for one request
PATIENCE = 600  # seconds without an answer of the API before we give up
CONFLICT, NOT_FOUND = 409, 404
APPLY = "apply manifests/components/trainer with your overlay (docs/install.md, Kubeflow Trainer)"


class NoAnswerError(WorkError):
    """The Kubernetes API has been silent for too long; what runs on the cluster is not ended by that."""


class Cluster:
    """The namespace in which this pod runs."""

    def __init__(self) -> None:
        from kubernetes import client, config

        # in a pod its account; elsewhere as kubectl does
        self.namespace = "default"
        if NAMESPACE.is_file():
            config.load_incluster_config()
            self.namespace = NAMESPACE.read_text().strip()
        else:
            kubeconfig = os.environ.get("KUBECONFIG")
            try:
                config.load_kube_config(kubeconfig)
            except config.ConfigException as error:
                raise InputError(
                    "this pod has no token of a service account, with which it would start its nodes",
                    field="resources.steps.recover.nodes",
                    remedy="let Kubernetes mount it (automountServiceAccountToken), or train on one node",
                ) from error
            _, active = config.list_kube_config_contexts(kubeconfig)
            self.namespace = active["context"].get("namespace", self.namespace)
        self._train_jobs = (GROUP, VERSION, self.namespace, PLURAL)
        self._jobs = client.CustomObjectsApi()
        self._pods = client.CoreV1Api()

    def own_pod(self) -> Json:
        """This pod. Raises InputError where its account may not read it."""
        name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
        return self._read(self._pods.read_namespaced_pod, name, self.namespace)

    def create(self, job: Json) -> bool:
        """Create a TrainJob; False where one of its name exists. Raises InputError where it is refused."""
        create = self._jobs.create_namespaced_custom_object
        return self._ask(create, *self._train_jobs, job, expected=CONFLICT, job=job) is not None

    def train_job(self, name: str) -> Json | None:
        """A TrainJob with its status; None where there is none."""
        get = self._jobs.get_namespaced_custom_object
        job: Json | None = self._ask(
            get,
            *self._train_jobs,
            name,
            expected=NOT_FOUND,
        )
        return job

    def delete(self, name: str) -> None:
        """Delete a TrainJob, with its pods; nothing where there is none."""
        delete = self._jobs.delete_namespaced_custom_object
        self._ask(
            delete,
            *self._train_jobs,
            name,
            expected=NOT_FOUND,
            propagation_policy="Foreground",
        )

    def nodes(self, name: str) -> list[NodePod]:
        """The pods of a TrainJob's nodes."""
        selector = f"{OF_JOB_SET}={name}"
        listing = self._read(self._pods.list_namespaced_pod, self.namespace, label_selector=selector)
        return [read_pod(pod) for pod in listing["items"]]

    def log(self, pod: str, container: str, since: int | None = None) -> Iterator[str]:
        """The lines that a container prints, until it ends or the connection does; of the last `since` seconds."""
        options = {"since_seconds": since} if since is not None else {}
        response = self._pods.read_namespaced_pod_log(
            pod, self.namespace, container=container, follow=True, _preload_content=False, **options
        )
        for line in response:
            yield line.decode(errors="replace").rstrip("\n")

    def _read(self, request: Callable[..., Any], *arguments: Any, **options: Any) -> Json:
        """An object as the API has it: the client's own classes refuse one in which a field is missing."""
        response = self._ask(request, *arguments, _preload_content=False, **options)
        return dict(json.loads(response.data))

    def _ask(
        self,
        request: Callable[..., Any],
        *arguments: Any,
        expected: int | None = None,
        job: Json | None = None,
        **options: Any,
    ) -> Any:
        """One request, again while nobody answers; None for the status `expected`. Raises NoAnswerError, InputError."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        began = time.monotonic()
        while True:
            try:
                return request(*arguments, _request_timeout=SECONDS, **options)
            except (ApiException, HTTPError) as error:
                status = getattr(error, "status", None)
                if status is not None and status == expected:
                    return None
                # an upgrade of the control plane, or a throttle
                if status is not None and status < 500 and status != 429:
                    raise _refused(error, job) from error
                if time.monotonic() - began > PATIENCE:
                    raise NoAnswerError(
                        f"the Kubernetes API has not answered for {PATIENCE} s: {_message(error)}",
                        remedy="the TrainJob trains meanwhile, and a retry of the step finds it",
                    ) from error
                time.sleep(5)


def _refused(error: Any, job: Json | None = None) -> InputError:
    """The error of a request that the API refuses, with what helps."""
    message = _message(error)
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
    if error.status == 401 or "forbidden: User" in message:
        return InputError(
            f"this step's account may not do that: {message}",
            field="resources.steps.recover.nodes",
            remedy=f"for its Role {APPLY}",
        )
    return InputError(f"the cluster refuses it: {message}", field="resources.steps.recover")


def _message(error: Any) -> str:
    """What the API says, out of its JSON."""
    try:
        return str(json.loads(error.body)["message"])
    except (AttributeError, ValueError, KeyError, TypeError):
        return str(getattr(error, "reason", None) or error)
