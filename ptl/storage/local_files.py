"""Checkpoints as files: a list or a record appears complete, by a rename or a hard link; a kill leaves none of it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ptl.errors import InputError, WorkError
from ptl.storage.manifest import FILES, THREADS, Files, Progress, verify

COMPLETE = "ptl-complete"  # marks a training checkpoint of the Trainer as written to its end
# a full disk, an exceeded quota, a file size limit
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# No hard link can be made: the name is taken, or not here at all
NO_LINK = {errno.EEXIST, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def path_of(uri: str) -> Path:
    """The path of a `file://` URI; a plain absolute path is one too."""
    parts = urlsplit(uri)
    # Only a URI encodes characters: a plain path may hold a percent sign.
    path = Path(unquote(parts.path) if parts.scheme else uri)
    if parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise InputError(
            f"{uri!r} is not an absolute path", field="store", remedy="write file:///folder"
        )
    return path


def upload(folder: Path, location: str, paths: list[str], on_progress: Progress) -> None:
    """Copy these files of a folder, and flush everything to disk; an error leaves nothing of them."""
    target = path_of(location)

    def copy(path: str) -> None:
        new_file = target / path
        new_file.parent.mkdir(parents=True, exist_ok=True)
        # The copy has the umask's mode, whatever the mode of the source.
        shutil.copyfile(folder / path, new_file)
        _sync(new_file)
        on_progress(new_file.stat().st_size)

    with full_disk(target):
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(copy, paths))
            # After a power failure the names must be there as well as the bytes.
            for path, _, _ in os.walk(target):
                _sync(Path(path))
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise


def fetch(uri: str, files: Files, cache: Path, name: str, on_progress: Progress) -> Path:
    """Verify the folder and return it as it is: nothing is copied, `cache` is not used."""
    # Every time: a disk may lose a byte between two steps.
    folder = path_of(uri)
    verify(folder, files, name, on_progress)
    return folder


def read(uri: str) -> bytes | None:
    """The bytes of a small file, or None where there is none."""
    try:
        return path_of(uri).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def put_once(uri: str, data: bytes) -> bytes:
    """Write a file unless it exists, in one step; returns what the file holds now, which may be another writer's."""
    path = path_of(uri)
    with full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Complete under another name first: a reader sees all of it or nothing.
        with _draft(path, data) as draft:
            # A hard link fails when the name is taken: in one step, also on other machines that share the folder.
            try:
                os.link(draft, path)
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                # A file system without hard links: the one writer that a step normally has is still safe.
                if not path.exists():
                    draft.rename(path)
            _sync(path.parent)
    return path.read_bytes()


def put(uri: str, data: bytes) -> None:
    """Write a small file completely or not at all, whatever was there."""
    path = path_of(uri)
    with full_disk(path):
        replace(path, data)


def replace(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a small file completely or not at all, whatever it held before."""
    with _draft(path, data, mode) as draft:
        draft.replace(path)
        _sync(path.parent)


def walk(uri: str) -> Iterator[tuple[str, int, float]]:
    """Path below `uri`, size in bytes and time of change of every file there; nothing where there is no folder."""
    folder = path_of(uri)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with suppress(FileNotFoundError):  # a step that is at work removes its drafts
                stat = path.lstat()
                yield path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime


def delete(uri: str, below: str) -> None:
    """Remove a folder, the list of its files first: a reader then sees no checkpoint instead of half of one.

    Raises WorkError where a symlink leads out of the folder `below`.
    """
    folder = path_of(uri)
    # The caller has checked the names; what they lead to is checked here.
    if folder.is_symlink() or path_of(below).resolve() not in folder.resolve().parents:
        raise WorkError(
            f"{folder} is not below {below}",
            field="store",
            remedy="nothing was deleted: remove the symlink",
        )
    # A kill in the middle leaves files that no reader takes for a checkpoint.
    (folder / FILES).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def check(root: str) -> None:
    """Raise InputError when the root cannot be written."""
    path = path_of(root)
    # Writing is the only proof: permissions alone do not tell of a read-only mount.
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}",
            field="store",
            remedy="make it writable or choose another",
        ) from error


def mark_complete(folder: Path) -> None:
    """Mark a training checkpoint as written to its end, after its bytes: the power may fail at any time."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    (folder / COMPLETE).touch()
    _sync(folder)


def last_complete(scratch: Path) -> Path | None:
    """The newest training checkpoint that was written to its end; a kill may have left later ones half-written."""
    # each is marked after all processes have written their parts
    complete = [mark.parent for mark in scratch.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The optimizer step in a training checkpoint's name."""
    _, _, step = folder.name.rpartition("-")
    return int(step)


def no_space(error: OSError) -> WorkError:
    """What to do about a full disk, an exceeded quota or a file size limit (`errno` in FULL)."""
    path = str(error.filename or "")
    temporary = os.environ.get("TMPDIR") or tempfile.gettempdir()
    remedy = "free some and run the same command again: earlier checkpoints are intact"
    # A write to an open file names none, and most of those that libraries write are temporary.
    if not path or path.startswith(temporary):
        remedy += (
            f"; or set TMPDIR to a folder on another disk (temporary files are in {temporary})"
        )
    return WorkError(
        f"no space left while writing {path or 'a file'}: {error.strerror}", remedy=remedy
    )


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Let a full disk be an error that names `path` (see `no_space`)."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise no_space(OSError(error.errno, error.strerror, str(path))) from error


def copy_tree(folder: Path, target: Path, *left_out: str) -> None:
    """Copy a folder but for files of these names; shutil alone would report a full disk as text."""

    def copy(file: str, copied: str) -> str:
        with full_disk(Path(copied)):
            return shutil.copy2(file, copied)

    ignored = shutil.ignore_patterns(*left_out)
    shutil.copytree(folder, target, ignore=ignored, copy_function=copy, dirs_exist_ok=True)


@contextmanager
def _draft(path: Path, data: bytes, mode: int = 0o666) -> Iterator[Path]:
    """The data under a name of this writer alone, in the same folder: a rename or a link from it is one step."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.touch(mode)  # before any byte of it, which may be secret
    try:
        draft.write_bytes(data)
        _sync(draft)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
