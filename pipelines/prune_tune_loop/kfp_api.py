"""Calls to Kubeflow Pipelines: connected once, every failure explained, what may pass is tried again."""

import contextlib
import io
import json
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin

from ptl import address
from ptl.errors import InputError, WorkError

T = TypeVar("T")

ATTEMPTS = 5  # the pauses between them double from one second: 15 s in all
NOT_FOUND, CONFLICT = 404, 409
TIMEOUT = (10.0, 30.0)  # seconds to connect, and seconds without a byte of the answer
LIMIT = 64 << 20  # bytes of an answer; the longest is a pipeline's version, of a few MB


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


class UnreachableError(WorkError):
    """Nobody listens at the address; a server that restarts behind a gateway answers 502 or 503 instead."""


class RedirectError(Exception):
    """An answer that points to another address."""

    def __init__(self, target: str, status: int) -> None:
        super().__init__(target)
        self.status = status


class UnreadableError(Exception):
    """An answer of 200 that is not what the API answers, as a login page is."""


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
    _guard(client)
    ui = server.ui_host or os.environ.get("KF_PIPELINES_UI_ENDPOINT") or host
    return Api(client, namespace, address.bare(ui).rstrip("/"))


def _guard(client: Any) -> None:
    """Bound every request of a client in time and size, and refuse redirects and answers that are not JSON objects.

    kfp's methods take no timeout, and without one a server that hangs hangs the command. Its models turn a login page
    into a record whose fields are all None. A redirect leads to a login page, or takes the token to another server, and
    a POST loses its body by it. Requests are repeated by `call`, not by urllib3 as well.
    """
    from urllib3 import HTTPResponse, Retry, Timeout

    pool = client._run_api.api_client.rest_client.pool_manager  # every API of a kfp client shares it
    send = pool.request

    def guarded(method: str, url: str, **options: Any) -> HTTPResponse:
        options |= {"preload_content": False, "redirect": False, "timeout": Timeout(*TIMEOUT)}
        once = Retry(total=None, connect=0, read=0, status=0, other=0)
        with contextlib.closing(send(method, url, **options, retries=once)) as answer:
            if 300 <= answer.status < 400:
                target = urljoin(url, answer.headers.get("Location", ""))
                raise RedirectError(address.page(target), answer.status)
            body = _read(answer)
        if answer.status < 300 and not _is_object(body):
            raise UnreadableError("the answer is not JSON")
        return HTTPResponse(body, answer.headers, answer.status, reason=answer.reason)

    pool.request = guarded


def _read(answer: Any) -> bytes:
    """The body of an answer. Raises UnreadableError where it is too long, or takes too long."""
    deadline, body = time.monotonic() + 4 * TIMEOUT[1], bytearray()
    for piece in answer.stream(1 << 16):
        body += piece
        if len(body) > LIMIT:
            raise UnreadableError(f"the answer is longer than {LIMIT >> 20} MiB")
        if time.monotonic() > deadline:
            raise UnreadableError(f"the answer takes longer than {4 * TIMEOUT[1]:g} s")
    return bytes(body)


def _is_object(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def call(
    api: Api, function: Callable[..., T], *args: Any, again: bool = True, needs: tuple[str, ...] = (), **kwargs: Any
) -> T:
    """One request. With `again`, server errors and lost connections are tried again; without, they are WorkError.

    An answer that lacks one of the fields `needs` counts as a server error.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with explained(api.client._existing_config.host), contextlib.redirect_stdout(io.StringIO()):
                answer = _parsed(function, *args, **kwargs)
                missing = [name for name in needs if not getattr(answer, name)]
                if missing:
                    raise UnreadableError(f"the answer has no {' and no '.join(missing)}")
                return answer
        except WorkError as error:
            if not again or attempt == ATTEMPTS or isinstance(error, UnreachableError):
                raise
            time.sleep(2.0 ** (attempt - 1) * PAUSE)
    raise AssertionError("unreachable")


def _parsed(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The answer as the client's record. Raises UnreadableError for fields of another kind, where the client fails."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(f"the answer is not one of the API's ({error})") from error


def get_run(api: Api, run_id: str, again: bool = True) -> Any:
    """A run, with its state, which is one that can be waited on or has ended."""
    from kfp_server_api import V2beta1RuntimeState

    run = call(api, api.client.get_run, run_id, again=again, needs=("run_id", "state"))
    if run.state not in V2beta1RuntimeState.allowable_values:
        host = api.client._existing_config.host
        raise WorkError(f"Kubeflow Pipelines at {host}: run {run_id} is in the state {run.state!r}, which is not known")
    return run


PAUSE = 1.0  # seconds; tests shorten it


@contextlib.contextmanager
def explained(host: str) -> Any:
    """Answers below 500 become RefusedError with a remedy; what may pass (500 and above, 429, no answer) WorkError."""
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError, NewConnectionError

    try:
        yield
    except ApiException as error:
        text = _message(error)
        gone = re.search(r"ResourceNotFoundError: (.*)", text)  # the server answers 500 for a version that is not there
        if error.status == 500 and gone:
            raise RefusedError(f"Kubeflow Pipelines at {host}: {gone[1]}; it was deleted", NOT_FOUND) from error
        if error.status and error.status < 500 and error.status != 429:
            remedy = f"{_REMEDIES[error.status]} ({text})" if error.status in _REMEDIES else text
            raise RefusedError(f"Kubeflow Pipelines at {host}: {error.status} {remedy}", error.status) from error
        raise WorkError(f"Kubeflow Pipelines at {host}: {error.status} {text}; is it healthy?") from error
    except HTTPError as error:
        hint = "is --ca-cert right?" if "CERTIFICATE" in str(error).upper() else "is --host right, and is it up?"
        reason = getattr(error, "reason", None) or error
        kind = UnreachableError if isinstance(reason, NewConnectionError) else WorkError
        # Without the library's own objects and the query: `HTTPSConnectionPool(host=..., port=443): `
        text = re.sub(r"HTTPS?Connection(Pool)?\(.*?\): ", "", str(reason))
        raise kind(f"Kubeflow Pipelines at {host}: {text}; {hint}") from error
    except RedirectError as error:
        raise RefusedError(
            f"Kubeflow Pipelines at {host}: {error.status} it points to {error}, where no token is sent: the session "
            "may have expired; log in again (KFP_TOKEN or --token-file), or give that address as --host if it is the "
            "server's own",
            error.status,
        ) from error
    except UnreadableError as error:
        raise WorkError(
            f"Kubeflow Pipelines at {host}: {error}; the session may have expired: log in again (KFP_TOKEN or "
            "--token-file), and check that --host ends where the API begins"
        ) from error


_REMEDIES = {
    401: "not logged in; set KFP_TOKEN or --token-file to a token that is valid now",
    403: "not allowed; the account needs the rights of manifests/base/runs/rbac.yaml in this namespace "
    "(in multi-user Kubeflow give --namespace)",
    404: "not found; check the id, the --namespace, and that --host ends where the API begins "
    "(for Kubeflow behind its dashboard: https://HOST/pipeline)",
}


def _message(error: Any) -> str:
    """The server's own sentence: the first detail, without the chain of functions that it went through."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        answer = json.loads(body)
        texts = [answer.get("message"), answer.get("error_message"), answer.get("error")]
        texts = [detail["message"] for detail in answer.get("details", []) if error.status != 500] + texts
    except (ValueError, AttributeError, KeyError, TypeError):
        texts = []
    text = next((text for text in texts if isinstance(text, str) and text), body)
    return " ".join(text.split())[:500]


def _path(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None
