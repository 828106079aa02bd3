"""Checkpoints in an S3 store: boto3, parts in parallel, within bounded memory; never the crt transfer client."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

from ptl.errors import InputError, WorkError
from ptl.localfs import full_disk
from ptl.manifest import BLOCK, FILES, File, Progress, dump_files, sha256_of, verify, wrong_digest, wrong_size
from ptl.s3_client import ATTEMPTS, THREADS, broken_stream, client, code, explained, message, pause, split

PART = 32 << 20  # bytes of a multipart part and of a ranged read
ROUNDS = 3  # per file, where the store forgot a multipart upload


def publish(folder: Path, location: str, paths: list[str], on_progress: Progress) -> tuple[File, ...]:
    """Upload the files side by side, hashing them meanwhile, and their list last."""
    if read(f"{location}/{FILES}") is not None:
        raise WorkError(f"store: {location} already holds a checkpoint; publish every attempt under a fresh prefix")
    bucket, prefix = split(location)
    with explained(location), ThreadPoolExecutor(2) as hashing:
        digests = [hashing.submit(sha256_of, folder / path) for path in paths]

        _upload(folder, bucket, prefix, paths, on_progress)
        files = tuple(
            File(path, (folder / path).stat().st_size, digest.result())
            for path, digest in zip(paths, digests, strict=True)
        )
        client().put_object(Bucket=bucket, Key=f"{prefix}/{FILES}", Body=dump_files(files))
    return files


def fetch(uri: str, files: tuple[File, ...], cache: Path, where: str, on_progress: Progress) -> Path:
    """Download into `<cache>.partial`, verified while it streams, then rename; a complete earlier download is taken.

    Processes that want the same checkpoint wait for each other (a lock file beside `cache`). Raises WorkError.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.is_dir():
            try:
                verify(cache, files, f"copy of {uri}", on_progress)
                return cache
            except WorkError:
                shutil.rmtree(cache)  # only a copy: fetched again below
        partial = cache.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with full_disk(partial):
                _download(uri, files, partial, where, on_progress)
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
            try:
                body = client().get_object(Bucket=bucket, Key=key)["Body"]
            except ClientError as error:
                if code(error) in ("NoSuchKey", "404"):
                    return None
                raise
            try:
                return body.read()
            except broken_stream():
                if attempt == ATTEMPTS:
                    raise
                time.sleep(pause(attempt))
    return None


def put_once(uri: str, data: bytes) -> bytes:
    """Put an object unless it exists (If-None-Match); returns what is there now, which may be another writer's."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    with explained(uri):
        for _ in range(ATTEMPTS):
            found = read(uri)  # first, because some stores accept the condition and ignore it
            if found is not None:
                return found
            try:
                client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                if code(error) in ("NotImplemented", "501"):
                    # No conditional writes here: the one writer that a step normally has is still safe.
                    client().put_object(Bucket=bucket, Key=key, Body=data)
                elif code(error) not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                    raise
    raise WorkError(f"store: {uri} was written but cannot be read back; look at the S3 server's log")


def walk(uri: str) -> Iterator[tuple[str, int, float]]:
    """Path below `uri`, size in bytes and time of change of every object there."""
    bucket, prefix = split(uri)
    with explained(uri):
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
            for item in page.get("Contents", []):
                yield item["Key"][len(prefix) + 1 :], item["Size"], item["LastModified"].timestamp()


def delete(uri: str, below: str) -> None:
    """Remove all objects below `uri`, which is below `below`, the list of files first: a reader then sees no checkpoint instead of half of one.

    Raises InputError where these credentials may not delete, which is so for those of the steps.
    """
    from botocore.exceptions import ClientError

    bucket, prefix = split(uri)
    paths = sorted((path for path, _, _ in walk(uri)), key=lambda path: path != FILES)
    with explained(uri):
        for path in paths:
            try:
                client().delete_object(Bucket=bucket, Key=f"{prefix}/{path}")
            except ClientError as error:
                if code(error) not in ("AccessDenied", "403"):
                    raise
                raise InputError(
                    f"store: {uri}: these credentials may not delete; use some that may (s3:DeleteObject)"
                ) from error


def check(root: str) -> None:
    """Raise InputError for missing or wrong credentials, a wrong endpoint or a missing bucket, within seconds."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _ = split(root)
    try:
        client(attempts=2).head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise InputError(message(error, root)) from error


