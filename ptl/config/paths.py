"""Paths in a config, relative to its own file, and in `--set`, relative to the working directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, SerializationInfo, ValidationInfo

FOLDER = "folder"  # key of pydantic's context: validation takes relative paths from there, serialization makes such
# What is always a file and never the name of something on the hub or of the harness.
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv", ".txt", ".yaml", ".yml")
FILL_IN = "FILL-IN"  # what a user must replace in a config of `ptl init`; no file, data set or task has that name
LONGEST = 4096  # characters of a path


class Typed(str):
    """A text from the command line, where a relative path is meant from the working directory."""


def typed(value: Any) -> Any:
    """A value from the command line, with its texts marked as such."""
    if isinstance(value, dict):
        return {name: typed(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return Typed(value) if isinstance(value, str) else value


def _from_working_directory(value: Any) -> Any:
    return _locate(value, Path.cwd()) if isinstance(value, Typed) and value else value


def _absolute_path(value: str, info: ValidationInfo) -> str:
    """A local path made absolute; names on the hub and addresses of a store stay as they are."""
    # Without a context nothing is located: a step reads what the command has made absolute.
    return _locate(value, info.context[FOLDER]) if info.context else value


def _locate(value: str, folder: Path) -> str:
    if "://" in value:
        return value
    # Functions of os.path, since those of Path raise for an unknown user, or where the whole path is too long.
    path = os.path.join(folder, os.path.expanduser(value))  # noqa: PTH111, PTH118
    # `org/model` may be a folder here and a name on the hub: what exists is the folder.
    looks_local = value.startswith((".", "/", "~")) or value.endswith(SUFFIXES)
    if looks_local or os.path.exists(path):  # noqa: PTH110
        return os.path.normpath(path)
    return value


def _relative(value: str, info: SerializationInfo) -> str:
    """A path below the context's folder as seen from there: a compiled pipeline is the same on every machine."""
    folder = info.context and info.context[FOLDER]
    path = Path(value)
    if folder and path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return value


# A local path, or a name on the hub or of the harness. The order counts: texts of the command line are located first,
# all others by the last validator.
Location = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST, pattern=r"^[^\x00]*$"),
    BeforeValidator(_from_working_directory),
    PlainSerializer(_relative, str),
    AfterValidator(_absolute_path),
]
