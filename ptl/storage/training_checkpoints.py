"""Training checkpoints that outlive the machine: a few of them are kept in the store while a step trains.

So is what an earlier stage of a chain has written, for machines that did not write it.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.errors import PtlError, WorkError
from ptl.log import say
from ptl.storage import store
from ptl.storage.local_files import COMPLETE, copy_tree, last_complete, step_of
from ptl.storage.manifest import FILES, digest_of, silent
from ptl.storage.store import Pointer, Record

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
        """Store a complete training checkpoint if the interval has passed; a store that fails is a warning."""
        now = time.monotonic()
        if self.last_saved is None:
            self.last_saved = now
        if now - self.last_saved >= self.minutes * 60:
            try:
                self.save(folder)
            except PtlError as error:  # the training continues, and has a checkpoint on this disk
                say(self.name, f"warning: no training checkpoint was stored: {error}")
            self.last_saved = time.monotonic()

    def save(self, folder: Path) -> None:
        """Publish a folder and commit it as the next checkpoint; the files of older ones go, their records stay."""
        number = len(self.records())
        self._commit(self._slot(number), folder, {"folder": folder.name})
        for older in range(number + 1 - NUM_KEPT):
            self._delete(f"{self._slot(older)}-")

    def restore(self, scratch: Path) -> None:
        """Put the newest stored checkpoint that is intact into `scratch`, unless a complete one there is as new."""
        stored = self.records()[-NUM_KEPT:]
        for record in reversed(stored):
            # named by its optimizer step, as the Trainer looks for it
            target = scratch / record.metadata["folder"]
            local = last_complete(scratch)
            if local is not None and step_of(local) >= step_of(target):
                return
            try:
                # one that is not complete is replaced
                _fetch(record, target)
            except WorkError as error:
                if record is stored[0]:  # nothing is trained again unasked
                    raise
                say(self.name, f"warning: an older training checkpoint is taken: {error}")
            else:
                assert (target / COMPLETE).is_file()
                return

    def save_result(self, folder: Path, report: str) -> None:
        """Publish what the finished stage has written, and commit it with its report."""
        self._commit(self._slot("result"), folder, {"report": report})

    def fetch_result(self, folder: Path) -> str | None:
        """Put what the finished stage has written into `folder`; returns its report, None where there is none yet."""
        record = store.committed(self.root, self.run, self._slot("result"), self.key)
        if record is None:
            return None
        _fetch(record, folder)
        return str(record.metadata["report"])

    def records(self) -> list[Record]:
        """The records of the checkpoints stored so far, oldest first."""
        stored: list[Record] = []
        while True:
            record = store.committed(self.root, self.run, self._slot(len(stored)), self.key)
            # numbers are given without a gap
            if record is None:
                return stored
            stored.append(record)

    def clear(self) -> None:
        """Remove all of them, after the step has been committed."""
        self._delete(f"{self.name}.training-")

    def _commit(self, slot: str, folder: Path, metadata: dict[str, Any]) -> None:
        """Publish a folder, then commit its record: what that names is complete."""
        # a random suffix: a save that was killed before its record left a folder of the same number
        location = f"{self._folder()}/{slot}-{uuid.uuid4().hex[:12]}"
        files = store.publish(folder, location, on_progress=silent)
        record = Record(self.key, Pointer(location, digest_of(files)), metadata)
        store.commit(self.root, self.run, slot, record)

    def _delete(self, prefix: str) -> None:
        """Delete the folders of the run whose names begin so: what a record says of them does not count.

        A store that does not allow it is a warning: they cost space, and `ptl gc` removes them.
        """
        folder = self._folder()
        try:
            names = {path.partition("/")[0] for path, _, _ in store.walk(folder)}
            # the newest first, as `records` ends at the first gap
            for name in sorted(names, reverse=True):
                if name.startswith(prefix):
                    store.delete(f"{folder}/{name}", below=folder)
        except PtlError as error:
            say(
                self.name,
                f"warning: training checkpoints that nobody needs stay in the store: {error}",
            )

    def _folder(self) -> str:
        """What a run keeps beside its checkpoints: records of steps, and training checkpoints with theirs."""
        return f"{self.root.rstrip('/')}/{self.run}"

    def _slot(self, which: int | str) -> str:
        """The name of a record, as of a step: a checkpoint's number, or `result` for what the stage has written."""
        return f"{self.name}.training-{which}"


def _fetch(record: Record, target: Path) -> None:
    """Put the files of a record into the folder `target`, in place of what is there; one rename makes it complete."""
    download = target.with_name(f"{target.name}.fetched")
    folder = store.fetch(record.pointer, download, on_progress=silent)
    shutil.rmtree(target, ignore_errors=True)
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    copy_tree(folder, partial, FILES)
    partial.rename(target)
    shutil.rmtree(download, ignore_errors=True)
