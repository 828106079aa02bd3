"""Training checkpoints on the local disk, as the Trainer names them: which of them are complete, and the newest."""

from __future__ import annotations

from pathlib import Path

COMPLETE = "ptl-complete"  # a file that marks a training checkpoint as written to its end


def last_complete(scratch: Path) -> Path | None:
    """The newest training checkpoint that was written to its end; a kill may have left later ones half-written."""
    # each is marked after all processes have written their parts
    complete = [mark.parent for mark in scratch.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The optimizer step in a training checkpoint's name."""
    _, _, step = folder.name.rpartition("-")
    return int(step)
