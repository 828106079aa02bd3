"""The Kubernetes API as the account of this pod or, on a user's machine, of the kubeconfig."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ptl.preflight.kubectl import SECONDS, NoSuchObjectError, NotSeenError

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def namespace() -> str:
    """The pod's namespace. Raises NotSeenError where the pod has no account."""
    try:
        return NAMESPACE.read_text().strip()
    except OSError as error:
        raise NotSeenError(f"the pod has no token of a service account ({error.strerror})") from error


def read(path: str) -> dict[str, Any]:
    """What the Kubernetes API says at a path. Raises NotSeenError."""
    return dict(_call(path, "GET"))


def objects(path: str, **selectors: str) -> list[dict[str, Any]]:
    """The objects at a path, as this pod's account or, outside of a cluster, the kubeconfig's. Raises NotSeenError."""
    return list(_call(path, "GET", query=list(selectors.items()), anywhere=True)["items"])


def may(verb: str, group: str, resource: str, subresource: str, namespace: str) -> bool:
    """Whether this account has a right. Raises NotSeenError."""
    attributes = {
        "verb": verb,
        "group": group,
        "resource": resource,
        "subresource": subresource,
        "namespace": namespace,
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = _call("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", "POST", review)
    return bool(answer["status"]["allowed"])


def _call(
    path: str,
    method: str,
    body: dict[str, Any] | None = None,
    query: list[tuple[str, str]] | None = None,
    *,
    anywhere: bool = False,
) -> Any:
    # kfp brings the client into every image.
    from kubernetes import client, config
    from urllib3.exceptions import HTTPError

    try:
        if anywhere and not NAMESPACE.is_file():
            config.load_kube_config(os.environ.get("KUBECONFIG"))
        else:
            config.load_incluster_config()
        return client.ApiClient().call_api(
            path,
            method,
            query_params=query,
            header_params={"Accept": "application/json", "Content-Type": "application/json"},
            body=body,
            response_type="object",
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _request_timeout=SECONDS,
        )
    except config.ConfigException as error:
        raise NotSeenError(f"no token of a service account, and no kubeconfig ({error})") from error
    except client.ApiException as error:
        kind_of_error = NoSuchObjectError if error.status == 404 else NotSeenError
        raise kind_of_error(f"the Kubernetes API answers {error.status} ({error.reason})") from error
    except HTTPError as error:
        raise NotSeenError(f"the Kubernetes API gave no answer ({type(error).__name__})") from error
