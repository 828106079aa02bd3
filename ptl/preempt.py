"""Training checkpoints that outlive the machine: a few of them lie in the store while a step trains."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ptl import store
from ptl.manifest import FILES
from ptl.store import Pointer

COMPLETE = "ptl-complete"  # marks a training checkpoint that was written to its end
KEPT = 2  # newest checkpoints whose files stay in the store


@dataclass
class Vault:
    """Where the training checkpoints of one stage of one step lie."""

    root: str
    run: str
    name: str  # of the step and stage
    key: str  # of what the result depends on, as for steps
    minutes: float  # between two checkpoints in the store; 0: every one
    last: float = 0.0  # when the last one went there, time.monotonic()

    def offer(self, folder: Path) -> None:
        """Store a complete training checkpoint if the interval has passed."""
        if self.last == 0.0:
            self.last = time.monotonic() - (0 if self.minutes else 1)
        if time.monotonic() - self.last < self.minutes * 60:
            return
        save(self, folder)
        self.last = time.monotonic()

    def restore(self, scratch: Path) -> None:
        """Fetch the newest stored checkpoint when this machine has none that is newer."""
        restore(self, scratch)


def save(vault: Vault, folder: Path) -> None:
    """Publish a folder and commit it as the next checkpoint; the files of older ones go, their records stay."""
    found = records(vault)
    location = f"{_folder(vault)}/{_slot(vault, len(found))}-{uuid.uuid4().hex[:12]}"
    files = store.publish(folder, location, on_progress=lambda _: None)
    pointer = Pointer(location, store.digest_of(files))
    record = {"key": vault.key, "pointer": asdict(pointer), "metadata": {"folder": folder.name}}
    store.commit(vault.root, vault.run, _slot(vault, len(found)), record)
    for number, old in enumerate(found[: len(found) + 1 - KEPT]):
        _delete_files(vault, number, old)


def restore(vault: Vault, scratch: Path) -> None:
    """Put the newest stored checkpoint under `scratch`, unless a complete one there is as new."""
    found = records(vault)
    if not found:
        return
    target = scratch / found[-1]["metadata"]["folder"]
    here = last_complete(scratch)
    if here is not None and step_of(here) >= step_of(target):
        return
    folder = store.fetch(Pointer(**found[-1]["pointer"]), scratch / "fetched", on_progress=lambda _: None)
    shutil.rmtree(target, ignore_errors=True)  # what a kill left half-written
    partial = scratch / f".{os.getpid()}.{target.name}"
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(FILES))
    partial.rename(target)
    assert (target / COMPLETE).is_file()
    shutil.rmtree(scratch / "fetched", ignore_errors=True)


def last_complete(scratch: Path) -> Path | None:
    """The newest training checkpoint that was written to its end; what a kill left half-written is passed over."""
    found = [path.parent for path in scratch.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The optimizer step in a training checkpoint's name."""
    return int(folder.name.split("-")[-1])


def records(vault: Vault) -> list[dict[str, Any]]:
    """The records of the checkpoints stored so far, oldest first."""
    found: list[dict[str, Any]] = []
    while (record := store.committed(vault.root, vault.run, _slot(vault, len(found)), vault.key)) is not None:
        found.append(record)
    return found


def clear(vault: Vault, stages: int) -> None:
    """Remove all training checkpoints of a step's stages, after the step has been committed."""
    for stage in (replace(vault, name=f"{vault.name}.{i}") for i in range(stages)):
        for number, record in reversed(list(enumerate(records(stage)))):
            _delete_files(stage, number, record)
            store.delete(f"{_folder(stage)}/{_slot(stage, number)}", below=_folder(stage))


def _delete_files(vault: Vault, number: int, record: dict[str, Any]) -> None:
    """Delete the files of a checkpoint: of its record only the name counts, and that must be one which `save` gives."""
    name = record["pointer"]["uri"].rpartition("/")[2]
    if re.fullmatch(rf"{re.escape(_slot(vault, number))}-[0-9a-f]{{12}}", name):
        store.delete(f"{_folder(vault)}/{name}", below=_folder(vault))


def _folder(vault: Vault) -> str:
    """What a run keeps beside its checkpoints: records of steps, and training checkpoints with theirs."""
    return f"{vault.root.rstrip('/')}/{vault.run}"


def _slot(vault: Vault, number: int) -> str:
    return f"{vault.name}.training-{number}"


def key_of(*parts: Any) -> str:
    """A digest of what a result depends on: plain values and sections of the config."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json")
