"""The commit of this package."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import ptl


def own_revision() -> str:
    """The commit of this package: an image says it, else its checkout. Empty where neither knows."""
    from_image = os.environ.get("PTL_REVISION", "").removeprefix("unknown")
    return from_image or revision_of(Path(ptl.__file__).parents[1])


def revision_of(root: Path) -> str:
    """The commit of a checkout, with `-dirty` where files differ from it; empty where `root` is not the top of one."""
    if not (root / ".git").exists():  # a repository that merely contains an installed package is not meant
        return ""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:  # git is not installed
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
