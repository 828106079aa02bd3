"""Checkpoints in an S3 store: boto3's transfer manager, within bounded memory; never the crt transfer client."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from ptl.errors import InputError, WorkError
from ptl.storage.local_files import full_disk
from ptl.storage.manifest import BLOCK, FILES, THREADS, Files, Progress, verify
from ptl.storage.s3_client import MISSING, client, code, error_for, explained, split

ATTEMPTS = 3  # of what boto3 does not repeat by itself
STREAMS = 20  # for a part whose download breaks off: each begins with a request that outlasts a restart
NO_CONDITIONS = ("NotImplemented", "501")  # the store has no conditional writes
EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")  # another writer was first


def upload(folder: Path, location: str, paths: list[str], on_progress: Progress) -> None:
    """Upload these files of a folder side by side."""
    for _ in range(ATTEMPTS):
        # A server that restarts may forget the multipart uploads that were not complete.
        paths = _transfer("upload", folder, location, paths, on_progress)
        if not paths:
            return
    raise WorkError(f"{location}: the server has forgotten the uploads of {', '.join(paths)}", field="store")


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
    # What is gone is named when all is verified.
    _transfer("download", target, uri, paths, on_progress)
    try:
        verify(target, files, name)
    except WorkError:  # a byte may have changed on its way
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
    counter = SimpleNamespace(on_progress=lambda bytes_transferred, **_: on_progress(bytes_transferred))
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
                fileobj=file,
                bucket=bucket,
                key=f"{prefix}/{path}",
                subscribers=[counter],
            )
        for path, future in futures.items():
            try:
                future.result()
            except ClientError as error:
                if code(error) not in (*MISSING, "NoSuchUpload"):
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
                if code(error) in MISSING:
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
                if code(error) in NO_CONDITIONS:
                    put(uri, data)  # the one writer that a step normally has is still safe
                elif code(error) not in EXISTS:
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
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder):
            for entry in page.get("Contents", []):
                yield entry["Key"].removeprefix(folder), entry["Size"], entry["LastModified"].timestamp()


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
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _ = split(root)
    # Few attempts: somebody waits for the answer, and a server that is restarting can be asked again.
    try:
        client(attempts=2).head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: the endpoint is no address
        raise error_for(InputError, error, root) from error
