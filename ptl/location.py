"""Paths in a config, relative to its own file, and in `--set`, relative to the working directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, SerializationInfo, ValidationInfo

FOLDER = "folder"  # key of pydantic's context: validation takes relative paths from there, serialization makes such
# What is always a file and never the name of something on the hub or of the harness.
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv", ".txt", ".yaml", ".yml")
LONGEST, LONGEST_NAME = 4096, 255  # bytes of a path and of each part of it, as Linux has them


def _absolute(value: str, info: ValidationInfo) -> str:
    """A local path made absolute; names on the hub and addresses of a store stay as they are."""
    return _located(value, info.context[FOLDER]) if info.context else _checked(value)


def _checked(value: str) -> str:
    """A text that can be a path: the system's own answer to others is an error of its own for each."""
    encoded = value.encode(errors="surrogatepass")
    if len(encoded) > LONGEST or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        raise ValueError(f"longer than {LONGEST} bytes, or a name in it than {LONGEST_NAME}; give a path or a name")
    if "\0" in value:
        raise ValueError("has a NUL, which no path can have; remove it")
    return value


def _located(value: str, folder: Path) -> str:
    if "://" in _checked(value):
        return value
    # Functions of os.path, since those of Path raise for an unknown user, or where the whole path is too long.
    path = os.path.join(folder, os.path.expanduser(value))  # noqa: PTH111, PTH118
    named = value.startswith((".", "/", "~")) or value.endswith(SUFFIXES) or os.path.exists(path)  # noqa: PTH110
    return os.path.normpath(path) if named else value


class Typed(str):
    """A text from the command line, where a relative path is meant from the working directory."""


def typed(value: Any) -> Any:
    """A value from the command line, with its texts marked as such."""
    if isinstance(value, dict):
        return {name: typed(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return Typed(value) if isinstance(value, str) else value


def _from_here(value: Any) -> Any:
    return _located(value, Path.cwd()) if isinstance(value, Typed) and value else value


def _relative(value: str, info: SerializationInfo) -> str:
    """A path below the context's folder as seen from there: a compiled pipeline is the same on every machine."""
    folder = info.context and info.context[FOLDER]
    return str(Path(value).relative_to(folder)) if folder and Path(value).is_relative_to(folder) else value


def _folder(value: str, info: ValidationInfo) -> str:
    """What is a local folder, whatever its name looks like."""
    bare = info.context and not value.startswith(("/", "~"))
    return _absolute(f"./{value}" if bare else value, info)


Text = Annotated[str, Field(min_length=1), BeforeValidator(_from_here), PlainSerializer(_relative, str)]
Location = Annotated[Text, AfterValidator(_absolute)]  # a local path, or a name on the hub or of the harness
Folder = Annotated[Text, AfterValidator(_folder)]
