"""Where rows of text come from: local and s3:// JSONL or Parquet files, and the hub. Columns and lines are checked."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from ptl.config import DataSource
from ptl.errors import InputError

JSON_LINES = (".jsonl", ".jsonl.gz")
KINDS = "an existing .jsonl, .jsonl.gz or .parquet file"


def read_rows(source: DataSource) -> Any:
    """The rows of a source, indexable. Raises InputError that names the file and line of a malformed row."""
    path = local_file(source)
    if path is None:
        return _not_empty(_from_hub(source), source)
    if path.name.endswith(JSON_LINES):
        return list(_json_lines(path, source.source))
    return _not_empty(_parquet(path), source)


def check_rows(source: DataSource) -> None:
    """Fail early: a file must exist, parse and have the columns that its templates name."""
    path = local_file(source)
    if path is None:
        return
    if path.name.endswith(JSON_LINES):
        for number, row in enumerate(_json_lines(path, source.source), 1):
            texts(row, source, number)
    else:
        texts(_not_empty(_parquet(path), source)[0], source, 1)  # all rows of a table have the same columns


def texts(row: Any, source: DataSource, number: int) -> tuple[str, str]:
    """Prompt and completion of a row; a text row has no prompt. Raises InputError for a missing column."""
    if source.format == "messages":
        chat = row.get(source.messages)
        if not isinstance(chat, list) or not chat:
            raise InputError(
                f"data.messages: row {number} of {source.source} has no list in column {source.messages!r} "
                f"(columns there: {', '.join(sorted(row))}); name the column that holds the chat"
            )
        parts = [str(message.get("content", "")) for message in chat]
        return "\n".join(parts[:-1]), parts[-1]
    templates = {"text": ("", source.text), "prompt_completion": (source.prompt, source.completion)}
    prompt, completion = (fill(template, row, source, number) for template in templates[source.format])
    return prompt, completion


def bare(source: DataSource) -> DataSource:
    """The source with the columns of its templates alone, without the words around them (`Question: `)."""
    names = ("text", "prompt", "completion")
    return source.model_copy(update={name: _columns(getattr(source, name)) for name in names})


@cache
def _columns(template: str) -> str:
    parts = [part for part in Formatter().parse(template) if part[1] is not None]
    return " ".join(f"{{{name}{'!' + how if how else ''}{':' + spec if spec else ''}}}" for _, name, spec, how in parts)


def fill(template: str, row: Any, source: DataSource, number: int) -> str:
    """A template over the columns of a row. Raises InputError that names the column that is not there."""
    try:
        return template.format(**row)
    except (KeyError, IndexError, ValueError) as error:
        columns = ", ".join(sorted(row))
        raise InputError(
            f"data.{source.format}: row {number} of {source.source} lacks {error}, which a template names "
            f"(columns there: {columns}); correct the template"
        ) from error


def local_file(source: DataSource) -> Path | None:
    """The file of a source, fetched from s3:// when it lies there; None for a hub id. Raises InputError."""
    named = source.source
    path = Path(named)
    if path.name.endswith((*JSON_LINES, ".parquet")):
        if named.startswith("s3://"):
            return _from_s3(named)
        if not path.is_file():
            raise InputError(f"data.source: no file {path}; give {KINDS}")
        return path
    if path.suffix in (".json", ".csv", ".txt") or path.exists() or named.startswith("s3://"):
        raise InputError(f"data.source: {named} is no .jsonl, .jsonl.gz or .parquet file; convert it, or give a hub id")
    return None


def _json_lines(path: Path, named: str) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(
                        f"data.source: {named}, line {number} is not JSON ({error}); correct the line"
                    ) from error
                if not isinstance(row, dict):
                    raise InputError(f"data.source: {named}, line {number} must be a JSON object; correct the line")
                yield row
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise InputError(f"data.source: {named} is damaged after line {number} ({error}); fetch it again") from error
    if number == 0:
        raise InputError(f"data.source: {named} is empty; give a file with at least one row")


def _parquet(path: Path) -> Any:
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.from_parquet(str(path), cache_dir=str(_cache() / "parquet"))
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(f"data.source: {path} is no readable Parquet file ({error}); write it again") from error


def _from_s3(uri: str) -> Path:
    """Download once: the copy is named by the object's ETag, so that a changed object is fetched again."""
    from botocore.exceptions import BotoCoreError, ClientError

    from ptl import s3_client

    bucket, key = s3_client.split(uri)
    try:
        tag = s3_client.client().head_object(Bucket=bucket, Key=key)["ETag"]
        folder = _cache() / hashlib.sha256(f"{uri} {tag}".encode()).hexdigest()[:32]
        target = folder / Path(key).name
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{os.getpid()}.{target.name}"
            s3_client.client().download_file(bucket, key, str(partial))
            partial.rename(target)
    except ClientError as error:
        if s3_client.code(error) in ("404", "NoSuchKey"):
            raise InputError(f"data.source: no object {uri}; give {KINDS}") from error
        raise InputError(f"data.source: {s3_client.message(error, uri)}") from error
    except BotoCoreError as error:
        raise InputError(f"data.source: {s3_client.message(error, uri)}") from error
    return target


def _cache() -> Path:
    return Path(os.environ.get("PTL_SCRATCH") or tempfile.gettempdir()) / "ptl-data"


def _from_hub(source: DataSource) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.source, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises a dozen kinds; each means that the source cannot be had
        raise InputError(
            f"data.source: dataset {source.source!r} (subset {source.subset}, split {source.split}, revision "
            f"{source.revision}) cannot be loaded: {type(error).__name__}: {error}; check the id, or give {KINDS}"
        ) from error


def _not_empty(rows: Any, source: DataSource) -> Any:
    if len(rows) == 0:
        raise InputError(f"data.source: {source.source} is empty; give a source with at least one row")
    return rows
