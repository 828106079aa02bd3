"""Checkpoints in an S3 store: boto3's transfer manager, within bounded memory; never the crt transfer client.

Settings are from the environment, credentials from boto3's own places; errors have a remedy.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ptl import connections
from ptl.errors import InputError, PtlError, WorkError
from ptl.storage.local_files import full_disk
from ptl.storage.manifest import BLOCK, FILES, THREADS, Files, Progress, verify

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Of one request: the pauses between them add up to some two minutes, which outlasts a restart of the server
REQUEST_ATTEMPTS = 9
ATTEMPTS = 3  # of what boto3 does not repeat by itself
# for a part whose download breaks off: each begins with a request that outlasts a restart
STREAMS = 20
NO_CONDITIONS = ("NotImplemented", "501")  # the store has no conditional writes
# another writer was first
EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")

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
PREFIXES = ("AWS_", "MLFLOW_S3_")  # of all that boto3 and MLflow's client read
MISSING = ("NoSuchKey", "404")  # error codes of an object that is not there

SET_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_NO_BUCKET = (
    "the bucket does not exist",
    "create it or correct the experiment's artifact location",
)
_WRONG_KEYS = ("the credentials are not accepted", f"{SET_KEYS} to the server's")
_DENIED = (
    "access denied",
    f"{SET_KEYS} to the server's, with the rights for it (`ptl gc`: s3:DeleteObject)",
)
# Errors of the settings, by the server's code: problem and remedy.
_SETTINGS_ERRORS = {
    "NoSuchBucket": _NO_BUCKET,
    "404": _NO_BUCKET,
    "InvalidAccessKeyId": _WRONG_KEYS,
    "SignatureDoesNotMatch": _WRONG_KEYS,
    "AccessDenied": _DENIED,
    "403": _DENIED,
}


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`."""
    # A key may hold a number sign, which begins no fragment.
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme != "s3" or not parts.netloc:
        raise InputError(f"{uri!r} must be s3://bucket/folder", field="store")
    return parts.netloc, parts.path.strip("/")


def client(attempts: int = REQUEST_ATTEMPTS) -> S3Client:
    """A client for the environment as it is now, with credentials from wherever boto3 finds them."""
    # The environment may change while a process lives: a client is kept for each state of it.
    return _build(
        attempts, tuple(sorted(item for item in os.environ.items() if item[0].startswith(PREFIXES)))
    )


def keys() -> dict[str, str]:
    """The credentials as variables, for whom boto3 would find none; empty where it finds none here."""
    import boto3

    with explained("S3"):
        credentials = boto3.session.Session().get_credentials()
        if credentials is None:
            return {}
        frozen = credentials.get_frozen_credentials()
    named = zip(SETTINGS[-3:], (frozen.access_key, frozen.secret_key, frozen.token), strict=True)
    return {name: value for name, value in named if value}


@functools.lru_cache(4)
def _build(attempts: int, settings: tuple[tuple[str, str], ...]) -> S3Client:
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
    try:
        return session.client("s3", endpoint_url=_endpoint_url(), region_name=region, config=config)
    except ValueError as error:
        raise InputError(
            f"{_endpoint_url()!r} is not an address",
            field="MLFLOW_S3_ENDPOINT_URL",
            remedy="write http://host:port",
        ) from error


def _endpoint_url() -> str | None:
    """Where the S3 server is; None means AWS itself."""
    return next((os.environ[name] for name in SETTINGS[:3] if os.environ.get(name)), None)


