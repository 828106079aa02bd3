"""Lines of progress: `ptl run` shows those of a step's output that begin with the mark, and logs all others."""

from __future__ import annotations

MARK = "ptl: "


def say(step: str, text: str) -> None:
    """Print one line of progress of a step."""
    print(f"{MARK}{step}: {text}", flush=True)
