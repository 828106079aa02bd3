"""Kubeflow Pipelines by kfp.Client: each request is bounded and repeated, and a refusal says what to do about it."""

import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from ptl import address, connections
from ptl.errors import InputError, WorkError
from ptl.units import listed

REPEATS = 4  # of a request that fails by the server or the connection
PAUSE = 1.0  # seconds, times 2, 4, 8 before the last three repeats; tests shorten it
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte of the answer
NOT_FOUND, CONFLICT, TOO_MANY_REQUESTS = 404, 409, 429
TEMPORARY = (TOO_MANY_REQUESTS, 500, 502, 503, 504)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # as the ids of runs are
LOGIN_AGAIN = "the session may have expired: log in again (KFP_TOKEN or --token-file)"


@dataclass(frozen=True)
class Server:
    """Where Kubeflow Pipelines answers, and who is asking.

    A token itself comes from the environment only (KFP_TOKEN): an option would show it in the list of processes.
    """

    host: str = ""
    namespace: str | None = None  # the profile, in multi-user Kubeflow
    token_file: Path | None = None  # read again for every request, since it is rotated
    ca_cert: Path | None = None  # PEM bundle
    insecure: bool = False  # the server's certificate is not checked
    ui_host: str | None = None  # where a browser finds the UI, if elsewhere


@dataclass(frozen=True)
class Api:
    """A client with its namespace, its server and the address that people open."""

    client: Any  # kfp.Client
    namespace: str | None
    host: str
    ui: str

    def link(self, run_id: str) -> str:
        """The run's page."""
        return f"{self.ui}/#/runs/details/{run_id}"


class RefusedError(InputError):
    """The server answered with an error that repeating the request would not change."""

    def __init__(self, problem: str, status: int, **details: str) -> None:
        super().__init__(problem, **details)
        self.status = status


def connect(server: Server) -> Api:
    """A client for this server. Raises InputError for an address that is none; nothing is sent yet."""
    if not address.is_server(server.host):
        raise InputError(
            f"{server.host!r} must begin with https:// or http://",
            field="--host",
            remedy="give the address of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT",
        )
    from kfp.client import Client
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    with warnings.catch_warnings(), explained(server.host):
        warnings.simplefilter("ignore")
        client = Client(
            host=server.host,
            existing_token=None if server.token_file else os.environ.get("KFP_TOKEN"),
            credentials=ServiceAccountTokenVolumeCredentials(str(server.token_file))
            if server.token_file
            else None,
            proxy=_proxy(server.host),
            # without one it asks for its health, and takes 25 s to say 401
            namespace=server.namespace or "-",
            ssl_ca_cert=str(server.ca_cert) if server.ca_cert else None,
            verify_ssl=not server.insecure,
        )
    # The client would send the placeholder above with its requests.
    client._context_setting["namespace"] = server.namespace or ""
    _bound(client)
    ui = address.bare(server.ui_host or server.host).rstrip("/")
    return Api(client, server.namespace, server.host, ui)


def _proxy(host: str) -> str | None:
    """The environment's proxy for an address, as MLflow's client and boto3 take it; the API's own client would not."""
    parts = urlsplit(host)
    is_here = parts.hostname in ("localhost", "127.0.0.1", "::1")  # `kubectl port-forward`
    return None if is_here or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


def _bound(client: Any) -> None:
    """Give every request of a client a timeout and its repeats, and let none follow a redirect.

    kfp's methods take no timeout, and without one a server that hangs hangs the command. A redirect leads to a login
    page, or takes the token to another server, and a POST loses its body by it.
    """
    from urllib3 import Retry, Timeout

    # every API of a kfp client shares it
    pool = client._run_api.api_client.rest_client.pool_manager
    send = pool.request

    def bounded(method: str, url: str, **options: Any) -> Any:
        # A start may have taken effect although its answer was lost: whoever starts a run looks first.
        repeats = 0 if method == "POST" and urlsplit(url).path.endswith("/runs") else REPEATS
        options["retries"] = Retry(
            total=repeats,
            read=min(repeats, 1),  # each may take READ_TIMEOUT
            # nobody listens: a server that restarts behind a gateway answers 502 or 503 instead
            connect=0,
            allowed_methods=None,
            status_forcelist=TEMPORARY,
            backoff_factor=PAUSE,
            raise_on_status=False,
            respect_retry_after_header=False,
        )
        options["timeout"] = Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
        return send(method, url, redirect=False, **options)

    pool.request = bounded


