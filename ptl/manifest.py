"""The list of a checkpoint's files: sizes, sha256 of their blocks, one digest over all. Readers trust nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from ptl.errors import InputError, WorkError

FILES = "ptl-files.json"  # lies beside the files it lists and is written after all of them
FORMAT = 2  # of the list
BLOCK = 16 << 20  # bytes that one sha256 covers; part of the format
CHUNK = 64 << 10  # bytes read, hashed and written at once; from 128 KiB on the allocator maps fresh memory for each
THREADS = 8  # blocks at once

Progress = Callable[[int], None]  # called with the number of bytes just moved, from several threads


@dataclass(frozen=True)
class File:
    """One file of a checkpoint: `path` is relative with forward slashes, `size` in bytes.

    `blocks` has the hex sha256 of every BLOCK bytes, of which the last may be shorter, so that blocks which arrive side
    by side are checked side by side. An empty file has one empty block.
    """

    path: str
    size: int
    blocks: tuple[str, ...]


def starts(size: int) -> range:
    """Where the blocks of a file of so many bytes begin."""
    return range(0, max(size, 1), BLOCK)


def digest_of(files: Iterable[File]) -> str:
    """`sha256:<hex>` over the files sorted by path; two folders with equal contents have equal digests."""
    rows = sorted([file.path, file.size, list(file.blocks)] for file in files)
    return "sha256:" + hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def scan(folder: Path) -> list[str]:
    """Relative paths of all files under `folder`, sorted. Raises InputError for symlinks, sockets and empty folders."""
    if not folder.is_dir():
        raise InputError(f"checkpoint: no folder {folder}; give the folder that holds the files")
    paths = []
    for entry in sorted(folder.rglob("*")):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise InputError(f"checkpoint: {entry} is not a regular file; put a copy of the file in its place")
        if entry.is_file():
            paths.append(entry.relative_to(folder).as_posix())
    paths = [path for path in paths if path != FILES]
    if not paths:
        raise InputError(f"checkpoint: {folder} holds no files")
    return paths


def chunks(handle: int, start: int, size: int) -> Iterator[bytes]:
    """The bytes of the block that begins at `start` in an open file of `size` bytes."""
    offset, stop = start, min(start + BLOCK, size)
    while offset < stop and (data := os.pread(handle, min(CHUNK, stop - offset), offset)):
        yield data
        offset += len(data)


def sha256_of(path: Path, start: int) -> str:
    """Hex sha256 of the block of a file that begins at `start`."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        for data in chunks(source.fileno(), start, path.stat().st_size):
            hasher.update(data)
    return hasher.hexdigest()


def dump_files(files: Iterable[File]) -> bytes:
    """The text of `ptl-files.json`."""
    rows = [asdict(file) for file in sorted(files, key=lambda file: file.path)]
    return json.dumps({"format": FORMAT, "block": BLOCK, "files": rows}, indent=1).encode()


def load_files(text: bytes, where: str) -> tuple[File, ...]:
    """Read `ptl-files.json`. Raises WorkError where it is damaged or names a path outside of its folder."""
    try:
        raw = json.loads(text)
        if (raw["format"], raw["block"]) != (FORMAT, BLOCK):
            raise ValueError(f"format {raw['format']} is not the one of this version of ptl, {FORMAT}")
        files = tuple(File(str(row["path"]), int(row["size"]), tuple(map(str, row["blocks"]))) for row in raw["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise WorkError(
            f"{where}: {FILES} is damaged ({error}); run the step that made this checkpoint again"
        ) from error
    for file in files:
        if not is_inside(file.path):
            raise WorkError(f"{where}: {FILES} names {file.path!r}, which is outside of the checkpoint; refused")
        if file.size < 0 or len(file.blocks) != len(starts(file.size)):
            raise WorkError(f"{where}: {FILES} has {len(file.blocks)} digests for {file.size} bytes; refused")
    if len({file.path for file in files}) != len(files):
        raise WorkError(f"{where}: {FILES} names a file twice; refused")
    return files


def is_inside(path: str) -> bool:
    """Whether a path from a manifest is a plain relative one: no `..`, no root, no backslash, nothing to normalize."""
    parts = path.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and PurePosixPath(path).as_posix() == path
    return plain and path != FILES and "\\" not in path and "\0" not in path


def verify(folder: Path, files: tuple[File, ...], where: str, on_progress: Progress = lambda _: None) -> None:
    """Compare a folder with its list: every file, none else, no symlinks, equal sizes and blocks; else WorkError."""
    names = {file.path for file in files}
    for entry in folder.rglob("*"):
        path = entry.relative_to(folder).as_posix()
        if entry.is_symlink():
            raise WorkError(f"{where}: {path} is a symlink; refused: a checkpoint holds regular files only")
        if not entry.is_dir() and path not in names and path != FILES:
            raise WorkError(f"{where}: {path} is not part of the checkpoint; remove it from {folder}")
    for file in files:
        found = folder / file.path
        if not found.is_file():
            raise WorkError(f"{where}: file {file.path} was deleted; restore it or run the step that made it again")
        size = found.stat().st_size
        if size != file.size:
            raise WorkError(wrong_size(where, file, size))

    def check(file: File, start: int) -> None:
        if sha256_of(folder / file.path, start) != file.blocks[start // BLOCK]:
            raise WorkError(wrong_digest(where, file))
        on_progress(min(BLOCK, file.size - start))

    with ThreadPoolExecutor(THREADS) as pool:
        for checked in [pool.submit(check, file, start) for file in files for start in starts(file.size)]:
            checked.result()


def wrong_size(where: str, file: File, size: int) -> str:
    """The message for a file that was cut off or replaced."""
    return (
        f"{where}: file {file.path} has {size} bytes, {file.size} were published; "
        "restore it or run the step that made this checkpoint again"
    )


def wrong_digest(where: str, file: File) -> str:
    """The message for a file whose bytes changed."""
    return (
        f"{where}: digest differs in file {file.path}: its bytes are not the ones that were published; "
        "restore it or run the step that made this checkpoint again"
    )
