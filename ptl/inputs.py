"""The checkpoints that a step reads. One that cannot be fetched is reported, so that its own step checks it."""

from __future__ import annotations

from pathlib import Path

from ptl import attempts, store
from ptl.errors import WorkError
from ptl.machine import scratch
from ptl.store import Pointer


def fetch(pointer: Pointer) -> Path:
    """The verified folder of a pointer. Raises WorkError naming the step that made it, which a rerun does again."""
    try:
        return store.fetch(pointer, scratch("cache"))
    except WorkError as error:
        report = damage_report(pointer.digest)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.touch()
        # On a cluster a finished step is not started again, and a pointer of a test may name no step.
        if attempts.on_a_cluster() or not pointer.step:
            raise
        remedy = f"{error.remedy}. Run the same command again: it checks step {pointer.step}, and repeats it if need be"
        raise WorkError(error.problem, field=error.field, remedy=remedy) from error


def damage_report(digest: str) -> Path:
    """The file that reports a checkpoint as not fetchable: the step that made it checks it when it runs again."""
    return scratch("doubtful") / digest.removeprefix("sha256:")
