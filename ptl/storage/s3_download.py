"""Downloads from an S3 store: every block is verified as it arrives, whatever the network does meanwhile."""

from __future__ import annotations

import hashlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ptl.errors import WorkError
from ptl.storage.manifest import (
    BLOCK,
    CHUNK,
    THREADS,
    File,
    Files,
    Progress,
    block_size,
    deleted,
    starts,
    wrong_digest,
    wrong_size,
)
from ptl.storage.s3_client import ATTEMPTS, broken_stream, client, code, explained, is_missing, pause, split


@dataclass(frozen=True)
class _Download:
    """One file that is being downloaded."""

    uri: str  # of the checkpoint
    name: str  # of the checkpoint, for messages
    file: File
    out: FileIO


def download(uri: str, files: Files, target: Path, name: str, on_progress: Progress) -> None:
    """Blocks arrive side by side and in any order, and each is hashed by the thread that receives it.

    Not by the transfer manager: given a sink to hash, its download came out short after the server was killed in the
    middle (seen with s3transfer 0.19).
    """
    with explained(uri), ExitStack() as opened, ThreadPoolExecutor(THREADS) as pool:
        try:
            blocks = []
            # All blocks of all files are in one queue, so that a large file does not wait for small ones.
            for file in files:
                path = target / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                download = _Download(uri, name, file, opened.enter_context(FileIO(path, "x+")))
                # An empty file has one block too, so that it is missed when it was deleted.
                blocks += [pool.submit(_get_block, download, start, on_progress) for start in starts(file.size)]
            for block in blocks:
                block.result()
        except BaseException:
            # The files are closed on the way out: no thread may write to them any more.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _get_block(download: _Download, start: int, on_progress: Progress) -> None:
    """Write one block of an object to its location in the file. Raises WorkError for bytes that were not published."""
    file = download.file
    expected = file.blocks[start // BLOCK]
    try:
        digest = _receive(download, start)
    except WorkError:
        digest = ""
    # A byte may have changed on its way: a block that arrives wrong is fetched once more.
    if digest != expected and _receive(download, start) != expected:
        raise wrong_digest(download.name, file)
    on_progress(block_size(file, start))


def _receive(download: _Download, start: int) -> str:
    """Hex sha256 of the block at `start`, written to the file; a stream that ends early is continued where it ended."""
    file = download.file
    hasher = hashlib.sha256()
    # [start, offset) has been received, [offset, stop) has not.
    offset, stop = start, start + block_size(file, start)
    failures = 0  # streams in a row that brought nothing
    while True:
        before = offset
        broken: Exception | None = None
        stream = _open_stream(download, offset, stop)  # the client has tried it often enough
        try:
            with closing(stream):
                # Not a byte is written beyond the block, whatever the server sends.
                while offset < stop and (data := stream.read(min(CHUNK, stop - offset))):
                    hasher.update(data)
                    _write_at(download.out, data, offset)
                    offset += len(data)
        except broken_stream() as error:
            broken = error
        # Before the stream's error: what broke after the last byte does not matter.
        if offset == stop:
            return hasher.hexdigest()
        failures = 0 if offset > before else failures + 1
        if failures == ATTEMPTS:
            raise broken or WorkError(
                f"the S3 server sends no more of {file.path} than {offset:,} bytes",
                field=download.name,
            )
        if failures:
            time.sleep(pause(failures))  # a server that has just started answers before it has its data


def _open_stream(download: _Download, start: int, stop: int) -> Any:
    """The stream of an object's bytes from `start`. Raises WorkError for a file that is not the published one."""
    from botocore.exceptions import ClientError

    name = download.name
    file = download.file
    bucket, prefix = split(download.uri)
    location: dict[str, Any] = {"Bucket": bucket, "Key": f"{prefix}/{file.path}"}
    # A range of an empty file would be refused.
    part: dict[str, Any] = {"Range": f"bytes={start}-{stop - 1}"} if file.size else {}
    try:
        response = client().get_object(**location, **part)
    except ClientError as error:
        if is_missing(error):
            raise deleted(name, file) from error
        if code(error) in ("InvalidRange", "416"):
            # The object has become shorter; the answer does not say how long it is.
            size = client().head_object(**location)["ContentLength"]
            raise wrong_size(name, file, size) from error
        raise
    first, size = _sent_range(response)
    if size != file.size:
        raise wrong_size(name, file, size)
    if first != start:
        raise WorkError(
            f"file {file.path} was asked for from byte {start:,} and is sent from byte {first:,}",
            field=name,
            remedy="does a proxy before the S3 server ignore ranges?",
        )
    return response["Body"]


def _sent_range(response: Any) -> tuple[int, int]:
    """The first byte that is sent, and the size of the object."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.get("ContentRange", ""))
    if match is None:  # all of the object
        return 0, response["ContentLength"]
    return int(match[1]), int(match[2])


def _write_at(out: FileIO, data: bytes, offset: int) -> None:
    """Write all of `data` at an offset of the file; the system may take only a part of it at once."""
    while data:
        written = os.pwrite(out.fileno(), data, offset)
        data, offset = data[written:], offset + written
