"""What a coordinator asks of the Kubernetes API: its own pod, a TrainJob, and the pods of its nodes.

By the plain client, not by Kubeflow's TrainerClient, which hides the status code of a refusal and whose TrainJobs
cannot have an owner. Answers are read as JSON: the client's own classes refuse one in which a field is missing.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from typing import Any

from ptl.errors import InputError, WorkError
from ptl.preflight.in_cluster import NAMESPACE
from ptl.steps.trainjob import API_VERSION, CONTAINER, OF_JOB_SET, PLURAL, Json, NodePod, read_pod

SECONDS = 30  # for one request
PATIENCE = 600  # seconds without an answer of the API before we give up
CONFLICT, NOT_FOUND, TOO_MANY = 409, 404, 429
NODES = "resources.steps.recover.nodes"
REMEDY = (
    "install Kubeflow Trainer 2 with its runtime and Role (manifests/components/trainer; docs/install.md, Kubeflow "
    "Trainer), or train on one node"
)


class NoAnswerError(WorkError):
    """The Kubernetes API has been silent for too long; what runs on the cluster is not ended by that."""


class Cluster:
    """The namespace in which this pod runs, with the rights of the pod's account."""

    def __init__(self) -> None:
        from kubernetes import client, config

        if NAMESPACE.is_file():
            config.load_incluster_config()
            namespace = NAMESPACE.read_text().strip()
        else:
            kubeconfig = os.environ.get("KUBECONFIG")
            try:
                config.load_kube_config(kubeconfig)
            except config.ConfigException as error:
                raise InputError(
                    "this pod has no token of a service account, with which it would start its nodes",
                    field=NODES,
                    remedy="let Kubernetes mount it (automountServiceAccountToken), or train on one node",
                ) from error
            _, active = config.list_kube_config_contexts(kubeconfig)
            namespace = active["context"].get("namespace", "default")
        self._train_jobs = f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}"
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._call = partial(
            client.ApiClient().call_api,
            header_params={"Content-Type": "application/json"},
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=SECONDS,
        )

    def own_pod(self) -> Json:
        """This pod. Raises InputError where its account may not read it."""
        name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
        return self._ask("GET", f"{self._pods}/{name}") or {}

    def create(self, job: Json) -> bool:
        """Create a TrainJob; False where one of its name exists. Raises InputError where it is refused."""
        return self._ask("POST", self._train_jobs, expected=CONFLICT, body=job) is not None

    def train_job(self, name: str) -> Json | None:
        """A TrainJob with its status; None where there is none."""
        return self._ask("GET", f"{self._train_jobs}/{name}", expected=NOT_FOUND)

    def delete(self, name: str) -> None:
        """Delete a TrainJob, with its pods; nothing where there is none."""
        query = [("propagationPolicy", "Foreground")]
        self._ask(
            "DELETE",
            f"{self._train_jobs}/{name}",
            expected=NOT_FOUND,
            query=query,
        )

    def nodes(self, name: str) -> list[NodePod]:
        """The pods of a TrainJob's nodes."""
        listing = self._ask(
            "GET",
            self._pods,
            query=[("labelSelector", f"{OF_JOB_SET}={name}")],
        )
        return [read_pod(pod) for pod in (listing or {})["items"]]

    def log(self, pod: str, since: int | None) -> list[str]:
        """The lines that a node has printed in the last `since` seconds (None: all), each with its time in front."""
        query = [("container", CONTAINER), ("timestamps", "true")]
        if since is not None:
            query.append(("sinceSeconds", str(since)))
        response = self._call(
            f"{self._pods}/{pod}/log",
            "GET",
            query_params=query,
        )
        return str(response.data.decode(errors="replace")).splitlines()

    def _ask(
        self,
        method: str,
        path: str,
        *,
        expected: int | None = None,
        query: list[tuple[str, str]] | None = None,
        body: Json | None = None,
    ) -> Json | None:
        """One request, again while nobody answers; None for the status `expected`. Raises NoAnswerError, InputError."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        began = time.monotonic()
        while True:
            try:
                return dict(json.loads(self._call(path, method, query_params=query, body=body).data))
            except (ApiException, HTTPError) as error:
                status = getattr(error, "status", None)
                if status is not None and status == expected:
                    return None
                # An upgrade of the control plane and a throttle end by themselves.
                if status is not None and status < 500 and status != TOO_MANY:
                    raise InputError(
                        f"the cluster refuses it: {_message(error)}", field=NODES, remedy=REMEDY
                    ) from error
                if time.monotonic() - began > PATIENCE:
                    raise NoAnswerError(
                        f"the Kubernetes API has not answered for {PATIENCE} s: {_message(error)}",
                        remedy="the TrainJob trains meanwhile, and a retry of the step finds it",
                    ) from error
                time.sleep(5)


def _message(error: Any) -> str:
    """What the API says, out of its JSON."""
    try:
        return str(json.loads(error.body)["message"])
    except (AttributeError, ValueError, KeyError, TypeError):
        return str(getattr(error, "reason", None) or error)
