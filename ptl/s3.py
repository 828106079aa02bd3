"""Checkpoints in an S3 store: boto3, parts in parallel, within bounded memory; never the crt transfer client."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from io import FileIO
from pathlib import Path
from typing import Any

from ptl.errors import InputError, WorkError
from ptl.localfs import full_disk
from ptl.manifest import (
    BLOCK,
    CHUNK,
    FILES,
    THREADS,
    File,
    Progress,
    dump_files,
    sha256_of,
    starts,
    verify,
    wrong_digest,
    wrong_size,
)
from ptl.s3_client import ATTEMPTS, broken_stream, client, code, explained, message, pause, split

SMALL = 64 << 20  # bytes that a list of files or a record may have
ROUNDS = 3  # per file, where the store forgot a multipart upload


def publish(folder: Path, location: str, paths: list[str], on_progress: Progress) -> tuple[File, ...]:
    """Upload the files side by side, hashing them meanwhile, and their list last."""
    if read(f"{location}/{FILES}") is not None:
        raise WorkError(f"store: {location} already holds a checkpoint; publish every attempt under a fresh prefix")
    bucket, prefix = split(location)
    sizes = {path: (folder / path).stat().st_size for path in paths}
    with explained(location), ThreadPoolExecutor(2) as hashing:
        blocks = {
            path: [hashing.submit(sha256_of, folder / path, start) for start in starts(size)]
            for path, size in sizes.items()
        }
        _upload(folder, bucket, prefix, paths, on_progress)
        files = tuple(File(path, size, tuple(block.result() for block in blocks[path])) for path, size in sizes.items())
        client().put_object(Bucket=bucket, Key=f"{prefix}/{FILES}", Body=dump_files(files))
    return files


def fetch(uri: str, files: tuple[File, ...], cache: Path, where: str, on_progress: Progress) -> Path:
    """Download into `<cache>.partial`, each block verified as it arrives, then rename; or take an earlier download.

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
            data = bytearray()
            try:
                while chunk := body.read(CHUNK):  # to its end, which is where a short answer is noticed
                    data += chunk
                    if len(data) > SMALL:
                        raise WorkError(
                            f"store: {uri} has more than {SMALL:,} bytes, so it is not what ptl wrote there"
                        )
                return bytes(data)
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
    """Remove all objects below `uri`, the list of files first: a reader then sees no checkpoint instead of half of one.

    Keys are taken literally, so that `uri`, which begins with `below`, cannot lead out of it.
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
    """Blocks arrive side by side and in any order, and each is hashed by the thread that receives it.

    Not by the transfer manager: given a sink to hash, its download came out short after the server was killed in the
    middle (seen with s3transfer 0.19).
    """
    with explained(uri), ExitStack() as opened, ThreadPoolExecutor(THREADS) as pool:
        try:
            blocks = []
            for file in files:
                path = target / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                out = opened.enter_context(FileIO(path, "x+"))
                # An empty file has one block too, so that it is missed when it was deleted.
                blocks += [
                    pool.submit(_get_block, uri, file, start, out, where, on_progress) for start in starts(file.size)
                ]
            for block in blocks:
                block.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _get_block(uri: str, file: File, start: int, out: FileIO, where: str, on_progress: Progress) -> None:
    """Write one block of an object to its place in the file; one that arrives wrong is fetched once more."""
    for last in (False, True):
        try:
            if _receive(uri, file, start, out, where) != file.blocks[start // BLOCK]:
                raise WorkError(wrong_digest(where, file))
            on_progress(min(BLOCK, file.size - start))
            return
        except WorkError:
            if last:
                raise


def _receive(uri: str, file: File, start: int, out: FileIO, where: str) -> str:
    """Hex sha256 of the block at `start`, written to its place; a stream that ends early is continued where it ended.

    Not a byte is written beyond the block, whatever the server sends.
    """
    hasher, done, stop, failures = hashlib.sha256(), start, min(start + BLOCK, file.size), 0
    while True:
        before, broken = done, None
        stream = _stream(uri, file, done, stop, where)  # the client has tried it often enough
        try:
            with closing(stream) as body:
                while done < stop and (data := body.read(min(CHUNK, stop - done))):
                    hasher.update(data)
                    done += _write_at(out, data, done)
        except broken_stream() as error:
            broken = error
        if done == stop:
            return hasher.hexdigest()
        failures = 0 if done > before else failures + 1
        if failures == ATTEMPTS:
            raise broken or WorkError(f"{where}: the S3 server sends no more of {file.path} than {done:,} bytes")
        if failures:
            time.sleep(pause(failures))  # a server that has just started answers before it has its data


def _stream(uri: str, file: File, start: int, stop: int, where: str) -> Any:
    """The stream of an object's bytes from `start`. Raises WorkError for a file that is not the published one."""
    from botocore.exceptions import ClientError

    bucket, prefix = split(uri)
    place: dict[str, Any] = {"Bucket": bucket, "Key": f"{prefix}/{file.path}"}
    # An empty file is asked for without a range, which would be refused.
    span: dict[str, Any] = {"Range": f"bytes={start}-{stop - 1}"} if file.size else {}
    try:
        answer = client().get_object(**place, **span)
    except ClientError as error:
        if code(error) in ("NoSuchKey", "404"):
            raise WorkError(
                f"{where}: file {file.path} was deleted; restore it or run the step that made it again"
            ) from error
        if code(error) in ("InvalidRange", "416"):
            raise WorkError(wrong_size(where, file, client().head_object(**place)["ContentLength"])) from error
        raise
    sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange", ""))
    first, size = (int(sent[1]), int(sent[2])) if sent else (0, answer["ContentLength"])
    if size != file.size:
        raise WorkError(wrong_size(where, file, size))
    if first != start:
        raise WorkError(
            f"{where}: file {file.path} was asked for from byte {start:,} and is sent from byte {first:,}; "
            "does a proxy before the S3 server ignore ranges?"
        )
    return answer["Body"]


def _write_at(opened: FileIO, data: bytes, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(opened.fileno(), data[done:] if done else data, offset + done)
    return done


def _upload(folder: Path, bucket: str, prefix: str, paths: list[str], on_progress: Progress) -> None:
    """Upload all files with one transfer manager; what the store forgot half-way is uploaded again."""
    from botocore.exceptions import ClientError
    from s3transfer.manager import TransferConfig, TransferManager

    config = TransferConfig(multipart_threshold=BLOCK, multipart_chunksize=BLOCK, max_request_concurrency=THREADS)
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
