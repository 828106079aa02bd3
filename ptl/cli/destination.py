"""The folder that a command writes: it appears complete or not at all, and one process writes it at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptl import processes
from ptl.errors import InputError

LOCK = "lock"  # beside the folder: held by the process that writes


def check_free(dst: Path) -> None:
    """Raise InputError where something would be lost by writing `dst`, or where it cannot be replaced."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError(
            f"{dst} is a file or not empty",
            field="dst",
            remedy="give a folder that does not exist yet",
        )
    # The rename at the end would fail, after all the work.
    if dst.is_mount():
        raise InputError(
            f"{dst} is a mount point, which cannot be replaced",
            field="dst",
            remedy=f"give a folder in it: {dst / 'model'}",
        )


@contextmanager
def writing(dst: Path) -> Iterator[Path]:
    """A folder that becomes `dst` when the block ends well: a kill leaves no half of a checkpoint there.

    What is beside it stays after an error, for the same command to resume from. Raises InputError when another process
    writes the same `dst`.
    """
    dst = dst.resolve()
    work = dst.with_name(f"{dst.name}.partial")
    out = work / "out"
    with (
        processes.interruptible(f"{dst} was not written; run the same command again"),
        processes.exclusive(work / LOCK, f"dst: {dst}"),
    ):
        check_free(dst)
        shutil.rmtree(out, ignore_errors=True)  # by a killed command
        out.mkdir()
        try:
            yield out
            out.rename(dst)
            shutil.rmtree(work)
        finally:
            shutil.rmtree(out, ignore_errors=True)
            # What may be resumed stays; a lock alone is nothing.
            if work.is_dir() and [path.name for path in work.iterdir()] == [LOCK]:
                shutil.rmtree(work)
