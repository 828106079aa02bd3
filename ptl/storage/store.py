"""Checkpoints: published under a fresh prefix, committed by one small record written last, verified on every read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from ptl.errors import InputError, WorkError
from ptl.storage.manifest import (
    FILES,
    Files,
    Progress,
    digest_of,
    dump_files,
    hash_files,
    load_files,
    scan,
)

FORMAT = 3  # of a record
WITHDRAWN = b"{}"  # in place of a record
T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Pointer:
    """What travels between steps instead of weights."""

    uri: Annotated[str, Field(min_length=1)]  # folder of the files: file:///... or s3://...
    # Over the sorted list of (path, size, sha256 of blocks).
    digest: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
    params: int = 0
    original_params: int = 0  # of the imported dense model; prune's goals are computed from it
    parent_digest: str = ""
    run_id: str = ""  # MLflow run that made it
    model_id: str = ""  # MLflow LoggedModel
    model_version: str = ""  # version in the registry, when registered
    # gate state that travels with an accepted model
    gate: dict[str, Any] = field(default_factory=dict)
    step: str = ""  # that made it
    # widths to end with, by the first prune step
    chosen: dict[str, int] = field(default_factory=dict)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def dump(self) -> str:
        """JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def load(text: str) -> Pointer:
        """Read JSON. Raises InputError for anything that is not a pointer, naming the field."""
        # Strict: True is an int for Python, and never one in a pointer.
        try:
            return TypeAdapter(Pointer).validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                first["msg"],
                field=".".join(["pointer", *map(str, first["loc"])]),
                remedy="give the artifact of an earlier step, of this version of ptl",
            ) from error


@dataclass(frozen=True)
class Record:
    """What a step has committed: nothing else says that it is done."""

    key: str  # digest of all that the result depends on
    pointer: Pointer  # to the files
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON: the report of the step's work
    step: str = ""  # that committed it
    version: str = ""  # of ptl
    # local file -> what changes with its content
    files: dict[str, str] = field(default_factory=dict)
    # a later step could not fetch the files: it counts as not committed until they are repaired
    damaged: bool = False


def pointer_of(mapping: Any) -> Pointer:
    """A pointer from a mapping, as it stands in a record. Raises InputError naming the wrong field."""
    return Pointer.load(json.dumps(mapping))


def publish(folder: Path, location: str, *, on_progress: Progress | None = None) -> Files:
    """Upload all files of `folder` under `location`, then the list of them (`ptl-files.json`) last.

    `location` is a fresh prefix for every attempt: what a killed attempt leaves there is never read. The digest for the
    pointer is `digest_of` the files returned. `on_progress` gets byte counts; by default a progress bar is shown on a
    terminal. Raises WorkError for symlinks, an empty folder, a full disk or a failing server.
    """
    paths = scan(folder)
    if not paths:
        raise WorkError(f"{folder} holds no files")
    backend = _backend(location)
    # A prefix that is used twice could mix the files of two attempts.
    if next(backend.walk(location), None) is not None:
        raise WorkError(f"{location} already holds files", field="store")
    num_bytes = sum((folder / path).stat().st_size for path in paths)
    with _bar("publish", num_bytes, on_progress) as progress, ThreadPoolExecutor(1) as pool:
        # Hashed while they are uploaded.
        hashing = pool.submit(hash_files, folder, paths)
        backend.upload(folder, location.rstrip("/"), paths, progress)
        files = hashing.result()
        # Last: where the list is, all files are.
        backend.put(f"{location.rstrip('/')}/{FILES}", dump_files(files))
    return files


