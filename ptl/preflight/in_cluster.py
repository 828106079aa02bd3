"""The Kubernetes API as the account of this pod or, on a user's machine, of the kubeconfig; kfp brings the client."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ptl.preflight.finding import DoubtError

SECONDS = 15
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # in a pod with a token


class NotSeenError(DoubtError):
    """The cluster did not answer with the object."""


class NoSuchObjectError(NotSeenError):
    """The cluster has no object of that name."""


def read(path: str) -> dict[str, Any]:
    """What the Kubernetes API says at a path. Raises NotSeenError."""
    return dict(_call(path))


def objects(path: str, **selectors: str) -> list[dict[str, Any]]:
    """The objects at a path. Raises NotSeenError."""
    return list(_call(path, selectors)["items"])


def _call(path: str, query: dict[str, str] | None = None) -> Any:
    from kubernetes import client, config
    from urllib3.exceptions import HTTPError

    try:
        if NAMESPACE.is_file():
            config.load_incluster_config()
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"))
        connection = client.Configuration.get_default_copy()
        connection.retries = 0  # whoever asks would wait four times
        return client.ApiClient(connection).call_api(
            path,
            "GET",
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json"},
            response_type="object",
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _request_timeout=SECONDS,
        )
    except (config.ConfigException, client.ApiException, HTTPError) as error:
        kind_of_error = NoSuchObjectError if getattr(error, "status", None) == 404 else NotSeenError
        words = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {words[:120]}"
        remedy = "check the kubeconfig, or the rights of the account"
        raise kind_of_error(f"not checked: no answer of the Kubernetes API ({reason})", remedy=remedy) from error
