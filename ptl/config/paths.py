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
LONGEST, LONGEST_NAME = 4096, 255  # bytes of a path and of each part of it, as Linux has them


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
    if isinstance(value, Typed) and value:
        return _locate(value, Path.cwd())
    return value


def _absolute_path(value: str, info: ValidationInfo) -> str:
    """A local path made absolute; names on the hub and addresses of a store stay as they are."""
    if info.context:
        return _locate(value, info.context[FOLDER])
    _check_length(value)
    return value


def _absolute_folder(value: str, info: ValidationInfo) -> str:
    """What is a local folder, whatever its name looks like."""
    # Without a context nothing is located: a step reads what the command has made absolute.
    if info.context and not value.startswith(("/", "~")):
        value = f"./{value}"
    return _absolute_path(value, info)


def _locate(value: str, folder: Path) -> str:
    _check_length(value)
    if "://" in value:
        return value
    # Functions of os.path, since those of Path raise for an unknown user, or where the whole path is too long.
    path = os.path.join(folder, os.path.expanduser(value))  # noqa: PTH111, PTH118
    # `org/model` may be a folder here and a name on the hub: what exists is the folder.
    looks_local = value.startswith((".", "/", "~")) or value.endswith(SUFFIXES)
    if looks_local or os.path.exists(path):  # noqa: PTH110
        return os.path.normpath(path)
    return value


def _check_length(value: str) -> None:
    """Refuse a text that no path can be, for which the system's own answers differ."""
    encoded = value.encode(errors="surrogatepass")
    longest_name = max(encoded.split(b"/"), key=len)
    if len(encoded) > LONGEST or len(longest_name) > LONGEST_NAME:
        raise ValueError(f"longer than {LONGEST} bytes, or a name in it than {LONGEST_NAME}; give a path or a name")
    if "\0" in value:
        raise ValueError("has a NUL, which no path can have; remove it")


def _relative(value: str, info: SerializationInfo) -> str:
    """A path below the context's folder as seen from there: a compiled pipeline is the same on every machine."""
    folder = info.context and info.context[FOLDER]
    path = Path(value)
    if folder and path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return value


# The order counts: texts of the command line are located first, all others by the validators below.
Text = Annotated[str, Field(min_length=1), BeforeValidator(_from_working_directory), PlainSerializer(_relative, str)]
Location = Annotated[Text, AfterValidator(_absolute_path)]  # a local path, or a name on the hub or of the harness
Folder = Annotated[Text, AfterValidator(_absolute_folder)]
