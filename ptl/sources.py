"""Where rows of text come from: local and s3:// JSONL or Parquet files, and the hub. Columns and lines are checked.

`field` is the config's section that names a source, for errors; a problem of a row is one of its `format`'s field.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from ptl.config import DataSource
from ptl.errors import InputError
from ptl.json_lines import JSON_LINES, read_json_lines
from ptl.recover_config import columns_of

DATA = "data"  # the section that errors name where the caller knows no better
FILE_KINDS = "an existing .jsonl, .jsonl.gz or .parquet file"
CORRECT_ROW = "correct the row"
LEAVE_OUT = "leave such rows out"

Message = dict[str, Any]  # one turn of a chat: role and content
Chat = list[Message]

_template_columns = cache(columns_of)


def read_rows(source: DataSource) -> Any:
    """The rows of a source, indexable. Raises InputError that names the file and line of a malformed row."""
    rows = _load_rows(source, DATA)
    return rows if hasattr(rows, "__len__") else list(rows)


def check_rows(source: DataSource, *, answers: bool = True, field: str = DATA) -> None:
    """Fail early: a file must exist, parse and have what its templates name in every row, chats with an answer.

    Without `answers` a chat may end with the user's turn: its text is only compared, or answered by the model.
    Nothing of the hub is read.
    """
    if local_file(source, field) is None:
        return
    read = chat_and_answer if answers and source.format == "messages" else texts
    for number, row in enumerate(_load_rows(source, field), 1):
        read(row, source, number, field)


def _load_rows(source: DataSource, field: str) -> Any:
    path = local_file(source, field)
    if path is not None and path.name.endswith(JSON_LINES):
        # line by line: check_rows needs no more than one row in memory
        return read_json_lines(path, f"{field}.source", source.source)
    rows = _from_hub(source, field) if path is None else _from_parquet(path, field)
    if len(rows) == 0:
        raise InputError(
            f"{source.source} is empty", field=f"{field}.source", remedy="give a source with at least one row"
        )
    return rows


def texts(row: Any, source: DataSource, number: int, field: str = DATA) -> tuple[str, str]:
    """Prompt and completion of a row; a text row has no prompt. Raises InputError for a missing column."""
    if source.format == "messages":
        chat, answer = turns(row, source, number, field)
        return _chat_text(chat), _chat_text(answer)
    if source.format == "text":
        return "", fill(source.text, row, source, number, field)
    prompt = fill(source.prompt, row, source, number, field)
    completion = fill(source.completion, row, source, number, field)
    return prompt, completion


def _chat_text(chat: Chat) -> str:
    return "\n".join(message.get("content") or "" for message in chat)


def turns(row: Any, source: DataSource, number: int, field: str = DATA) -> tuple[Chat, Chat]:
    """The turns of a row's chat before its answer, and the assistant's last turn; none where another's ends the chat.

    Raises InputError for what is no chat of text.
    """
    chat = row.get(source.messages)
    if not isinstance(chat, list) or not chat:
        columns = ", ".join(sorted(row))
        problem = f" has no list in column {source.messages!r} (columns there: {columns})"
        raise _row_error(source, number, field, problem, "name the column that holds the chat")
    for i, message in enumerate(chat, 1):
        _check_message(message, i, source, number, field)
    if chat[-1]["role"] != "assistant":
        return chat, []
    if len(chat) == 1:
        raise _row_error(source, number, field, ": nothing comes before the assistant's turn", LEAVE_OUT)
    return chat[:-1], chat[-1:]


def _check_message(message: Any, position: int, source: DataSource, number: int, field: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        problem = f": message {position} is no object with a role and a content"
        raise _row_error(source, number, field, problem, CORRECT_ROW)
    content = message.get("content")
    only_calls_tools = content is None and message.get("tool_calls")
    if not isinstance(content, str) and not only_calls_tools:
        problem = f": the content of message {position} is no text ({_value_kind(content)})"
        raise _row_error(source, number, field, problem, CORRECT_ROW)
    _check_unicode(message["role"] + (content or ""), source, number, field)


def chat_and_answer(row: Any, source: DataSource, number: int, field: str = DATA) -> tuple[Chat, Chat]:
    """Like `turns`, for training and scoring. Raises InputError for a chat without an answer."""
    chat, answer = turns(row, source, number, field)
    if not answer:
        role = chat[-1]["role"]
        problem = f" ends with a turn of role {role!r}, so that there is no answer to learn from"
        raise _row_error(source, number, field, problem, LEAVE_OUT)
    return chat, answer


def prompt_of(row: Any, source: DataSource, number: int) -> Any:
    """What the model is to answer: a text, or the turns of a chat. Raises InputError for a source without prompts."""
    if source.format == "text":
        problem = "format `text` has no prompt"
        raise InputError(problem, field="recover.prompts", remedy="use prompt_completion or messages")
    read = turns if source.format == "messages" else texts
    prompt, _ = read(row, source, number)
    return prompt


def bare(source: DataSource) -> DataSource:
    """The source with the columns of its templates alone, without the words around them (`Question: `)."""
    templates = ("text", "prompt", "completion")
    return source.model_copy(update={name: _without_words(getattr(source, name)) for name in templates})


@cache
def _without_words(template: str) -> str:
    columns = []
    for _, name, spec, conversion in Formatter().parse(template):
        if name is not None:
            suffix = f"!{conversion}" if conversion else ""
            suffix += f":{spec}" if spec else ""
            columns.append(f"{{{name}{suffix}}}")
    return " ".join(columns)


def fill(template: str, row: Any, source: DataSource, number: int, field: str = DATA) -> str:
    """A template over the columns of a row. Raises InputError that names the column that is not there or no text."""
    try:
        for name in _template_columns(template):
            value, _ = Formatter().get_field(name, (), row)
            if not _is_text(value):
                problem = f" holds {_value_kind(value)} for {{{name}}}, which is no text"
                remedy = f"{LEAVE_OUT}, or name a part of it ({{{name}[0]}}, {{{name}[key]}})"
                raise _row_error(source, number, field, problem, remedy)
        text = template.format_map(row)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        columns = ", ".join(sorted(row))
        problem = f" lacks {error}, which a template names (columns there: {columns})"
        raise _row_error(source, number, field, problem, "correct the template") from error
    _check_unicode(text, source, number, field)
    return text


def _is_text(value: Any) -> bool:
    """Whether a value reads as its author wrote it: the word None, brackets and quotes are Python's."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is not None and not isinstance(value, list | dict | bytes)


