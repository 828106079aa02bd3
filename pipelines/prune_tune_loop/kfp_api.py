"""Calls to Kubeflow Pipelines: connected once, every failure explained, what may pass is tried again."""

import contextlib
import io
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin

from ptl import address
from ptl.errors import InputError, WorkError
from ptl.units import listed

T = TypeVar("T")

ATTEMPTS = 5  # of one request
PAUSE = 1.0  # seconds after the first attempt, doubled each time: 15 s in all; tests shorten it
NOT_FOUND, CONFLICT, TOO_MANY_REQUESTS = 404, 409, 429
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte of the answer
ANSWER_TIMEOUT = 60.0  # seconds for a request and its whole answer
LIMIT = 16 << 20  # bytes of an answer, decompressed; the longest is a pipeline's version, of a few MB
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # as the ids of runs are
LOGIN_AGAIN = "the session may have expired: log in again (KFP_TOKEN or --token-file)"


@dataclass(frozen=True)
class Server:
    """Where Kubeflow Pipelines answers, and who is asking; what is None comes from the environment.

    A token itself comes from there only (KFP_TOKEN): an option would show it in the list of processes.
    """

    host: str | None = None  # KF_PIPELINES_ENDPOINT
    namespace: str | None = None  # the profile, in multi-user Kubeflow; KFP_NAMESPACE
    token_file: Path | None = None  # KF_PIPELINES_SA_TOKEN_PATH; read again for every request, since it is rotated
    ca_cert: Path | None = None  # PEM bundle; KFP_CA_CERT
    insecure: bool = False  # the server's certificate is not checked
    ui_host: str | None = None  # where a browser finds the UI, if elsewhere; KF_PIPELINES_UI_ENDPOINT


class RefusedError(InputError):
    """The server answered with an error that repeating the request would not change."""

    def __init__(self, problem: str, status: int, **details: str) -> None:
        super().__init__(problem, **details)
        self.status = status


class FinalError(WorkError):
    """A failure that another attempt at once would not change.

    Nobody listens at the address (a server that restarts behind a gateway answers 502 or 503 instead), or the answer
    has no end.
    """


class UnreadableError(Exception):
    """An answer of 200 that is not what the API answers, as a login page is."""


class EndlessError(UnreadableError):
    """An answer that is too long or takes too long."""


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
    host = _host(server)
    namespace = server.namespace or os.environ.get("KFP_NAMESPACE")
    token = os.environ.get("KFP_TOKEN")
    token_file = None if token else server.token_file or _path_variable("KF_PIPELINES_SA_TOKEN_PATH")
    ca_cert = server.ca_cert or _path_variable("KFP_CA_CERT")
    for option, path in (("--token-file", token_file), ("--ca-cert", ca_cert)):
        if path is not None and not path.is_file():
            raise InputError(f"no file {path}", field=option)
    from kfp.client import Client
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    credentials = ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file else None
    with warnings.catch_warnings(), explained(host):
        warnings.simplefilter("ignore")
        client = Client(
            host=host,
            existing_token=token,
            credentials=credentials,
            namespace=namespace or "-",  # without one it asks for its health, and takes 25 s to say 401
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
            verify_ssl=not server.insecure,
        )
    # The client would send the placeholder above with its requests.
    client._context_setting["namespace"] = namespace or ""
    _guard(client, _server_name(host))
    ui = server.ui_host or os.environ.get("KF_PIPELINES_UI_ENDPOINT") or host
    return Api(client, namespace, address.bare(ui).rstrip("/"))


def _host(server: Server) -> str:
    host = server.host or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not host:
        raise InputError("give the address of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT", field="--host")
    if not address.is_server(host):
        raise InputError(f"{host!r} must begin with https:// or http://", field="--host")
    return host


def _path_variable(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value) if value else None


