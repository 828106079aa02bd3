"""Files that the code of a user's task may read: everything below the folder of its YAML, within limits.

Which modules a function imports and which files it opens is known only when it runs. If one of them changes, scores
from before and after cannot be compared, so all of them count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MOST_FILES = 1000  # that are read for one folder
LARGEST_FILE = 64 * 2**20  # bytes
SHOWN = 3  # names in a warning
# What Python writes beside a module, and an editor's or a tool's own folders
NOT_READ = re.compile(r"__pycache__|.*\.pyc|\..*")
# The config of a run names the task. Its fields are in the key of each step that depends on them.
CONFIG = re.compile(rb"^(evaluate|schedule):", re.M)
YAML = (".yaml", ".yml")


@dataclass
class CodeFiles:
    """The files below a folder that count, and those that are left out."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    # too large, folders behind links, or one beyond the last
    left_out: list[Path] = field(default_factory=list)
    is_cut: bool = False  # whether there are more files than are read

    def warning(self) -> str:
        """What is left out, and what to do; empty where nothing is."""
        if not self.left_out:
            return ""
        names = ", ".join(str(path.relative_to(self.folder)) for path in self.left_out[:SHOWN])
        more = f" and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
        beyond = f", and all after the first {MOST_FILES:,} files" if self.is_cut else ""
        return (
            f"evaluate.tasks: a change of {names}{more}{beyond} in {self.folder} is not noticed when a run is resumed: "
            f"more than {LARGEST_FILE // 2**20} MiB, behind a link to a folder, or too many files: keep in the task's "
            "folder what its code reads, and nothing else"
        )


def code_files(folder: Path) -> CodeFiles:
    """The files below the folder of a task's YAML, the nearest first."""
    found = CodeFiles(folder)
    for path in _walk(folder):
        if len(found.files) == MOST_FILES:
            found.left_out.append(path)
            found.is_cut = True
            break
        if path.is_dir() or path.stat().st_size > LARGEST_FILE:
            found.left_out.append(path)
        elif not _is_config(path):
            found.files.append(path)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, those of a folder before those of its subfolders, and links to folders."""
    entries = sorted(path for path in folder.iterdir() if not NOT_READ.fullmatch(path.name))
    folders = [path for path in entries if path.is_dir() and not path.is_symlink()]
    # A broken link and a socket are neither.
    yield from (path for path in entries if path.is_file() or (path.is_dir() and path.is_symlink()))
    for subfolder in folders:
        yield from _walk(subfolder)


def _is_config(path: Path) -> bool:
    """Whether a file is the config of a run."""
    return path.suffix in YAML and CONFIG.search(path.read_bytes()) is not None