def _check_unicode(text: str, source: DataSource, number: int, field: str) -> None:
    """Raise InputError for half of a surrogate pair, which JSON can hold (\\ud83d) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f": character {error.start} is no Unicode ({error.reason})"
        raise _row_error(source, number, field, problem, CORRECT_ROW) from error


def _value_kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else str(value)
    return f"a {type(value).__name__}"


def _row_error(source: DataSource, number: int, field: str, problem: str, remedy: str) -> InputError:
    """An error of one row, which is named before the problem."""
    row = f"row {number} of {source.source}"
    return InputError(f"{row}{problem}", field=f"{field}.{source.format}", remedy=remedy)


def local_file(source: DataSource, field: str = DATA) -> Path | None:
    """The file of a source, downloaded if it is on s3://; None for a hub id. Raises InputError."""
    name = source.source
    path = Path(name)
    if path.name.endswith((*JSON_LINES, ".parquet")):
        if name.startswith("s3://"):
            return _from_s3(name, field)
        if not path.is_file():
            raise InputError(f"no file {path}", field=f"{field}.source", remedy=f"give {FILE_KINDS}")
        return path
    other_kind = path.suffix in (".json", ".csv", ".txt")
    if other_kind or path.exists() or name.startswith("s3://"):
        problem = f"{name} is no .jsonl, .jsonl.gz or .parquet file"
        raise InputError(problem, field=f"{field}.source", remedy="convert it, or give a hub id")
    return None


def _from_parquet(path: Path, field: str) -> Any:
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.from_parquet(str(path), cache_dir=str(_cache() / "parquet"))
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        problem = f"{path} is no readable Parquet file ({error})"
        raise InputError(problem, field=f"{field}.source", remedy="write it again") from error


def _from_s3(uri: str, field: str) -> Path:
    """Download once: the copy is named by the object's ETag, so that a changed object is fetched again."""
    from botocore.exceptions import BotoCoreError, ClientError

    from ptl import s3_client

    setting = f"{field}.source"
    bucket, key = s3_client.split(uri)
    try:
        tag = s3_client.client().head_object(Bucket=bucket, Key=key).get("ETag")
        if not tag:
            problem = f"{uri}: no ETag in the answer"
            raise InputError(problem, field=setting, remedy="is MLFLOW_S3_ENDPOINT_URL an S3 server?")
        folder = _cache() / hashlib.sha256(f"{uri} {tag}".encode()).hexdigest()[:32]
        target = folder / Path(key).name
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            # another process may download the same object
            partial = folder / f".{os.getpid()}.{target.name}"
            s3_client.client().download_file(bucket, key, str(partial))
            partial.rename(target)
    except (ClientError, BotoCoreError) as error:
        is_missing = isinstance(error, ClientError) and s3_client.code(error) in ("404", "NoSuchKey")
        if is_missing:
            raise InputError(f"no object {uri}", field=setting, remedy=f"give {FILE_KINDS}") from error
        raise InputError(s3_client.message(error, uri), field=setting) from error
    return target


def _cache() -> Path:
    parent = os.environ.get("PTL_SCRATCH") or tempfile.gettempdir()
    return Path(parent) / "ptl-data"


def _from_hub(source: DataSource, field: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.source, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises a dozen kinds; each means that the source cannot be had
        version = f"subset {source.subset}, split {source.split}, revision {source.revision}"
        problem = f"dataset {source.source!r} ({version}) cannot be loaded: {type(error).__name__}: {error}"
        raise InputError(problem, field=f"{field}.source", remedy=f"check the id, or give {FILE_KINDS}") from error