def fetch(pointer: Pointer, cache: Path, *, on_progress: Progress | None = None) -> Path:
    """The folder of a checkpoint, every file verified against the pointer's digest.

    `file://` returns the folder itself: do not write there. `s3://` downloads into `cache/<hex>/` and takes a complete
    earlier download from there. Raises WorkError naming the checkpoint, the file and the remedy.
    """
    # What messages call it.
    name = f"checkpoint {pointer.uri}"
    if pointer.run_id:
        name += f" of run {pointer.run_id}"
    uri = pointer.uri.rstrip("/")
    files = _twice(lambda: _listed_files(pointer, uri, name))
    # By the digest: whatever names the same files finds them.
    target = cache / pointer.digest.removeprefix("sha256:")
    num_bytes = sum(file.size for file in files)
    with _bar("fetch", num_bytes, on_progress) as progress:
        return _backend(uri).fetch(uri, files, target, name, progress)


def _listed_files(pointer: Pointer, uri: str, name: str) -> Files:
    """The files of a checkpoint, by the list whose digest the pointer has."""
    # The digest is over this list, and the list has those of all blocks.
    listing = read(f"{uri}/{FILES}")
    files = () if listing is None else load_files(listing, name)
    if digest_of(files) != pointer.digest:
        what = (
            "is gone: it was deleted or never completely published"
            if listing is None
            else "was replaced: digest differs"
        )
        raise WorkError(f"{name} {what}", remedy="restore it, or start a new run to make it again")
    return files


def commit(root: str, run: str, step: str, record: Record) -> Record:
    """Write a step's record, unless there is one of the same key: returns the one that stays, ours or an earlier one.

    One of another key, or of damaged files, is replaced.
    """
    record = replace(record, step=step)
    uri = _manifest(root, run, step)
    # One atomic write decides: of two processes that did the step, both continue with the same record.
    kept = _load_record(_backend(root).put_once(uri, _seal(record)), uri, step)
    if kept is not None and kept.key == record.key and not kept.damaged:
        return kept
    # Here two processes may both write: the last one stays, and both return it unless they write at the same moment.
    _backend(root).put(uri, _seal(record))
    return committed(root, run, step, record.key) or record


def withdraw(root: str, run: str, step: str) -> None:
    """Let a step count as not done, where it has a record: what it depends on has changed."""
    # Not deleted: the credentials of a cluster's steps may not do that.
    uri = _manifest(root, run, step)
    if read(uri) is not None:
        _backend(root).put(uri, WITHDRAWN)


def mark_damaged(root: str, run: str, pointer: Pointer) -> None:
    """Let the step that made these files verify or repair them when it is started again."""
    record = committed(root, run, pointer.step)
    if record is not None and record.pointer.digest == pointer.digest:
        _backend(root).put(_manifest(root, run, pointer.step), _seal(replace(record, damaged=True)))


def committed(root: str, run: str, step: str, key: str | None = None) -> Record | None:
    """The record of a finished step, or None; with `key`, only one that has it. Its files may be `damaged`."""
    uri = _manifest(root, run, step)
    record = _twice(lambda: _load_record(read(uri), uri, step))
    return record if record and key in (None, record.key) else None


def claim(root: str, run: str, name: str, value: str) -> str:
    """The first value that any process claimed for `name` in a run: one winner among concurrent callers."""
    return _backend(root).put_once(f"{_uri(root, run, name)}.claim", value.encode()).decode()


def read(uri: str) -> bytes | None:
    """The bytes of one small file, or None where there is none."""
    return _backend(uri).read(uri)


def check(root: str) -> None:
    """Ask the store whether it can be used, before any work: credentials, endpoint, bucket. Raises InputError."""
    _backend(root).check(root)


def walk(uri: str) -> Iterator[tuple[str, int, float]]:
    """Path below `uri`, size in bytes and time of change (unix) of every file there; in no order."""
    return _backend(uri).walk(uri)


def delete(uri: str, *, below: str) -> None:
    """Remove a folder with all its files, which must be below the folder `below`; one that is gone is no error.

    Records and MLflow say which folder, and others may have written those: raises WorkError for any other URI.
    """
    if not is_below(uri, below):
        raise WorkError(
            f"{uri!r} is not a plain folder below {below}",
            field="store",
            remedy="nothing was deleted: who wrote that URI?",
        )
    _backend(uri).delete(uri, below)


