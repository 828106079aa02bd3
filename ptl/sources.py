"""Where rows of text come from: local and s3:// JSONL or Parquet files, and the hub. Columns and lines are checked."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from ptl.config import DataSource
from ptl.errors import InputError
from ptl.recover_config import columns_of

JSON_LINES = (".jsonl", ".jsonl.gz")
MAX_LINE = 2**26  # characters of one row
MAX_EXPANSION = 200  # a gzip file of rows holds 3 to 20 times its size
Message = dict[str, Any]  # one turn of a chat: role and content
_names = cache(columns_of)
KINDS = "an existing .jsonl, .jsonl.gz or .parquet file"


def read_rows(source: DataSource) -> Any:
    """The rows of a source, indexable. Raises InputError that names the file and line of a malformed row."""
    rows = _rows(source)
    return rows if hasattr(rows, "__len__") else list(rows)


def _rows(source: DataSource) -> Any:
    path = local_file(source)
    if path is not None and path.name.endswith(JSON_LINES):
        return json_lines(path, f"data.source: {source.source}")
    return _not_empty(_from_hub(source) if path is None else _parquet(path), source)


def check_rows(source: DataSource, answers: bool = True) -> None:
    """Fail early: a file must exist, parse and have what its templates name in every row, chats with an answer.

    Without `answers` a chat may end with the user's turn: its text is only compared, or answered by the model.
    """
    if local_file(source) is None:
        return
    read = chat_and_answer if answers and source.format == "messages" else texts
    for number, row in enumerate(_rows(source), 1):
        read(row, source, number)


def texts(row: Any, source: DataSource, number: int) -> tuple[str, str]:
    """Prompt and completion of a row; a text row has no prompt. Raises InputError for a missing column."""
    if source.format == "messages":
        chat, answer = turns(row, source, number)
        asked, answered = ("\n".join(message.get("content") or "" for message in part) for part in (chat, answer))
        return asked, answered
    templates = {"text": ("", source.text), "prompt_completion": (source.prompt, source.completion)}
    prompt, completion = (fill(template, row, source, number) for template in templates[source.format])
    return prompt, completion


def turns(row: Any, source: DataSource, number: int) -> tuple[list[Message], list[Message]]:
    """The turns of a row's chat before its answer, and the assistant's last turn; none where another's ends the chat.

    Raises InputError for what is no chat of text.
    """
    where = f"data.messages: row {number} of {source.source}"
    chat = row.get(source.messages)
    if not isinstance(chat, list) or not chat:
        raise InputError(
            f"{where} has no list in column {source.messages!r} "
            f"(columns there: {', '.join(sorted(row))}); name the column that holds the chat"
        )
    for i, message in enumerate(chat, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: message {i} is no object with a role and a content; correct the row")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InputError(f"{where}: the content of message {i} is no text ({_shown(content)}); correct the row")
        _check_unicode(message["role"] + (content or ""), where)
    answered = chat[-1]["role"] == "assistant"
    if answered and len(chat) == 1:
        raise InputError(f"{where}: nothing comes before the assistant's turn; leave such rows out")
    return (chat[:-1], chat[-1:]) if answered else (chat, [])


def chat_and_answer(row: Any, source: DataSource, number: int) -> tuple[list[Message], list[Message]]:
    """Like `turns`, for training and scoring. Raises InputError for a chat without an answer."""
    chat, answer = turns(row, source, number)
    if not answer:
        raise InputError(
            f"data.messages: row {number} of {source.source} ends with a turn of role {chat[-1]['role']!r}, so that "
            "there is no answer to learn from; leave such rows out"
        )
    return chat, answer


def prompt_of(row: Any, source: DataSource, number: int) -> Any:
    """What the model is to answer: a text, or the turns of a chat. Raises InputError for a source without prompts."""
    if source.format == "text":
        raise InputError("recover.prompts: format `text` has no prompt; use prompt_completion or messages")
    return turns(row, source, number)[0] if source.format == "messages" else texts(row, source, number)[0]


def bare(source: DataSource) -> DataSource:
    """The source with the columns of its templates alone, without the words around them (`Question: `)."""
    names = ("text", "prompt", "completion")
    return source.model_copy(update={name: _columns(getattr(source, name)) for name in names})


@cache
def _columns(template: str) -> str:
    parts = [part for part in Formatter().parse(template) if part[1] is not None]
    return " ".join(f"{{{name}{'!' + how if how else ''}{':' + spec if spec else ''}}}" for _, name, spec, how in parts)


def fill(template: str, row: Any, source: DataSource, number: int) -> str:
    """A template over the columns of a row. Raises InputError that names the column that is not there or no text."""
    where = f"data.{source.format}: row {number} of {source.source}"
    try:
        for name in _names(template):
            value, _ = Formatter().get_field(name, (), row)
            # neither the word None nor brackets and quotes of Python are what the row's author wrote
            infinite = isinstance(value, float) and not math.isfinite(value)
            if value is None or infinite or isinstance(value, list | dict | bytes):
                raise InputError(
                    f"{where} holds {_shown(value)} for {{{name}}}, which is no text; leave such rows out, or name a "
                    f"part of it ({{{name}[0]}}, {{{name}[key]}})"
                )
        text = template.format_map(row)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        columns = ", ".join(sorted(row))
        raise InputError(
            f"{where} lacks {error}, which a template names (columns there: {columns}); correct the template"
        ) from error
    _check_unicode(text, where)
    return text


def _check_unicode(text: str, where: str) -> None:
    """Raise InputError for half of a surrogate pair, which JSON can hold (\\ud83d) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is no Unicode ({error.reason}); correct the row") from error


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else str(value)
    return "null" if value is None else f"a {type(value).__name__}"


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


def json_lines(path: Path, where: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, gzipped or not. Raises InputError that begins with `where` and names the line."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = size = rows = 0
    most = max(MAX_EXPANSION * path.stat().st_size, MAX_LINE)  # a bomb of gzip has 1,000 times the size of its file
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            while line := file.readline(MAX_LINE):
                number += 1
                size += len(line)
                if len(line) == MAX_LINE or size > most:
                    raise InputError(
                        f"{where}, line {number}: {size:,} characters so far from a file of "
                        f"{path.stat().st_size:,} bytes are no rows of text; correct the file"
                    )
                if line.strip():
                    rows += 1
                    yield _json_object(line, f"{where}, line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{where} is damaged after line {number} ({error}); fetch it again") from error
    if rows == 0:
        raise InputError(f"{where} is empty; give a file with at least one row")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); correct the line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} must be a JSON object; correct the line")
    return row


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
        tag = s3_client.client().head_object(Bucket=bucket, Key=key).get("ETag")
        if not tag:
            raise InputError(f"data.source: {uri}: no ETag in the answer; is MLFLOW_S3_ENDPOINT_URL an S3 server?")
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
        raise s3_client.error_for(InputError, error, uri, field="data.source") from error
    except BotoCoreError as error:
        raise s3_client.error_for(InputError, error, uri, field="data.source") from error
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
