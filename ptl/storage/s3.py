"""Checkpoints in an S3 store: boto3, parts in parallel, within bounded memory; never the crt transfer client."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ptl.errors import InputError, WorkError
from ptl.storage.local_files import full_disk
from ptl.storage.manifest import (
    BLOCK,
    CHUNK,
    FILES,
    THREADS,
    File,
    Files,
    Progress,
    dump_files,
    sha256_of,
    starts,
    verify,
)
from ptl.storage.s3_client import ATTEMPTS, broken_stream, client, code, error_for, explained, is_missing, pause, split
from ptl.storage.s3_download import download

SMALL = 64 << 20  # bytes that a list of files or a record may have
UPLOADS = 3  # of a file whose multipart upload the store forgot
NO_CONDITIONS = ("NotImplemented", "501")  # the store has no conditional writes
EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")  # another writer was first


def publish(folder: Path, location: str, paths: list[str], on_progress: Progress) -> Files:
    """Upload the files side by side, hashing them meanwhile, and their list last."""
    # A prefix that is used twice could mix the files of two attempts.
    if read(f"{location}/{FILES}") is not None:
        raise WorkError(
            f"{location} already holds a checkpoint",
            field="store",
            remedy="publish every attempt under a fresh prefix",
        )
    bucket, prefix = split(location)
    sizes = {path: (folder / path).stat().st_size for path in paths}
    blocks = {}
    # Hashed while they are uploaded.
    with explained(location), ThreadPoolExecutor(2) as hashing:
        for path, size in sizes.items():
            blocks[path] = [hashing.submit(sha256_of, folder / path, start) for start in starts(size)]
        _upload(folder, bucket, prefix, paths, on_progress)
        files = []
        for path, size in sizes.items():
            digests = tuple(block.result() for block in blocks[path])
            files.append(File(path, size, digests))
        # Last: where the list is, all files are.
        client().put_object(Bucket=bucket, Key=f"{prefix}/{FILES}", Body=dump_files(files))
    return tuple(files)


def _upload(
    folder: Path,
    bucket: str,
    prefix: str,
    paths: list[str],
    on_progress: Progress,
) -> None:
    """Upload all files; what the store forgot half-way is uploaded again."""
    from botocore.exceptions import ClientError
    from s3transfer.manager import TransferConfig, TransferManager

    counter: Any = SimpleNamespace(on_progress=lambda bytes_transferred, **_: on_progress(bytes_transferred))
    # Memory: THREADS parts of BLOCK bytes.
    config = TransferConfig(multipart_threshold=BLOCK, multipart_chunksize=BLOCK, max_request_concurrency=THREADS)
    # A server that restarts may lose the multipart uploads that were not complete.
    for _ in range(UPLOADS):
        forgotten: dict[str, Exception] = {}
        with TransferManager(client(), config) as manager:
            uploads = {}
            for path in paths:
                uploads[path] = manager.upload(
                    str(folder / path),
                    bucket,
                    f"{prefix}/{path}",
                    subscribers=[counter],
                )
            # All have been submitted: waiting for one does not hold the others up.
            for path, upload in uploads.items():
                try:
                    upload.result()
                except ClientError as error:
                    if code(error) != "NoSuchUpload":
                        raise
                    forgotten[path] = error
        if not forgotten:
            return
        paths = list(forgotten)
    raise next(iter(forgotten.values()))


def fetch(uri: str, files: Files, cache: Path, name: str, on_progress: Progress) -> Path:
    """Download into `<cache>.partial`, each block verified as it arrives, then rename; or take an earlier download.

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
                download(uri, files, partial, name, on_progress)
            partial.rename(cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return cache


def read(uri: str) -> bytes | None:
    """The bytes of a small object, or None where there is none."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    with explained(uri):
        for attempt in range(1, ATTEMPTS + 1):
            # The client itself has tried often enough to get an answer.
            try:
                stream = client().get_object(Bucket=bucket, Key=key)["Body"]
            except ClientError as error:
                if is_missing(error):
                    return None
                raise
            # What may break is the stream after it.
            try:
                return _read_all(stream, uri)
            except broken_stream():
                if attempt == ATTEMPTS:
                    raise
                time.sleep(pause(attempt))
    return None


def _read_all(stream: Any, uri: str) -> bytes:
    """The bytes of a stream to its end, which is where a short answer is noticed."""
    data = bytearray()
    while chunk := stream.read(CHUNK):
        data += chunk
        if len(data) > SMALL:
            raise WorkError(f"{uri} has more than {SMALL:,} bytes, so it is not what ptl wrote there", field="store")
    return bytes(data)


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
                    # The one writer that a step normally has is still safe.
                    client().put_object(Bucket=bucket, Key=key, Body=data)
                elif code(error) not in EXISTS:
                    raise
    raise WorkError(
        f"{uri} was written but cannot be read back",
        field="store",
        remedy="look at the S3 server's log",
    )


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


def delete(uri: str, below: str) -> None:
    """Remove all objects below `uri`, the list of files first: a reader then sees no checkpoint instead of half of one.

    Keys are taken literally, so that `uri`, which begins with `below`, cannot lead out of it.
    Raises InputError where these credentials may not delete, which is so for those of the steps.
    """
    from botocore.exceptions import ClientError

    bucket, prefix = split(uri)
    # False sorts before True: the list first.
    paths = sorted((path for path, _, _ in walk(uri)), key=lambda path: path != FILES)
    with explained(uri):
        for path in paths:
            try:
                client().delete_object(Bucket=bucket, Key=f"{prefix}/{path}")
            except ClientError as error:
                if code(error) not in ("AccessDenied", "403"):
                    raise
                raise InputError(
                    f"{uri}: these credentials may not delete",
                    field="store",
                    remedy="use some that may (s3:DeleteObject)",
                ) from error


def check(root: str) -> None:
    """Raise InputError for missing or wrong credentials, a wrong endpoint or a missing bucket, within seconds."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _ = split(root)
    # Few attempts: somebody waits for the answer, and a server that is restarting can be asked again.
    try:
        client(attempts=2).head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise error_for(InputError, error, root) from error
