"""The Kubernetes API as the account of this pod or, on a user's machine, of the kubeconfig; kfp brings the client."""

from __future__ import annotations

import contextlib
import json
import os
import re
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ptl import connections
from ptl.errors import InputError

SECONDS = 15
OBJECT = re.compile(
    r"/api(s/(?P<group>[^/]+))?/[^/]+/namespaces/(?P<namespace>[^/]+)/(?P<resource>[^/]+)"
)
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # in a pod with a token


class DoubtError(InputError):
    """A run may work nevertheless, or it could not be checked: to the doctor a warning."""


class NoSuchObjectError(DoubtError):
    """The cluster has no object of that name."""


class ForbiddenError(DoubtError):
    """This account may not look. `rule` is what a role must let it do, such as `get configmaps in team`."""

    def __init__(self, problem: str, rule: str) -> None:
        super().__init__(problem, remedy=f"a Role must let this account {rule}")
        self.rule = rule


def read(path: str) -> dict[str, Any]:
    """What the Kubernetes API says at a path. Raises DoubtError."""
    return dict(_call("GET", path))


def objects(path: str, **selectors: str) -> list[dict[str, Any]]:
    """The objects at a path. Raises DoubtError."""
    return list(_call("GET", path, query=list(selectors.items()))["items"])


def may(namespace: str, verb: str, group: str, resource: str) -> bool:
    """Whether this account has a right. Raises DoubtError."""
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = _call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


def _call(
    method: str, path: str, body: Any = None, query: list[tuple[str, str]] | None = None
) -> Any:
    from kubernetes import client, config
    from urllib3.exceptions import HTTPError

    try:
        return request(
            connect(), method, path, body=body, query_params=query, _request_timeout=SECONDS
        )
    except (config.ConfigException, client.ApiException, HTTPError) as error:
        if getattr(error, "status", None) == HTTPStatus.FORBIDDEN:
            raise ForbiddenError(sentence(error), _rule(path)) from error
        kind_of_error = (
            NoSuchObjectError
            if getattr(error, "status", None) == HTTPStatus.NOT_FOUND
            else DoubtError
        )
        remedy = "check the kubeconfig, or the rights of the account"
        raise kind_of_error(f"not checked: {sentence(error)}", remedy=remedy) from error


def _rule(path: str) -> str:
    """What a role must allow for a path to be read."""
    match = OBJECT.match(path)
    if match is None:
        return f"get {path}"
    group = f".{match['group']}" if match["group"] else ""
    return f"get {match['resource']}{group} in {match['namespace']}"


def context_namespace() -> str | None:
    """The namespace of the kubeconfig's current context; None where there is none."""
    from kubernetes import config

    with contextlib.suppress(config.ConfigException):
        _, context = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
        return context["context"].get("namespace") or None
    return None


def sentence(error: Exception) -> str:
    """What kept the Kubernetes API from an answer, or what it answers instead of what was asked for."""
    from kubernetes import client

    api = f"the Kubernetes API at {client.Configuration.get_default_copy().host}"
    status = getattr(error, "status", None)
    if status:
        return f"{api} answers {connections.status_name(status)}: {message(error)}"
    if isinstance(error, client.ApiException) or connections.failure(error):
        return connections.sentence(api, error)
    return connections.shortened(str(error))  # of the kubeconfig


def message(error: Any) -> str:
    """What the API says, out of its JSON."""
    with contextlib.suppress(AttributeError, ValueError, KeyError, TypeError):
        return str(json.loads(error.body)["message"])
    return connections.failure(error) or connections.shortened(
        str(getattr(error, "reason", None) or error)
    )


def connect() -> Any:
    """The client of the pod's account; elsewhere kubectl's. Raises kubernetes' ConfigException where there is none."""
    from kubernetes import client, config

    if NAMESPACE.is_file():
        config.load_incluster_config()
    else:
        config.load_kube_config(os.environ.get("KUBECONFIG"))
    connection = client.Configuration.get_default_copy()
    connection.retries = 0  # whoever asks would wait four times
    return client.ApiClient(connection)


def request(api: Any, method: str, path: str, **options: Any) -> Any:
    """The API's JSON, also where a field is missing that the client's classes need; its own options and errors."""
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    fixed = {"header_params": headers, "response_type": "object", "auth_settings": ["BearerToken"]}
    return api.call_api(path, method, **fixed, _return_http_data_only=True, **options)
