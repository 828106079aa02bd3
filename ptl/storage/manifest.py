"""The list of a checkpoint's files: sizes, sha256 of their blocks, one digest over all. Readers trust nothing else."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ptl.errors import WorkError

FILES = "ptl-files.json"  # next to the files that it lists, and written after all of them
# MLflow writes it into a folder from which it loads a registered version
MLFLOW_META = "registered_model_meta"
FORMAT = 2  # of the list
BLOCK = 16 << 20  # bytes that one sha256 covers; part of the format
THREADS = 8  # blocks at once

REMAKE = "run the step that made this checkpoint again"

# called with the number of bytes just moved, from several threads
Progress = Callable[[int], object]


@dataclass(frozen=True)
class File:
    """One file of a checkpoint.

    Each block of BLOCK bytes (the last one may be shorter) has a digest of its own, so that the blocks of a large file
    are checked side by side. An empty file has one empty block.
    """

    path: str  # relative, with forward slashes
    size: int  # bytes
    blocks: tuple[str, ...]  # hex sha256 of each


Files = tuple[File, ...]


def silent(_: int) -> None:
    """No progress is shown."""


def digest_of(files: Iterable[File]) -> str:
    """`sha256:<hex>` over the files sorted by path; two folders with equal contents have equal digests."""
    rows = sorted([file.path, file.size, list(file.blocks)] for file in files)
    # One spelling of each list, byte for byte.
    text = json.dumps(rows, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def scan(folder: Path) -> list[str]:
    """Relative paths of all files under `folder`, sorted. Raises WorkError for symlinks and the like."""
    paths = []
    for entry in sorted(folder.rglob("*")):
        path = entry.relative_to(folder).as_posix()
        # What a link leads to may change, or be on no other machine.
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise WorkError(
                f"{path} is not a regular file",
                field=str(folder),
                remedy="put a copy of it in its place",
            )
        if entry.is_file() and path not in (FILES, MLFLOW_META):
            paths.append(path)
    return paths


def hash_files(folder: Path, paths: Iterable[str], on_progress: Progress = silent) -> Files:
    """Sizes and digests of these files of a folder; `on_progress` gets the bytes of each block."""

    def hash_block(path: str, start: int) -> str:
        with (folder / path).open("rb") as source:
            source.seek(start)
            data = source.read(BLOCK)
        on_progress(len(data))
        return hashlib.sha256(data).hexdigest()

    # hashlib releases the interpreter's lock for large data, so that threads serve.
    hashing = []
    with ThreadPoolExecutor(THREADS) as pool:
        for path in paths:
            size = (folder / path).stat().st_size
            starts = range(0, max(size, 1), BLOCK)
            blocks = [pool.submit(hash_block, path, start) for start in starts]
            hashing.append((path, size, blocks))
    return tuple(
        File(path, size, tuple(block.result() for block in blocks))
        for path, size, blocks in hashing
    )


def file_digest(path: Path) -> str:
    """Hex sha256 of a whole file; a process reads the file once, unless it changes."""
    stat = path.stat()
    return _file_digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _file_digest(path: Path, *_stamps: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_files(files: Iterable[File]) -> bytes:
    """The text of `ptl-files.json`."""
    # In one order, so that equal folders have equal lists.
    rows = [asdict(file) for file in sorted(files, key=lambda file: file.path)]
    return json.dumps({"format": FORMAT, "block": BLOCK, "files": rows}, indent=1).encode()


def load_files(text: bytes, name: str) -> Files:
    """Read `ptl-files.json`. Raises WorkError where it is damaged or names a path outside of its folder.

    `name` is what messages call the checkpoint.
    """
    from pydantic import TypeAdapter

    try:
        listing = json.loads(text)
        # Other blocks have other digests: an old list cannot be compared with files.
        version, block = listing["format"], listing["block"]
        if (version, block) != (FORMAT, BLOCK):
            raise ValueError(f"format {version} is not the one of this version of ptl, {FORMAT}")
        files = TypeAdapter(Files).validate_python(listing["files"])
        # Others may have written the list: a reader must not leave the folder.
        for file in files:
            if not _is_inside(file.path):
                raise ValueError(f"{file.path!r} is outside of the checkpoint")
    except (ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{FILES} is damaged ({error})", field=name, remedy=REMAKE) from error
    return files


def _is_inside(path: str) -> bool:
    """Whether a path from a manifest is a plain relative one: no `..`, no root, no backslash, nothing to normalize."""
    if path == FILES or "\\" in path or "\0" in path:
        return False
    # An absolute path begins with an empty part, and a doubled slash is one.
    return not {"", ".", ".."} & set(path.split("/"))


def verify(folder: Path, files: Files, name: str, on_progress: Progress = silent) -> None:
    """Compare a folder with its list: every file, none else, no symlinks, equal sizes and blocks; else WorkError.

    `name` is what messages call the checkpoint.
    """

    def refusal(problem: str, remedy: str = f"restore it or {REMAKE}") -> WorkError:
        return WorkError(problem, field=name, remedy=remedy)

    paths = [file.path for file in files]
    present = scan(folder)
    for path in set(present).symmetric_difference(paths):
        if path in present:
            raise refusal(f"{path} is not part of the checkpoint", f"remove it from {folder}")
        raise refusal(f"file {path} was deleted")
    # What is cheap to see comes first: sizes, before any byte is read.
    for file in files:
        size = (folder / file.path).stat().st_size
        if size != file.size:
            raise refusal(f"file {file.path} has {size} bytes, {file.size} were published")
    for file, actual in zip(files, hash_files(folder, paths, on_progress), strict=True):
        if actual != file:
            raise refusal(
                f"digest differs in file {file.path}: its bytes are not the ones that were published"
            )
