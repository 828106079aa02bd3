"""Rows of a JSONL file, gzipped or not, with errors that name the line."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptl.errors import InputError

JSON_LINES = (".jsonl", ".jsonl.gz")


def read_json_lines(path: Path, field: str, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises InputError with the config's `field`, the file's `name` and the line."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = rows = 0
    try:
        # Bytes, each line decoded for itself: an error of the encoding names its line.
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                # An empty line is no row, one at the end for example.
                if line.strip():
                    rows += 1
                    if rows == 1:
                        _check_form(line, field, name)
                    yield _json_object(line, field, f"{name}, line {number}")
    # A truncated or changed file.
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{name} is damaged after line {number} ({error})", field=field, remedy="fetch it again"
        ) from error
    if rows == 0:
        raise InputError(
            f"{name} is empty", field=field, remedy="give a file with at least one row"
        )


def _check_form(line: bytes, field: str, name: str) -> None:
    """Raise InputError where the first line shows that the whole file has another form, with what converts it."""
    # Text in UTF-16 has zeros, whether or not it begins with a byte order mark.
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
        raise InputError(
            f"{name} is in UTF-16, not in UTF-8",
            field=field,
            remedy="convert it: iconv -f utf-16 -t utf-8 OLD > NEW",
        )
    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise InputError(
            f"{name} is a JSON list, not one JSON object a line",
            field=field,
            remedy="convert it: jq -c '.[]' OLD > NEW",
        )


def _json_object(line: bytes, field: str, location: str) -> dict[str, Any]:
    remedy = "correct the line"
    try:
        # Without a byte order mark, and without its end, where the decoder would see another line.
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location} is not in UTF-8",
            field=field,
            remedy="convert the file, for example: iconv -f latin1 -t utf-8 OLD > NEW",
        ) from error
    except (ValueError, RecursionError) as error:
        # The decoder's own words have a second line number, always 1
        reason = (
            f"{error.msg}, column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise InputError(
            f"{location} is not JSON ({reason})", field=field, remedy=remedy
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{location} must be a JSON object", field=field, remedy=remedy)
    return row