def _guard(client: Any, server_name: str) -> None:
    """Bound every request of a client in time and size, and refuse redirects and answers that are not JSON objects.

    kfp's methods take no timeout, and without one a server that hangs hangs the command. Its models turn a login page
    into a record whose fields are all None. A redirect leads to a login page, or takes the token to another server, and
    a POST loses its body by it. Requests are repeated by `call`, not by urllib3 as well.
    """
    from urllib3 import HTTPResponse, Retry, Timeout

    pool = client._run_api.api_client.rest_client.pool_manager  # every API of a kfp client shares it
    send = pool.request

    def guarded(method: str, url: str, **options: Any) -> HTTPResponse:
        options |= {
            "preload_content": False,
            "redirect": False,
            "timeout": Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT),
            "retries": Retry(total=None, connect=0, read=0, status=0, other=0),
        }
        with contextlib.closing(send(method, url, **options)) as answer:
            if 300 <= answer.status < 400:
                target = address.page(urljoin(url, answer.headers.get("Location", "")))
                raise RefusedError(
                    f"{answer.status} it points to {target}, where no token is sent: the session may have expired",
                    answer.status,
                    field=server_name,
                    remedy="log in again (KFP_TOKEN or --token-file), "
                    "or give that address as --host if it is the server's own",
                )
            content = _read(answer)
        if answer.status < 300 and not _is_json_object(content):
            raise UnreadableError("the answer is not JSON")
        return HTTPResponse(content, answer.headers, answer.status, reason=answer.reason)

    pool.request = lambda *args, **options: within(ANSWER_TIMEOUT, partial(guarded, *args, **options))


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, in a thread that is left behind when it takes longer. Raises EndlessError then.

    A server that sends a byte now and then keeps to every timeout of a socket, in the headers as well.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():  # it is the work's own
            raise
        raise EndlessError(f"the answer takes longer than {seconds:g} s") from None


def _read(answer: Any) -> bytes:
    """The content of an answer. Raises EndlessError where it is too long."""
    content = bytearray()
    for piece in answer.stream(1 << 16):  # of decompressed bytes
        content += piece
        if len(content) > LIMIT:
            raise EndlessError(f"the answer is longer than {LIMIT >> 20} MiB")
    return bytes(content)


def _is_json_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def call(
    api: Api,
    function: Callable[..., T],
    *args: Any,
    again: bool = True,
    needs: tuple[str, ...] = (),
    **kwargs: Any,
) -> T:
    """One request. With `again`, server errors and lost connections are tried again; without, they are WorkError.

    An answer that lacks one of the fields `needs` counts as a server error.
    """
    for attempt in range(ATTEMPTS):
        try:
            # The client prints links of its own.
            with explained(api.client._existing_config.host), contextlib.redirect_stdout(io.StringIO()):
                return _parsed_answer(partial(function, *args, **kwargs), needs)
        except WorkError as error:
            if isinstance(error, FinalError) or not again or attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE * 2.0**attempt)
    raise AssertionError("unreachable")


