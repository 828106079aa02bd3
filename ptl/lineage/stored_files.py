"""Folders of checkpoints in the store: whose they are, how large and how old."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ptl.storage import store
from ptl.storage.store import Record

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

Records = dict[str, Record]  # of one run, by the step's name

# By the stage of the step that committed it
KINDS = {"import": "dense", "prune": "pruned", "recover": "recovered", "export": "exported"}
_TRAINING = re.compile(
    r"(?P<step>.+)\.(?P<stage>\d+)\.training-(?P<number>\d+|result)(?P<attempt>-[0-9a-f]{12})?(\.partial)?"
)


@dataclass(frozen=True)
class StoredFiles:
    """Files in the store that belong together: a checkpoint, what a killed attempt left, or training checkpoints."""

    run: str  # id of the pipeline run
    step: str  # name, such as prune-2
    kind: str  # one of KINDS: committed by the step; attempt: not committed; training
    uris: tuple[str, ...]  # the folders, in the order in which they are to be deleted
    bytes: int
    changed: float  # unix time of the newest file
    model_id: str = ""  # MLflow LoggedModel, where MLflow has it
    version: str = ""  # registered model and version, where it is registered


class Folder(NamedTuple):
    """All files below one folder."""

    bytes: int
    changed: float  # unix time of the newest file


class _Owner(NamedTuple):
    """A step that a checkpoint belongs to; several runs may name the same files."""

    run: str
    step: str
    kind: str


NO_FILES = Folder(0, 0.0)


def folders(uri: str, depth: int) -> dict[str, Folder]:
    """The folders that are `depth` levels below `uri`, by their path from there; from one listing."""
    by_path: dict[str, Folder] = {}
    for path, size, changed in store.walk(uri):
        folder_path = "/".join(path.split("/")[:depth])
        known = by_path.get(folder_path, NO_FILES)
        by_path[folder_path] = Folder(known.bytes + size, max(known.changed, changed))
    return by_path


def checkpoints(
    location: str,
    models: list[LoggedModel],
    records: dict[str, Records],
    model_folders: dict[str, Folder],
) -> list[StoredFiles]:
    """Every checkpoint that a record names or that MLflow knows, unless its files are gone.

    `location` is the experiment's, `models` its LoggedModels, `records` those of all its runs.
    """
    models_by_uri = {model.artifact_location: model for model in models}
    stored = []
    for uri, owners in _owners(records, models).items():
        name = _folder_name(uri, location)
        if name is None:
            continue
        model = models_by_uri.get(uri)
        folder = model_folders.get(name, NO_FILES)
        for owner in owners:
            changed = folder.changed
            if owner.kind == "attempt" and model:
                # It may be at work without having written yet.
                changed = max(changed, model.last_updated_timestamp / 1000)
            elif not folder.bytes:  # deleted before
                continue
            files = StoredFiles(
                run=owner.run,
                step=owner.step,
                kind=owner.kind,
                uris=(uri, f"{uri}.partial"),
                bytes=folder.bytes,
                changed=changed,
                model_id=model.model_id if model else "",
            )
            stored.append(files)
    return stored


def _owners(records: dict[str, Records], models: list[LoggedModel]) -> dict[str, list[_Owner]]:
    """Who needs the files at a URI: the steps whose records name it, and the attempts that MLflow knows."""
    owners: dict[str, list[_Owner]] = defaultdict(list)
    committed_ids = set()
    for run, steps in records.items():
        for step, record in steps.items():
            pointer = record.pointer
            committed_ids.add(pointer.model_id)
            stage = record.metadata["stage"]
            # Evaluations and the report pass on what others have made.
            if stage in KINDS:
                owners[pointer.uri].append(_Owner(run, step, KINDS[stage]))
    for model in models:
        uri = model.artifact_location
        run = model.tags["ptl.run"]
        # Of a store that was moved, the record names the address before the move.
        moved = uri not in owners and model.model_id in committed_ids
        committed = run in [owner.run for owner in owners[uri]]
        if not moved and not committed:
            owners[uri].append(_Owner(run, model.tags.get("ptl.step", model.name), "attempt"))
    return owners


def _folder_name(uri: str, location: str) -> str | None:
    """The name of a folder of the form that MLflow gives models of this experiment; None for any other URI.

    Such a one is not ours to judge: of a store that was moved, records name the old location, which others may use, and
    a forged record names what it likes.
    """
    pattern = re.escape(location) + r"/models/([^/]+)/artifacts"
    match = re.fullmatch(pattern, uri)
    # The name may be `..`, which the pattern allows.
    if match is None or not store.is_below(uri, location):
        return None
    return match[1]


def training_checkpoints(
    root: str,
    run: str,
    finished: frozenset[str],
    names: list[str],
    run_folders: dict[str, Folder],
) -> Iterator[StoredFiles]:
    """Training checkpoints: those of a finished step together; of others, what a kill left half-written apart.

    `names` are those of the run's folders below `root`, `run_folders` are keyed by run and name.
    """
    matches = [match for match in map(_TRAINING.fullmatch, names) if match]
    # As steps clear them: the newest first, files before their record.
    matches.sort(key=_training_order, reverse=True)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for match in matches:
        name, step = match.string, match["step"]
        # A step that is not finished may resume from what is complete.
        alone = step not in finished and _is_half_written(match, names)
        groups[step, name if alone else ""].append(name)
    for (step, attempt), members in groups.items():
        group = [run_folders[f"{run}/{name}"] for name in members]
        yield StoredFiles(
            run=run,
            step=step,
            kind="attempt" if attempt else "training",
            uris=tuple(f"{root}/{run}/{name}" for name in members),
            bytes=sum(folder.bytes for folder in group),
            changed=max(folder.changed for folder in group),
        )


def _is_half_written(match: re.Match[str], names: list[str]) -> bool:
    """Whether files of a training checkpoint have no record, which is written last."""
    record_name = match.string.rpartition("-")[0]
    return match.string.endswith(".partial") or bool(match["attempt"] and record_name not in names)


def _training_order(match: re.Match[str]) -> tuple[int, int, bool]:
    """Stage, number, and files after their record."""
    number = match["number"]
    return int(match["stage"]), sys.maxsize if number == "result" else int(number), bool(match["attempt"])