@contextmanager
def explained(uri: str, field: str = "store", kind: type[PtlError] = WorkError) -> Iterator[None]:
    """Errors of the settings become InputError, those of the transfer `kind`; all name field, endpoint and URI."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions
    from botocore.exceptions import (
        ConfigParseError,
        PartialCredentialsError,
        ProfileNotFound,
        SSOError,
        TokenRetrievalError,
    )
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError

    of_profile = (
        PartialCredentialsError,
        ProfileNotFound,
        ConfigParseError,
        SSOError,
        TokenRetrievalError,
    )
    transfer = (Boto3Error, RetriesExceededError, S3DownloadFailedError, S3ValidationError)
    try:
        yield
    except (
        exceptions.BotoCoreError,
        exceptions.ClientError,
        ResponseParserError,
        *transfer,
    ) as error:
        problem = connections.shortened(str(error))
        remedy = "is the server up, and is MLFLOW_S3_ENDPOINT_URL right?"
        if isinstance(error, exceptions.NoCredentialsError):
            kind, problem, remedy = (
                InputError,
                "no S3 credentials",
                f"{SET_KEYS} (`ptl up` prints them)",
            )
        elif isinstance(error, of_profile):
            kind, remedy = (
                InputError,
                f"log in again (aws sso login), correct the profile, or {SET_KEYS}",
            )
        elif _code(error) in _SETTINGS_ERRORS:
            kind, (problem, remedy) = InputError, _SETTINGS_ERRORS[_code(error)]
        elif isinstance(error, exceptions.ClientError):
            retry = "run the same command again, or look at the S3 server's log"
            remedy = "renew the login" if _code(error) == "ExpiredToken" else retry
            message = error.response.get("Error", {}).get("Message", "")
            problem = connections.shortened(f"{_code(error)} ({message})")
        server = _endpoint_url() or "AWS"
        reason = connections.failure(error)
        sentence = (
            f"S3 at {server} does not answer: {reason} ({uri})"
            if reason
            else f"{uri} at {server}: {problem}"
        )
        raise kind(sentence, field=field, remedy=remedy) from error


def _code(error: Any) -> str:
    """The S3 error code of a botocore ClientError; empty for another error."""
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def is_missing(error: Any) -> bool:
    """Whether a ClientError says that there is no such object."""
    return _code(error) in MISSING


def upload(folder: Path, location: str, paths: list[str], on_progress: Progress) -> None:
    """Upload these files of a folder side by side."""
    for _ in range(ATTEMPTS):
        # A server that restarts may forget the multipart uploads that were not complete.
        paths = _transfer("upload", folder, location, paths, on_progress)
        if not paths:
            return
    raise WorkError(
        f"{location}: the server has forgotten the uploads of {', '.join(paths)}", field="store"
    )


def fetch(uri: str, files: Files, cache: Path, name: str, on_progress: Progress) -> Path:
    """Download into `<cache>.partial`, verify, then rename; or take an earlier download.

    Processes that want the same checkpoint wait for each other (a lock file beside `cache`). Raises WorkError.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    # The system frees the lock however this process ends.
    with cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.is_dir():
            # An earlier step of this run on this machine may have fetched it.
            try:
                verify(cache, files, f"copy of {uri}", on_progress)
                return cache
            except WorkError:
                shutil.rmtree(cache)  # only a copy: fetched again below
        # What a killed process left there is not trusted, and not continued.
        partial = cache.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with full_disk(partial):
                _download(uri, files, partial, name, on_progress)
            partial.rename(cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return cache


def _download(uri: str, files: Files, target: Path, name: str, on_progress: Progress) -> None:
    """Fill a folder with the files of a checkpoint, all verified; once more where a check fails."""
    paths = [file.path for file in files]
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
    lost = _transfer("download", target, uri, paths, on_progress)
    try:
        verify(target, files, name)
    except WorkError:  # a byte may have changed on its way
        if lost:
            raise
        _transfer("download", target, uri, paths, on_progress)
        verify(target, files, name)


def _transfer(
    direction: Literal["upload", "download"],
    folder: Path,
    uri: str,
    paths: Iterable[str],
    on_progress: Progress,
) -> list[str]:
    """Move files between `folder` and `uri`, side by side; returns the paths of those that the server does not have."""
    from botocore.exceptions import ClientError
    from s3transfer.manager import TransferConfig, TransferManager

    bucket, prefix = split(uri)
    counter = SimpleNamespace(
        on_progress=lambda bytes_transferred, **_: on_progress(bytes_transferred)
    )
    # Memory: THREADS parts of BLOCK bytes, and 100 pieces of 256 KiB that wait for the disk.
    config = TransferConfig(
        multipart_threshold=BLOCK,
        multipart_chunksize=BLOCK,
        max_request_concurrency=THREADS,
        max_io_queue_size=100,
        num_download_attempts=STREAMS,
    )
    lost = []
    with explained(uri), TransferManager(client(), config) as manager:
        move = getattr(manager, direction)
        # All are submitted first: waiting for one does not hold the others up.
        futures = {}
        for path in paths:
            file = str(folder / path)
            futures[path] = move(
                fileobj=file, bucket=bucket, key=f"{prefix}/{path}", subscribers=[counter]
            )
        for path, future in futures.items():
            try:
                future.result()
            except ClientError as error:
                if _code(error) not in (*MISSING, "NoSuchUpload"):
                    raise
                lost.append(path)
    return lost


def read(uri: str) -> bytes | None:
    """The bytes of a small object, or None where there is none."""
    from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

    bucket, key = split(uri)
    with explained(uri):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return bytes(client().get_object(Bucket=bucket, Key=key)["Body"].read())
            except ClientError as error:
                if is_missing(error):
                    return None
                raise
            except (HTTPClientError, IncompleteReadError):
                # The client repeats requests, but not the reading of an answer that breaks off.
                if attempt == ATTEMPTS:
                    raise
    return None


def put_once(uri: str, data: bytes) -> bytes:
    """Put an object unless it exists (If-None-Match); returns what is there now, which may be another writer's."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    with explained(uri):
        for _ in range(ATTEMPTS):
            current = read(uri)  # first, because some stores accept the condition and ignore it
            if current is not None:
                return current
            try:
                client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) in NO_CONDITIONS:
                    put(uri, data)  # the one writer that a step normally has is still safe
                elif _code(error) not in EXISTS:
                    raise
    raise WorkError(f"{uri} was written but cannot be read back", field="store")


def put(uri: str, data: bytes) -> None:
    """Put a small object, whatever is there."""
    bucket, key = split(uri)
    with explained(uri):
        client().put_object(Bucket=bucket, Key=key, Body=data)


def walk(uri: str) -> Iterator[tuple[str, int, float]]:
    """Path below `uri`, size in bytes and time of change of every object there."""
    bucket, prefix = split(uri)
    folder = f"{prefix}/"
    with explained(uri):
        # A page has up to 1,000 objects.
        for page in (
            client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
        ):
            for entry in page.get("Contents", []):
                yield (
                    entry["Key"].removeprefix(folder),
                    entry["Size"],
                    entry["LastModified"].timestamp(),
                )


def delete(uri: str, _below: str) -> None:
    """Remove all objects below `uri`, the list of files first: a reader then sees no checkpoint instead of half of one.

    Keys are taken literally, so that `uri` cannot lead out of the folder that it begins with.
    """
    bucket, prefix = split(uri)
    # False sorts before True: the list first.
    paths = sorted((path for path, _, _ in walk(uri)), key=lambda path: path != FILES)
    with explained(uri):
        for path in paths:
            client().delete_object(Bucket=bucket, Key=f"{prefix}/{path}")


def check(root: str) -> None:
    """Raise InputError for missing or wrong credentials, a wrong endpoint or a missing bucket, within seconds."""
    bucket, prefix = split(root)
    # Few attempts: somebody waits for the answer, and a server that is restarting can be asked again.
    # Not by HeadBucket, which a policy for one prefix refuses.
    with explained(root, kind=InputError):
        client(attempts=2).list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=1)
