"""Rows of a JSONL file, gzipped or not, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ptl.errors import InputError

JSON_LINES = (".jsonl", ".jsonl.gz")
MAX_LINE = 2**26  # characters of one row
MAX_EXPANSION = 200  # characters for a byte of the file; a gzip file of rows expands 3 to 20 times


def read_json_lines(path: Path, field: str, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises InputError with the config's `field`, the file's `name` and the line."""
    opener = gzip.open if path.suffix == ".gz" else open
    file_size = path.stat().st_size
    # a gzip bomb expands 1,000 times
    max_size = max(MAX_EXPANSION * file_size, MAX_LINE)
    number = size = rows = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = iter(partial(file.readline, MAX_LINE), "")
            for number, line in enumerate(lines, 1):
                size += len(line)
                # a line of that length was not read to its end
                if len(line) == MAX_LINE or size > max_size:
                    sizes = f"{size:,} characters so far from a file of {file_size:,} bytes"
                    raise InputError(
                        f"{name}, line {number}: {sizes} are no rows of text",
                        field=field,
                        remedy="correct the file",
                    )
                # an empty line is no row, one at the end for example
                if line.strip():
                    rows += 1
                    yield _json_object(line, field, f"{name}, line {number}")
    # a truncated or changed file, or one in another encoding
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise InputError(
            f"{name} is damaged after line {number} ({error})",
            field=field,
            remedy="fetch it again",
        ) from error
    if rows == 0:
        raise InputError(f"{name} is empty", field=field, remedy="give a file with at least one row")


def _json_object(line: str, field: str, location: str) -> dict[str, Any]:
    remedy = "correct the line"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{location} is not JSON ({error})", field=field, remedy=remedy) from error
    if not isinstance(row, dict):
        raise InputError(f"{location} must be a JSON object", field=field, remedy=remedy)
    return row
