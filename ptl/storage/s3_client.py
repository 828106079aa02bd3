"""The connection to an S3 store: settings and credentials from the environment only, errors with a remedy."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ptl.errors import InputError, PtlError, WorkError
from ptl.storage.manifest import THREADS

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ATTEMPTS = 9  # per request; the pauses between them add up to some two minutes, which outlasts a restart of the server

# What decides which server is asked, and as whom; in the order of precedence.
SETTINGS = (
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
# Any of these means that the environment says where credentials are; boto3 then reads them.
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
MISSING = ("NoSuchKey", "404")  # error codes of an object that is not there

SET_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_NO_BUCKET = ("the bucket does not exist", "create it or correct the experiment's artifact location")
_WRONG_KEYS = ("the credentials are not accepted", f"{SET_KEYS} to the server's")
_DENIED = ("access denied", f"{SET_KEYS} to the server's, with the rights for it (`ptl gc`: s3:DeleteObject)")
# Errors of the settings, by the server's code: problem and remedy.
_SETTINGS_ERRORS = {
    "NoSuchBucket": _NO_BUCKET,
    "404": _NO_BUCKET,
    "InvalidAccessKeyId": _WRONG_KEYS,
    "SignatureDoesNotMatch": _WRONG_KEYS,
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "ExpiredToken": ("the session token has expired", "renew AWS_SESSION_TOKEN"),
}


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`."""
    # A key may hold a number sign, which begins no fragment.
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme != "s3" or not parts.netloc:
        raise InputError(f"{uri!r} must be s3://bucket/folder", field="store")
    return parts.netloc, parts.path.strip("/")


def client(attempts: int = ATTEMPTS) -> S3Client:
    """A client for the environment as it is now. Raises InputError when that says nothing about credentials."""
    if not any(os.environ.get(name) for name in CREDENTIALS):
        raise InputError("no S3 credentials", field="environment", remedy=f"{SET_KEYS} (`ptl up` prints them)")
    # The environment may change while a process lives: a client is kept for each state of it.
    return _build(attempts, tuple(os.environ.get(name) for name in SETTINGS + CREDENTIALS))


@functools.lru_cache(4)
def _build(attempts: int, settings: tuple[str | None, ...]) -> S3Client:
    """A client for the settings of this moment; clients are safe to share between threads and slow to make."""
    import boto3
    from botocore.config import Config

    config = Config(
        # The newer modes share a quota between all requests of a client, so that a restart ends every transfer.
        retries={"mode": "legacy", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=2 * THREADS + 2,
    )
    # A session of its own: the default one is not safe between threads.
    session = boto3.session.Session()
    region = os.environ.get("AWS_REGION")  # which boto3 itself does not read
    return session.client("s3", endpoint_url=endpoint_url(), region_name=region, config=config)


def endpoint_url() -> str | None:
    """Where the S3 server is; None means AWS itself."""
    return next((os.environ[name] for name in SETTINGS[:3] if os.environ.get(name)), None)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Errors of the settings become InputError, those of the transfer WorkError; both name endpoint and URI."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError

    transfer = (RetriesExceededError, S3DownloadFailedError, S3ValidationError)
    try:
        yield
    except (BotoCoreError, ClientError, ResponseParserError, *transfer) as error:
        raise error_for(WorkError, error, uri) from error


def error_for(kind: type[PtlError], error: Exception, uri: str, *, field: str = "store") -> PtlError:
    """An error of boto3 as one that says what went wrong, where, and what to do; of the settings an InputError."""
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    problem = str(error)
    remedy = "is the server up, and is MLFLOW_S3_ENDPOINT_URL right?"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        kind, remedy = InputError, SET_KEYS
    elif code(error) in _SETTINGS_ERRORS:
        kind, (problem, remedy) = InputError, _SETTINGS_ERRORS[code(error)]
    elif isinstance(error, ClientError):
        remedy = "run the same command again, or look at the S3 server's log"
    return kind(f"{uri} at {endpoint_url() or 'AWS'}: {problem}", field=field, remedy=remedy)


def code(error: Any) -> str:
    """The S3 error code of a botocore ClientError; empty for another error."""
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def is_missing(error: Any) -> bool:
    """Whether a ClientError says that there is no such object."""
    return code(error) in MISSING