def get_run(api: Api, run_id: str) -> Any:
    """A run (V2beta1Run) with its state, which is one that can be waited on or has ended."""
    from kfp_server_api import V2beta1RuntimeState

    with explained(api.host):
        run = api.client.get_run(run_id)
        required(run, "run_id")
        if run.state not in V2beta1RuntimeState.allowable_values:
            raise ValueError(f"state {run.state!r}")
    return run


def run_id_of(api: Api, reference: str) -> str:
    """The id of the run that a user names by its id or its name. Raises InputError where several have the name."""
    if UUID.fullmatch(reference):
        return reference
    with explained(api.host):
        answer = api.client.list_runs(filter=by_name(reference), namespace=api.namespace)
        ids = ids_of(answer.runs, reference, "run_id")
    if len(ids) > 1:
        raise InputError(
            f"{len(ids)} runs have the name {reference}",
            field="run",
            remedy=f"give an id: {listed(ids)}",
        )
    return ids[0] if ids else reference


def ids_of(entries: Any, display_name: str, field: str) -> list[str]:
    """The ids of those that have the name: an answer that ignored the filter lists others too."""
    return [required(entry, field) for entry in entries or [] if entry.display_name == display_name]


def by_name(display_name: str) -> str:
    """A filter of the API's lists (backend/api/v2beta1/filter.proto)."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": display_name}
    return json.dumps({"predicates": [predicate]})


def required(answer: Any, field: str) -> str:
    """A field that the API always answers with: kfp's models turn a login page into a record of None."""
    value = getattr(answer, field)
    if not value:
        raise ValueError(f"it has no {field}")
    return str(value)


@contextlib.contextmanager
def explained(host: str) -> Iterator[None]:
    """Answers below 500 become RefusedError with a remedy; what may pass (500 and above, 429, no answer) WorkError."""
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    server_name = f"Kubeflow Pipelines at {address.without_login(host)}"
    try:
        # The client prints links of its own.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ApiException as error:
        raise _of_error_status(error, host, server_name) from error
    except HTTPError as error:
        raise _of_lost_connection(error, server_name) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise WorkError(
            f"the answer is not one of the API's ({error})",
            field=server_name,
            remedy=f"{LOGIN_AGAIN}, and check that --host ends where the API begins",
        ) from error


# By HTTP status.
REMEDIES = {
    401: "set KFP_TOKEN or --token-file to a token that is valid now",
    403: "the account needs the rights of manifests/base/runs/rbac.yaml in this namespace (in multi-user Kubeflow give "
    "--namespace)",
    404: "check the id, the --namespace, and that --host ends where the API begins (for Kubeflow behind its dashboard: "
    "https://HOST/pipeline)",
}


def _of_error_status(error: Any, host: str, server_name: str) -> RefusedError | WorkError:
    if not error.status:
        return _of_lost_connection(error, server_name)
    chain = _server_message(error)
    reason = re.split("[Ee]rror: ", chain)[-1]  # without the functions that it went through
    status = error.status
    problem, remedy = f"{status} {reason}", ""
    if 300 <= status < 400:
        target = address.page(urljoin(host, error.headers.get("Location", "")))
        problem = f"{status} it points to {target}, where no token is sent"
        remedy = f"{LOGIN_AGAIN}, or give that address as --host if it is the server's own"
    # The server answers 500 for a version that is not there.
    elif status == 500 and "ResourceNotFoundError: " in chain:
        status, problem, remedy = NOT_FOUND, reason, "it was deleted"
    elif status >= 500 or status == TOO_MANY_REQUESTS:
        return WorkError(f"{status} {chain}", field=server_name, remedy="is it healthy?")
    elif status in REMEDIES:
        # A proxy's own answer is a page: HTTP's word says more.
        problem, remedy = f"{status} {error.reason}", f"{REMEDIES[status]} ({reason})"
    return RefusedError(problem, status, field=server_name, remedy=remedy)


def _of_lost_connection(error: Exception, server_name: str) -> WorkError:
    sentence = connections.sentence(server_name, error)
    return WorkError(
        sentence,
        remedy="is --ca-cert right?"
        if "certificate" in sentence
        else "is --host right, and is it up?",
    )


def _server_message(error: Any) -> str:
    """What the server says, in one line: the API's message, or the text of another server's answer."""
    content = error.body or error.reason or ""
    if isinstance(content, bytes):
        content = content.decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        answer = json.loads(content)
        content = (
            answer.get("message") or answer.get("error_message") or answer.get("error") or content
        )
    return connections.shortened(str(content), 500)
