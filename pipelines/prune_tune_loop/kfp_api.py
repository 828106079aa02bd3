"""Calls to Kubeflow Pipelines: connected once, every failure explained, what may pass is tried again."""

import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ptl.errors import InputError, WorkError

T = TypeVar("T")

ATTEMPTS = 5  # the pauses between them double from one second: 15 s in all
NOT_FOUND, CONFLICT = 404, 409


@dataclass(frozen=True)
class Server:
    """Where Kubeflow Pipelines answers, and who is asking; what is None comes from the environment."""

    host: str | None = None  # KF_PIPELINES_ENDPOINT
    namespace: str | None = None  # the profile, in multi-user Kubeflow; KFP_NAMESPACE
    token: str | None = None  # KFP_TOKEN
    token_file: Path | None = None  # KF_PIPELINES_SA_TOKEN_PATH; read again for every request, since it is rotated
    ca_cert: Path | None = None  # PEM bundle; KFP_CA_CERT
    verify: bool = True
    ui_host: str | None = None  # where a browser finds the UI, if elsewhere; KF_PIPELINES_UI_ENDPOINT


class RefusedError(InputError):
    """The server answered with an error that repeating the request would not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Api:
    """A client with the namespace and the address that people open."""

    client: Any  # kfp.Client
    namespace: str | None
    ui: str

    def link(self, run_id: str) -> str:
        """The run's page."""
        return f"{self.ui}/#/runs/details/{run_id}"


def connect(server: Server) -> Api:
    """A client for this server. Raises InputError for settings that are missing or wrong; nothing is sent yet."""
    host = server.host or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not host:
        raise InputError("--host: give the address of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT")
    if not host.startswith(("http://", "https://")):
        raise InputError(f"--host: {host!r} must begin with https:// or http://")
    token = server.token or os.environ.get("KFP_TOKEN")
    path = server.token_file or _path("KF_PIPELINES_SA_TOKEN_PATH")
    ca_cert = server.ca_cert or _path("KFP_CA_CERT")
    for option, file in (("--token-file", None if token else path), ("--ca-cert", ca_cert)):
        if file is not None and not file.is_file():
            raise InputError(f"{option}: no file {file}")
    from kfp.client import Client
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    credentials = ServiceAccountTokenVolumeCredentials(str(path)) if path and not token else None
    namespace = server.namespace or os.environ.get("KFP_NAMESPACE")
    with warnings.catch_warnings(), explained(host):
        warnings.simplefilter("ignore")
        client = Client(
            host=host,
            existing_token=token,
            credentials=credentials,
            namespace=namespace or "-",  # without one it asks for its health, and takes 25 s to say 401
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
            verify_ssl=server.verify,
        )
    client._context_setting["namespace"] = namespace or ""
    ui = server.ui_host or os.environ.get("KF_PIPELINES_UI_ENDPOINT") or host
    return Api(client, namespace, ui.rstrip("/"))


def call(api: Api, function: Callable[..., T], *args: Any, again: bool = True, **kwargs: Any) -> T:
    """One request. With `again`, server errors and lost connections are tried again; without, they are WorkError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with explained(api.client._existing_config.host), contextlib.redirect_stdout(io.StringIO()):
                return function(*args, **kwargs)
        except WorkError:
            if not again or attempt == ATTEMPTS:
                raise
            time.sleep(2.0 ** (attempt - 1) * PAUSE)
    raise AssertionError("unreachable")


PAUSE = 1.0  # seconds; tests shorten it


@contextlib.contextmanager
def explained(host: str) -> Any:
    """Answers below 500 become RefusedError with a remedy; what may pass (500 and above, 429, no answer) WorkError."""
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if error.status and error.status < 500 and error.status != 429:
            remedy = _REMEDIES.get(error.status, _said(error))
            raise RefusedError(f"Kubeflow Pipelines at {host}: {error.status} {remedy}", error.status) from error
        raise WorkError(f"Kubeflow Pipelines at {host}: {error.status} {_said(error)}; is it healthy?") from error
    except HTTPError as error:
        hint = "is --ca-cert right?" if "CERTIFICATE" in str(error).upper() else "is --host right, and is it up?"
        raise WorkError(f"Kubeflow Pipelines at {host}: {error}; {hint}") from error


_REMEDIES = {
    401: "not logged in; set KFP_TOKEN or --token-file to a token that is valid now",
    403: "not allowed; the account needs the rights of manifests/base/runs/rbac.yaml in this namespace "
    "(in multi-user Kubeflow give --namespace)",
    404: "not found; check the id, the --namespace, and that --host ends where the API begins "
    "(for Kubeflow behind its dashboard: https://HOST/pipeline)",
}


def _said(error: Any) -> str:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    return " ".join(body.split())[:300]


def _path(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None
