"""Training checkpoints that outlive the machine: a few of them are kept in the store while a step trains."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptl import store
from ptl.manifest import FILES
from ptl.store import Pointer
from ptl.training_files import COMPLETE, last_complete, step_of

NUM_KEPT = 2  # newest checkpoints whose files stay in the store


@dataclass
class TrainingCheckpoints:
    """Those of one stage of one step."""

    root: str  # of the store
    run: str
    name: str  # of the step and stage
    key: str  # of all that the result depends on, as for steps
    minutes: float  # between two checkpoints in the store; 0: every one
    last_saved: float | None = None  # time.monotonic(); of the first checkpoint until one is saved

    def save_if_due(self, folder: Path) -> None:
        """Store a complete training checkpoint if the interval has passed."""
        now = time.monotonic()
        if self.last_saved is None:
            self.last_saved = now
        if now - self.last_saved < self.minutes * 60:
            return
        save(self, folder)
        self.last_saved = time.monotonic()

    def restore(self, scratch: Path) -> None:
        """Fetch the newest stored checkpoint when this machine has none that is newer."""
        restore(self, scratch)


def save(checkpoints: TrainingCheckpoints, folder: Path) -> None:
    """Publish a folder and commit it as the next checkpoint; the files of older ones go, their records stay."""
    stored = records(checkpoints)
    slot = _slot(checkpoints, len(stored))
    # a name of its own, for a save that a kill ended before its record
    location = f"{_run_folder(checkpoints)}/{slot}-{uuid.uuid4().hex[:12]}"
    files = store.publish(folder, location, on_progress=lambda _: None)
    pointer = Pointer(location, store.digest_of(files))
    record = {"key": checkpoints.key, "pointer": asdict(pointer), "metadata": {"folder": folder.name}}
    store.commit(checkpoints.root, checkpoints.run, slot, record)
    num_outdated = len(stored) + 1 - NUM_KEPT
    for number in range(num_outdated):
        _delete_files(checkpoints, number, stored[number])


def restore(checkpoints: TrainingCheckpoints, scratch: Path) -> None:
    """Put the newest stored checkpoint into `scratch`, unless a complete one there is as new."""
    stored = records(checkpoints)
    if not stored:
        return
    newest = stored[-1]
    target = scratch / newest["metadata"]["folder"]
    local = last_complete(scratch)
    if local is not None and step_of(local) >= step_of(target):
        return
    fetched = scratch / "fetched"
    folder = store.fetch(Pointer(**newest["pointer"]), fetched, on_progress=lambda _: None)
    shutil.rmtree(target, ignore_errors=True)  # what a kill left half-written
    # complete by one rename
    partial = scratch / f".{os.getpid()}.{target.name}"
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(FILES))
    partial.rename(target)
    assert (target / COMPLETE).is_file()
    shutil.rmtree(fetched, ignore_errors=True)


def records(checkpoints: TrainingCheckpoints) -> list[dict[str, Any]]:
    """The records of the checkpoints stored so far, oldest first."""
    stored: list[dict[str, Any]] = []
    while True:
        slot = _slot(checkpoints, len(stored))
        record = store.committed(checkpoints.root, checkpoints.run, slot, checkpoints.key)
        if record is None:
            return stored
        stored.append(record)


def clear(checkpoints: TrainingCheckpoints) -> None:
    """Remove all training checkpoints of a stage, after its step has been committed."""
    stored = records(checkpoints)
    folder = _run_folder(checkpoints)
    # the newest first: `records` ends at the first gap
    for number in reversed(range(len(stored))):
        _delete_files(checkpoints, number, stored[number])
        store.delete(f"{folder}/{_slot(checkpoints, number)}", below=folder)


def _delete_files(checkpoints: TrainingCheckpoints, number: int, record: dict[str, Any]) -> None:
    """Delete the files of a checkpoint: of its record only the name counts, and that must be one which `save` gives."""
    folder = _run_folder(checkpoints)
    name = record["pointer"]["uri"].rpartition("/")[2]
    slot = re.escape(_slot(checkpoints, number))
    if re.fullmatch(rf"{slot}-[0-9a-f]{{12}}", name):
        store.delete(f"{folder}/{name}", below=folder)


def _run_folder(checkpoints: TrainingCheckpoints) -> str:
    """What a run keeps beside its checkpoints: records of steps, and training checkpoints with theirs."""
    root = checkpoints.root.rstrip("/")
    return f"{root}/{checkpoints.run}"


def _slot(checkpoints: TrainingCheckpoints, number: int) -> str:
    return f"{checkpoints.name}.training-{number}"


def key_of(*parts: Any) -> str:
    """A digest of all that a result depends on: plain values and sections of the config."""
    text = json.dumps(parts, sort_keys=True, default=_section_values)
    return hashlib.sha256(text.encode()).hexdigest()


def _section_values(section: Any) -> Any:
    return section.model_dump(mode="json")