def _parsed_answer(request: Callable[[], T], needs: Iterable[str]) -> T:
    """The answer as the client's record. Raises UnreadableError for fields of another kind, where the client fails."""
    try:
        answer = request()
    except (TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(f"the answer is not one of the API's ({error})") from error
    missing = [name for name in needs if not getattr(answer, name)]
    if missing:
        raise UnreadableError(f"the answer has no {' and no '.join(missing)}")
    return answer


def get_run(api: Api, run_id: str, again: bool = True) -> Any:
    """A run, with its state, which is one that can be waited on or has ended."""
    from kfp_server_api import V2beta1RuntimeState

    run = call(api, api.client.get_run, run_id, again=again, needs=("run_id", "state"))
    if run.state not in V2beta1RuntimeState.allowable_values:
        raise WorkError(
            f"run {run_id} is in the state {run.state!r}, which is not known",
            field=_server_name(api.client._existing_config.host),
        )
    return run


def run_id_of(api: Api, reference: str) -> str:
    """The id of the run that a user names by its id or its name. Raises InputError where several have the name."""
    if UUID.fullmatch(reference):
        return reference
    answer = call(api, api.client.list_runs, filter=by_name(reference), namespace=api.namespace)
    ids = [run.run_id for run in answer.runs or [] if run.display_name == reference]
    if len(ids) > 1:
        raise InputError(f"{len(ids)} runs have the name {reference}", field="run", remedy=f"give an id: {listed(ids)}")
    return ids[0] if ids else reference


def by_name(display_name: str) -> str:
    """A filter of the API's lists (backend/api/v2beta1/filter.proto); an answer that ignores it lists others too."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": display_name}
    return json.dumps({"predicates": [predicate]})


def _server_name(host: str) -> str:
    return f"Kubeflow Pipelines at {address.without_login(host)}"


@contextlib.contextmanager
def explained(host: str) -> Any:
    """Answers below 500 become RefusedError with a remedy; what may pass (500 and above, 429, no answer) WorkError."""
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    server_name = _server_name(host)
    try:
        yield
    except ApiException as error:
        raise _of_error_status(error, server_name) from error
    except HTTPError as error:
        raise _of_lost_connection(error, server_name) from error
    except UnreadableError as error:
        error_class = FinalError if isinstance(error, EndlessError) else WorkError
        raise error_class(
            str(error),
            field=server_name,
            remedy=f"{LOGIN_AGAIN}, and check that --host ends where the API begins",
        ) from error


# By HTTP status: what it means, and the remedy.
REFUSALS = {
    401: ("not logged in", "set KFP_TOKEN or --token-file to a token that is valid now"),
    403: (
        "not allowed",
        "the account needs the rights of manifests/base/runs/rbac.yaml in this namespace (in multi-user Kubeflow give "
        "--namespace)",
    ),
    404: (
        "not found",
        "check the id, the --namespace, and that --host ends where the API begins (for Kubeflow behind its dashboard: "
        "https://HOST/pipeline)",
    ),
}


def _of_error_status(error: Any, server_name: str) -> RefusedError | WorkError:
    sentence = _server_sentence(error)
    status = error.status
    # The server answers 500 for a version that is not there.
    deleted = re.search(r"ResourceNotFoundError: (.*)", sentence)
    if status == 500 and deleted:
        return RefusedError(deleted[1], NOT_FOUND, field=server_name, remedy="it was deleted")
    if not status or status >= 500 or status == TOO_MANY_REQUESTS:
        return WorkError(f"{status} {sentence}", field=server_name, remedy="is it healthy?")
    # 401 and the like do not say what to do about them.
    if status in REFUSALS:
        meaning, remedy = REFUSALS[status]
        return RefusedError(f"{status} {meaning}", status, field=server_name, remedy=f"{remedy} ({sentence})")
    return RefusedError(f"{status} {sentence}", status, field=server_name)


def _of_lost_connection(error: Any, server_name: str) -> WorkError:
    from urllib3.exceptions import NewConnectionError

    reason = getattr(error, "reason", None) or error
    # Without the library's own objects and the query: `HTTPSConnectionPool(host=..., port=443): `
    problem = re.sub(r"HTTPS?Connection(Pool)?\(.*?\): ", "", str(reason))
    is_certificate = "CERTIFICATE" in str(error).upper()
    remedy = "is --ca-cert right?" if is_certificate else "is --host right, and is it up?"
    error_class = FinalError if isinstance(reason, NewConnectionError) else WorkError
    return error_class(problem, field=server_name, remedy=remedy)


def _server_sentence(error: Any) -> str:
    """The server's own sentence: the first detail, without the chain of functions that it went through."""
    content = error.body or error.reason
    if isinstance(content, bytes):
        content = content.decode(errors="replace")
    content = str(content)
    sentences = []
    try:
        answer = json.loads(content)
        sentences = [answer.get(name) for name in ("message", "error_message", "error")]
        if error.status != 500:  # whose details are that chain
            sentences = [detail["message"] for detail in answer.get("details", [])] + sentences
    except (ValueError, AttributeError, KeyError, TypeError):
        sentences = []
    sentence = next((text for text in sentences if isinstance(text, str) and text), content)
    return " ".join(sentence.split())[:500]
