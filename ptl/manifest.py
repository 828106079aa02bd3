"""The list of a checkpoint's files: sizes, sha256, and one digest over all of them. Readers trust nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from ptl.errors import InputError, WorkError

FILES = "ptl-files.json"  # lies beside the files it lists and is written after all of them
BLOCK = 4 << 20  # bytes hashed or copied at once

Progress = Callable[[int], None]  # called with the number of bytes just moved, from several threads


@dataclass(frozen=True)
class File:
    """One file of a checkpoint: `path` is relative with forward slashes, `size` in bytes, `sha256` in hex."""

    path: str
    size: int
    sha256: str


def digest_of(files: Iterable[File]) -> str:
    """`sha256:<hex>` over the files sorted by path; two folders with equal contents have equal digests."""
    rows = sorted([file.path, file.size, file.sha256] for file in files)
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


def sha256_of(path: Path, on_progress: Progress = lambda _: None) -> str:
    """Hex sha256 of a file, read in blocks."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        buffer = memoryview(bytearray(BLOCK))
        while count := source.readinto(buffer):
            hasher.update(buffer[:count])
            on_progress(count)
    return hasher.hexdigest()


def dump_files(files: Iterable[File]) -> bytes:
    """The text of `ptl-files.json`."""
    rows = [asdict(file) for file in sorted(files, key=lambda file: file.path)]
    return json.dumps({"format": 1, "files": rows}, indent=1).encode()


def load_files(text: bytes, where: str) -> tuple[File, ...]:
    """Read `ptl-files.json`. Raises WorkError where it is damaged or names a path outside of its folder."""
    try:
        raw = json.loads(text)
        files = tuple(File(str(row["path"]), int(row["size"]), str(row["sha256"])) for row in raw["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise WorkError(
            f"{where}: {FILES} is damaged ({error}); run the step that made this checkpoint again"
        ) from error
    for file in files:
        if not is_inside(file.path):
            raise WorkError(f"{where}: {FILES} names {file.path!r}, which is outside of the checkpoint; refused")
    if len({file.path for file in files}) != len(files):
        raise WorkError(f"{where}: {FILES} names a file twice; refused")
    return files


def is_inside(path: str) -> bool:
    """Whether a path from a manifest is a plain relative one: no `..`, no root, no backslash, nothing to normalize."""
    parts = path.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and PurePosixPath(path).as_posix() == path
    return plain and path != FILES and "\\" not in path and "\0" not in path


def verify(folder: Path, files: tuple[File, ...], where: str, on_progress: Progress = lambda _: None) -> None:
    """Compare a folder with its list: every file, none else, no symlinks, equal sizes and sha256; else WorkError."""
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
        if sha256_of(found, on_progress) != file.sha256:
            raise WorkError(wrong_digest(where, file))


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
