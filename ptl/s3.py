"""Checkpoints in an S3 store: boto3's classic transfer manager, so parts in parallel within bounded memory."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ptl.errors import InputError, WorkError
from ptl.localfs import full_disk
from ptl.manifest import FILES, File, Progress, dump_files, sha256_of, verify, wrong_digest, wrong_size
from ptl.s3_client import ATTEMPTS, THREADS, client, code, explained, message, split

PART = 16 << 20  # bytes of a multipart part
CHUNKS = 6  # parts held in memory while a download is put in order: 96 MiB
ROUNDS = 3  # per file, where a whole transfer is lost: a multipart upload that the store forgot, a broken stream


def publish(folder: Path, location: str, paths: list[str], on_progress: Progress) -> tuple[File, ...]:
    """Upload the files side by side, hashing them meanwhile, and their list last."""
    if read(f"{location}/{FILES}") is not None:
        raise WorkError(f"store: {location} already holds a checkpoint; publish every attempt under a fresh prefix")
    bucket, prefix = split(location)
    with explained(location), ThreadPoolExecutor(2) as hashing:
        digests = [hashing.submit(sha256_of, folder / path) for path in paths]

        def begin(manager: Any, path: str) -> Any:
            return manager.upload(str(folder / path), bucket, f"{prefix}/{path}", subscribers=[_counter(on_progress)])

        _transfer(begin, paths)
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
        try:
            return client().get_object(Bucket=bucket, Key=key)["Body"].read()
        except ClientError as error:
            if code(error) in ("NoSuchKey", "404"):
                return None
            raise


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


def check(root: str) -> None:
    """Raise InputError for missing or wrong credentials, a wrong endpoint or a missing bucket, within seconds."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _ = split(root)
    try:
        client(attempts=2).head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise InputError(message(error, root)) from error


def _download(uri: str, files: tuple[File, ...], target: Path, where: str, on_progress: Progress) -> None:
    from botocore.exceptions import ClientError

    bucket, prefix = split(uri)
    sinks: dict[str, _Sink] = {}

    def begin(manager: Any, path: str) -> Any:
        if path in sinks:
            sinks[path].close()
        sinks[path] = _Sink(target / path, on_progress)
        return manager.download(bucket, f"{prefix}/{path}", sinks[path])

    try:
        with explained(uri):
            try:
                _transfer(begin, [file.path for file in files])
            except ClientError as error:
                if code(error) not in ("NoSuchKey", "404"):
                    raise
                gone = [file.path for file in files if not _exists(bucket, f"{prefix}/{file.path}")]
                raise WorkError(
                    f"{where}: file {', '.join(gone)} was deleted; restore it or run the step that made it again"
                ) from error
    finally:
        for sink in sinks.values():
            sink.close()
    for file in files:
        sink = sinks[file.path]
        if sink.size != file.size:
            raise WorkError(wrong_size(where, file, sink.size))
        if sink.hexdigest() != file.sha256:
            raise WorkError(wrong_digest(where, file))


def _transfer(begin: Callable[[Any, str], Any], paths: list[str]) -> None:
    """Move all files with one transfer manager; a transfer that was lost as a whole is begun again."""
    from botocore.exceptions import ClientError, IncompleteReadError
    from s3transfer.exceptions import RetriesExceededError
    from s3transfer.manager import TransferConfig, TransferManager

    config = TransferConfig(
        multipart_threshold=PART,
        multipart_chunksize=PART,
        max_request_concurrency=THREADS,
        max_submission_concurrency=THREADS,
        max_in_memory_download_chunks=CHUNKS,
        io_chunksize=1 << 20,
        max_io_queue_size=32,
    )
    lost = paths
    for last in [False] * (ROUNDS - 1) + [True]:
        again = []
        with TransferManager(client(), config) as manager:
            futures = [(path, begin(manager, path)) for path in lost]
            for path, future in futures:
                try:
                    future.result()
                except (ClientError, IncompleteReadError, RetriesExceededError) as error:
                    broken = not isinstance(error, ClientError) or code(error) == "NoSuchUpload"
                    if last or not broken:
                        raise
                    again.append(path)
        lost = again
        if not lost:
            return


class _Sink:
    """A file that is hashed while it is written. Without seek(), so the transfer manager writes it in order."""

    def __init__(self, path: Path, on_progress: Progress) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._hasher, self._on_progress, self.size = hashlib.sha256(), on_progress, 0

    def write(self, data: bytes) -> None:
        """Called by the one thread that writes."""
        self._hasher.update(data)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:] if done else data) or 0
        self.size += len(data)
        self._on_progress(len(data))

    def close(self) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


def _counter(on_progress: Progress) -> Any:
    """A subscriber that hands byte counts on."""
    from s3transfer.subscribers import BaseSubscriber

    class Counter(BaseSubscriber):
        def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
            on_progress(bytes_transferred)

    return Counter()


def _exists(bucket: str, key: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        client().head_object(Bucket=bucket, Key=key)
    except ClientError:
        return False
    return True