def _download(uri: str, files: tuple[File, ...], target: Path, where: str, on_progress: Progress) -> None:
    """Parts arrive in parallel and in any order; each file is hashed in order behind them, while later parts arrive.

    Not by the transfer manager: given a sink to hash, its download came out short after the server was killed in the
    middle (seen with s3transfer 0.19).
    """
    with explained(uri), ThreadPoolExecutor(THREADS) as pool:
        try:
            work = [(file, *_begin(pool, uri, file, target / file.path, where, on_progress)) for file in files]
            for file, opened, parts in work:
                hasher = hashlib.sha256()
                with opened:
                    for start, part in parts:
                        part.result()
                        for offset in range(start, min(start + PART, file.size), BLOCK):
                            hasher.update(os.pread(opened.fileno(), min(BLOCK, file.size - offset), offset))
                if hasher.hexdigest() != file.sha256:
                    raise WorkError(wrong_digest(where, file))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin(
    pool: ThreadPoolExecutor, uri: str, file: File, path: Path, where: str, on_progress: Progress
) -> tuple[FileIO, list[tuple[int, Future[None]]]]:
    """Open a file and queue its parts: (start, future) in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = FileIO(path, "x+")
    bucket, prefix = split(uri)

    def get(start: int) -> None:
        _get_part(bucket, f"{prefix}/{file.path}", file, start, opened, where, on_progress)

    # An empty file has one part too, so that it is missed when it was deleted.
    return opened, [(start, pool.submit(get, start)) for start in range(0, max(file.size, 1), PART)]


def _get_part(bucket: str, key: str, file: File, start: int, opened: FileIO, where: str, on_progress: Progress) -> None:
    """Write one part of an object to its place in the file; a broken stream goes on where it broke."""
    from botocore.exceptions import ClientError

    done, stop = start, min(start + PART, file.size)
    try:
        for attempt in range(1, ATTEMPTS + 1):
            # An empty file is asked for without a range, which would be refused.
            wanted = f"bytes={done}-{stop - 1}" if file.size else ""
            answer = client().get_object(Bucket=bucket, Key=key, **({"Range": wanted} if wanted else {}))  # type: ignore[arg-type]
            size = int(answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"])
            if size != file.size:
                raise WorkError(wrong_size(where, file, size))
            try:
                while data := answer["Body"].read(1 << 20):
                    done += _write_at(opened, data, done)
                    on_progress(len(data))
                return
            except broken_stream():
                if attempt == ATTEMPTS:
                    raise
                time.sleep(pause(attempt))  # a server that has just started answers before it has its data
    except ClientError as error:
        if code(error) in ("NoSuchKey", "404"):
            raise WorkError(
                f"{where}: file {file.path} was deleted; restore it or run the step that made it again"
            ) from error
        if code(error) in ("InvalidRange", "416"):
            raise WorkError(wrong_size(where, file, _size(bucket, key))) from error
        raise


def _write_at(opened: FileIO, data: bytes, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(opened.fileno(), data[done:] if done else data, offset + done)
    return done


def _size(bucket: str, key: str) -> int:
    return client().head_object(Bucket=bucket, Key=key)["ContentLength"]


def _upload(folder: Path, bucket: str, prefix: str, paths: list[str], on_progress: Progress) -> None:
    """Upload all files with one transfer manager; what the store forgot half-way is uploaded again."""
    from botocore.exceptions import ClientError
    from s3transfer.manager import TransferConfig, TransferManager

    config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_request_concurrency=THREADS)
    for last in [False] * (ROUNDS - 1) + [True]:
        lost = []
        with TransferManager(client(), config) as manager:
            futures = {}
            for path in paths:
                counter = _counter(on_progress)
                futures[path] = manager.upload(str(folder / path), bucket, f"{prefix}/{path}", subscribers=[counter])
            for path, future in futures.items():
                try:
                    future.result()
                except ClientError as error:
                    if last or code(error) != "NoSuchUpload":
                        raise
                    lost.append(path)
        paths = lost
        if not paths:
            return


def _counter(on_progress: Progress) -> Any:
    """A subscriber that hands byte counts on."""
    from s3transfer.subscribers import BaseSubscriber

    class Counter(BaseSubscriber):
        def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
            on_progress(bytes_transferred)

    return Counter()
