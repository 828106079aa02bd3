"""Why a server did not answer, as one phrase: client libraries wrap the cause in up to five errors of their own."""

from __future__ import annotations

import errno
import http.client
import re
import socket
import ssl
import subprocess
import textwrap
from collections.abc import Iterator

LIMIT = 300  # characters of what a server says: it may be a whole page
PAGE = re.compile(r"\s*<(!doctype|html)", re.IGNORECASE)


def sentence(server: str, error: BaseException, answer: str = "") -> str:
    """A sentence about an error of a server: why it does not answer, else its `answer`, else the error's own text."""
    reason = failure(error)
    return (
        f"{server} does not answer: {reason}"
        if reason
        else f"{server}: {shortened(answer or str(error))}"
    )


def failure(error: BaseException) -> str:
    """Why a connection failed, such as `connection refused`; empty for an error of another kind."""
    return next(filter(None, map(_phrase, _causes(error))), "")


def shortened(text: str, limit: int = LIMIT) -> str:
    """A text on one line, which ends after a whole word; a page for a browser is only named."""
    if PAGE.match(text):
        return "an HTML page"
    return textwrap.shorten(text, limit, placeholder=" ...")


def status_name(code: int) -> str:
    """An HTTP status with its name, such as `HTTP 403 Forbidden`."""
    return f"HTTP {code} {http.client.responses.get(code, '')}".strip()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one that it was raised from or while handling, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = _cause(error)


def _cause(error: BaseException) -> BaseException | None:
    if error.__cause__ is not None:
        return error.__cause__
    # Hugging Face's client and boto3's transfers keep an error as an argument or a field, and suppress the context.
    kept = [*error.args, getattr(error, "last_exception", None)]
    context = None if error.__suppress_context__ else error.__context__
    return next((entry for entry in kept if isinstance(entry, BaseException)), context)


def _phrase(error: BaseException) -> str:
    """What an error of Python itself says about a connection. The libraries' own errors are all raised from one."""
    from urllib3.exceptions import ResponseError

    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted ({error.verify_message})"
        case ssl.SSLError():
            return f"TLS failed ({(error.reason or 'no reason known').replace('_', ' ').lower()})"
        case socket.gaierror(errno=socket.EAI_AGAIN):
            return "the name server does not answer"
        case socket.gaierror():
            return "host name not known"
        case ConnectionRefusedError():
            return "connection refused"
        case TimeoutError() | subprocess.TimeoutExpired():
            return "timed out"
        case (
            ConnectionResetError()
            | ConnectionAbortedError()
            | BrokenPipeError()
            | http.client.IncompleteRead()
        ):
            return "it closed the connection"
        case OSError(errno=errno.ENETUNREACH | errno.EHOSTUNREACH):
            return "no route to host"
        case ResponseError():  # after all repeats: "too many 503 error responses"
            return str(error)
    return ""
