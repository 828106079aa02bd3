"""Paths in a config: relative to the config's own file, and checked to be paths at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PlainSerializer, SerializationInfo, ValidationInfo

FOLDER = "folder"  # key of pydantic's context: validation takes relative paths from there, serialization makes such
# What is always a file and never the name of something on the hub or of the harness.
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv", ".txt", ".yaml", ".yml")
LONGEST, LONGEST_NAME = 4096, 255  # bytes of a path and of each part of it, as Linux has them


def _absolute(value: str, info: ValidationInfo) -> str:
    """A local path made absolute; names on the hub and addresses of a store stay as they are."""
    if max(map(len, value.encode().split(b"/"))) > LONGEST_NAME:
        raise ValueError(f"a name in it is longer than {LONGEST_NAME} bytes; give an existing path or a name")
    if "\0" in value:
        raise ValueError("it has a NUL, which no path can have; remove it")
    if not info.context or "://" in value:
        return value
    path = Path(info.context[FOLDER], os.path.expanduser(value))  # noqa: PTH111 - Path's raises for an unknown user
    named = value.startswith((".", "/", "~")) or value.endswith(SUFFIXES) or path.exists()
    return os.path.normpath(path) if named else value


def _relative(value: str, info: SerializationInfo) -> str:
    """A path below the context's folder as seen from there: a compiled pipeline is the same on every machine."""
    folder = info.context and info.context[FOLDER]
    return str(Path(value).relative_to(folder)) if folder and Path(value).is_relative_to(folder) else value


def _folder(value: str, info: ValidationInfo) -> str:
    """What is a local folder, whatever its name looks like."""
    bare = info.context and not value.startswith(("/", "~"))
    return _absolute(f"./{value}" if bare else value, info)


Text = Annotated[str, Field(min_length=1, max_length=LONGEST), PlainSerializer(_relative, str)]
Location = Annotated[Text, AfterValidator(_absolute)]  # a local path, or a name on the hub or of the harness
Folder = Annotated[Text, AfterValidator(_folder)]