def is_below(uri: str, root: str) -> bool:
    """Whether a URI begins with `root` and continues with plain names: no `..`, nothing empty, nothing encoded."""
    folder = root.rstrip("/") + "/"
    if not uri.startswith(folder):
        return False
    return all(is_name(name) for name in uri.removeprefix(folder).split("/"))


def is_name(name: str) -> bool:
    """Whether a run or a step may have this name."""
    return _NAME.fullmatch(name) is not None


def _backend(uri: str) -> ModuleType:
    """The module for a URI's scheme."""
    # Imported here: on a local disk nothing needs boto3.
    scheme = uri.partition(":")[0]
    if scheme == "file" or uri.startswith("/"):
        from ptl.storage import local_files

        return local_files
    if scheme == "s3":
        from ptl.storage import s3

        return s3
    # An MLflow server that proxies artifacts gives addresses of its own, which no step can read.
    location = "--no-serve-artifacts --default-artifact-root s3://bucket/folder (or file:///folder)"
    raise InputError(
        f"{uri!r} is neither file:// nor s3://",
        field="store",
        remedy=f"start the MLflow server with {location}, then use a new experiment",
    )


def _manifest(root: str, run: str, step: str) -> str:
    """The URI of a step's record."""
    return f"{_uri(root, run, step)}/manifest.json"


def _uri(root: str, run: str, name: str) -> str:
    """The URI of something that a run keeps beside its checkpoints."""
    return f"{root.rstrip('/')}/{check_name('run', run)}/{check_name('step', name)}"


def check_name(kind: str, name: str) -> str:
    """The name, which may come from a user: it must not lead out of the root."""
    if not is_name(name):
        raise InputError(
            f"{name!r} must be 1-128 letters, digits, dots, dashes or underscores", field=kind
        )
    return name


def _seal(record: Record) -> bytes:
    """A record's bytes, with a digest: one that a disk or a person has changed is found when it is read."""
    fields = {**asdict(record), "format": FORMAT}
    return json.dumps({**fields, "sha256": digest(fields)}, indent=1).encode()


def _load_record(data: bytes | None, uri: str, step: str) -> Record | None:
    """A record from its bytes, None where there are none or it was withdrawn; what cannot be trusted is a WorkError."""
    if data is None or data == WITHDRAWN:
        return None
    try:
        fields = dict(json.loads(data))
        if fields.pop("sha256") != digest(fields):
            raise ValueError("digest differs: its bytes are not the ones that were committed")
        # An intact record may still be one of another version, or copied from another step.
        if (fields.pop("format"), fields["step"], type(fields["key"])) != (FORMAT, step, str):
            raise ValueError(f"not a record of step {step} in format {FORMAT}")
        return Record(**{**fields, "pointer": pointer_of(fields["pointer"])})
    except (ValueError, KeyError, TypeError, InputError) as error:
        remedy = f"delete {uri} and run the same command again to redo this step"
        raise WorkError(f"damaged ({error})", field=uri, remedy=remedy) from error


def digest(value: Any) -> str:
    """Hex sha256 over a value as JSON; sections of the config may be in it."""
    text = json.dumps(value, sort_keys=True, default=to_jsonable_python)
    return hashlib.sha256(text.encode()).hexdigest()


def _twice(read_and_check: Callable[[], T]) -> T:
    """What is read and checked; a failed check has it read once more, since a byte may have changed on its way."""
    try:
        return read_and_check()
    except WorkError:
        return read_and_check()


@contextmanager
def _bar(title: str, total: int, on_progress: Progress | None) -> Iterator[Progress]:
    """What counts the bytes: the caller's own, or a progress bar."""
    # Training checkpoints are stored beside the training, whose own bar is on the terminal.
    if on_progress is not None:
        yield on_progress
        return
    from tqdm import tqdm

    # disable=None: a bar on a terminal, nothing in a pod's log.
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update
