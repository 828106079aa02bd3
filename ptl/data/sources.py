"""Where rows of text come from: local and s3:// JSONL or Parquet files, and the hub. Columns and lines are checked.

`field` is the section of the config that names a source, for errors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from ptl.config.base import FILL_IN
from ptl.config.chat import NO_CHAT, Chat
from ptl.config.data import DataSource, columns_of
from ptl.errors import InputError
from ptl.json_lines import JSON_LINES, read_json_lines
from ptl.model import hub
from ptl.storage.manifest import file_digest
from ptl.units import listed

GENERAL = "ptl://general"  # a source: English prose that was written for ptl, and ships with it
DATA = "data"  # the section of the config that errors name, where the caller knows no better
TRUNCATED = "truncated"  # a column
THOUGHT = "reasoning_content"  # of a turn, as most templates name it
THOUGHT_NAMES = (THOUGHT, "reasoning", "thinking")  # as servers and templates name it
FILE_KINDS = "an existing .jsonl, .jsonl.gz or .parquet file"
# remedies
CORRECT = "correct the row"
LEAVE_OUT = "leave such rows out"
PART = "name a part of a list or an object: {column[0]}, {column[key]}"
SHAREGPT = (
    "rewrite them (from: human -> role: user, from: gpt -> role: assistant, value -> content)"
)

Turns = list[dict[str, Any]]  # of a chat, with role and content

_template_columns = cache(columns_of)


@dataclass(frozen=True)
class SourceRow:
    """One row of a source."""

    columns: Any  # a mapping from names to values
    source: DataSource
    number: int = 0  # from 1
    field: str = DATA  # the section of the config that names the source, for errors

    @property
    def is_truncated(self) -> bool:
        """Whether its answer has no end, because a limit of tokens truncated it."""
        return self.columns.get(TRUNCATED) is True

    def error(self, problem: str, remedy: str) -> InputError:
        """An error about this row; its field is the one of the row's format."""
        return InputError(
            f"row {self.number} of {self.source.source}{problem}",
            field=f"{self.field}.{self.source.format}",
            remedy=remedy,
        )


def read_rows(source: DataSource) -> Any:
    """The columns of all rows, indexable. Raises InputError that names the file and line of a malformed row."""
    rows = _load(source, DATA)
    # a table is read from the disk as it is indexed
    return rows if hasattr(rows, "__len__") else list(rows)


def numbered_rows(source: DataSource, field: str = DATA) -> Iterator[SourceRow]:
    """The rows of a source one after another; a JSONL file is not read into memory as a whole."""
    for number, columns in enumerate(_load(source, field), 1):
        yield SourceRow(columns, source, number, field)


def check_rows(
    source: DataSource, *, answers: bool = True, field: str = DATA, hub_rows: bool = False
) -> None:
    """Fail early: a file must exist, parse and have what its templates name in every row, chats with an answer.

    Without `answers` a chat may end with the user's turn: its text is only compared, or answered by the model.
    Data sets of the hub are downloaded with `hub_rows` only.
    """
    if not hub_rows and local_file(source, field) is None:
        return
    read = chat_and_answer if answers and source.format == "messages" else texts
    for row in numbered_rows(source, field):
        read(row)


def _load(source: DataSource, field: str) -> Any:
    """The columns of all rows, which can be iterated; a table's are indexable too."""
    setting = f"{field}.source"
    path = local_file(source, field)
    if path is None:
        rows = _from_hub(source, setting)
    elif path.name.endswith(JSON_LINES):
        # an iterator, which reports an empty file itself
        return read_json_lines(path, setting, source.source)
    else:
        rows = _from_parquet(path, setting)
    if len(rows) == 0:
        raise InputError(
            f"{source.source} is empty", field=setting, remedy="give a source with at least one row"
        )
    return rows


def texts(row: SourceRow) -> tuple[str, str]:
    """Prompt and completion of a row; a text row has no prompt. Raises InputError for a missing column."""
    source = row.source
    if source.format == "messages":
        chat, answer = turns(row)
        return _chat_text(chat), _chat_text(answer)
    if source.format == "text":
        return "", fill(source.text, row)
    return fill(source.prompt, row), answer_of(source.completion, row)


def _chat_text(chat: Turns) -> str:
    """What is written in the turns of a chat."""
    return "\n".join(map(_turn_text, chat))


def _turn_text(message: dict[str, Any]) -> str:
    """All that a template may write of a turn: the thought, the text, and the calls of tools as JSON."""
    calls = message.get("tool_calls")
    calls_text = json.dumps(calls, ensure_ascii=False, default=str) if calls else ""
    return "\n".join(filter(None, [message.get(THOUGHT), message.get("content"), calls_text]))


def turns(row: SourceRow) -> tuple[Turns, Turns]:
    """The turns of a row's chat before its answer, and the assistant's last turn; none where another's ends the chat.

    A thought has the name THOUGHT. Raises InputError for what is no chat of text.
    """
    column = row.source.messages
    chat = row.columns.get(column)
    if chat == []:
        raise row.error(f" has an empty list in column {column!r}, a chat without turns", LEAVE_OUT)
    if not isinstance(chat, list):
        raise row.error(
            f" has no list in column {column!r} ({_names(row)})",
            "name the column that holds the chat: messages: COLUMN",
        )
    chat = [_checked_message(message, position, row) for position, message in enumerate(chat, 1)]
    if chat[-1]["role"] != "assistant":
        return chat, []
    # without a prompt there is nothing to answer
    if len(chat) == 1:
        raise row.error(": nothing comes before the assistant's turn", LEAVE_OUT)
    return chat[:-1], chat[-1:]


def _checked_message(message: Any, position: int, row: SourceRow) -> dict[str, Any]:
    """A turn, with its thought by the name THOUGHT too; `position` counts from 1.

    Raises InputError for a turn without a role, and for a content or a thought that is no text.
    """
    turn = message if isinstance(message, dict) else {}
    if "from" in turn and "value" in turn:
        raise row.error(
            f": message {position} has `from` and `value` (ShareGPT), no role and content", SHAREGPT
        )
    if not isinstance(turn.get("role"), str):
        raise row.error(f": message {position} is no object with a role and a content", CORRECT)
    content = turn.get("content")
    calls_tools = content is None and turn.get("tool_calls")  # and needs no text
    if not isinstance(content, str) and not calls_tools:
        raise row.error(
            f": the content of message {position} is no text ({_kind(content)})", CORRECT
        )
    thoughts = {name: turn[name] for name in THOUGHT_NAMES if turn.get(name) not in (None, "")}
    for name, thought in thoughts.items():
        if not isinstance(thought, str):
            raise row.error(
                f": the {name} of message {position} is no text ({_kind(thought)})", CORRECT
            )
    if len(set(thoughts.values())) > 1:
        raise row.error(
            f": message {position} has different thoughts in {listed(list(thoughts))}",
            "leave one of them",
        )
    if thoughts:
        turn = {**turn, THOUGHT: next(iter(thoughts.values()))}
    _check_unicode(f"{turn['role']}{_turn_text(turn)}", row)
    return turn


def chat_and_answer(row: SourceRow) -> tuple[Turns, Turns]:
    """Like `turns`, for training and scoring. Raises InputError for a chat without an answer."""
    chat, answer = turns(row)
    if not answer:
        role = chat[-1]["role"]
        raise row.error(
            f" ends with a turn of role {role!r}, so that there is no answer to learn from",
            LEAVE_OUT,
        )
    if not answer[0].get("tool_calls") and not (answer[0].get("content") or "").strip():
        raise row.error(": the assistant's last turn is blank", LEAVE_OUT)
    return chat, answer


def user_turn(prompt: str) -> Turns:
    """A prompt as a chat."""
    return [{"role": "user", "content": prompt}]


def prompt_of(row: SourceRow, chat: Chat = NO_CHAT) -> Any:
    """What the model is to answer: a text, or the turns of a chat. Raises InputError for a source without prompts."""
    if row.source.format == "text":
        raise InputError(
            "format `text` has no prompt",
            field="recover.prompts",
            remedy="use prompt_completion or messages",
        )
    # all turns of a chat that ends with the user's
    if row.source.format == "messages":
        return turns(row)[0]
    prompt = texts(row)[0]
    return user_turn(prompt) if chat.enabled else prompt


def fill(template: str, row: SourceRow) -> str:
    """A template over the columns of a row. Raises InputError that names the column that is not there or no text."""
    # First each value for itself: format_map would write None and [1, 2] into the text.
    for name in _template_columns(template):
        value = _value(name, row)
        is_endless = isinstance(value, float) and not math.isfinite(value)
        if is_endless or isinstance(value, list | dict | bytes | None):
            raise row.error(
                f" holds {_kind(value)} for {{{name}}}, which is no text", f"{LEAVE_OUT}, or {PART}"
            )
    text = template.format_map(row.columns)
    _check_unicode(text, row)
    return text


def answer_of(template: str, row: SourceRow) -> str:
    """What the answer to a row is, or is compared with (nothing for `format`). InputError as `fill`, and if blank."""
    text = fill(template, row)
    if template and not text.strip():
        raise row.error(f" has nothing in {template!r}, the answer", LEAVE_OUT)
    return text


def _value(name: str, row: SourceRow) -> Any:
    """A column, or a part of its value (`column[key]`). Raises InputError where there is none."""
    column, bracket, keys = name.partition("[")
    if column not in row.columns:
        raise row.error(
            f" lacks {column!r}, which a template names ({_names(row)})", "correct the template"
        )
    try:
        return Formatter().get_field(name, (), row.columns)[0]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise row.error(
            f" has {_kind(row.columns[column])} in {column!r}, with no part {bracket}{keys}, which a template names",
            f"correct the template: {{{column}}} is the whole value",
        ) from error


def _names(row: SourceRow) -> str:
    """The columns that a row has, for an error about one that it lacks."""
    return f"columns there: {', '.join(sorted(row.columns))}"


def _check_unicode(text: str, row: SourceRow) -> None:
    """Raise InputError for half of a surrogate pair, which JSON can hold (\\ud83d) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise row.error(
            f": character {error.start} is no Unicode ({error.reason})", CORRECT
        ) from error


def _kind(value: Any) -> str:
    """A value that is no text, for an error: null, nan, inf, a list, a dict, a bytes."""
    if value is None:
        return "null"
    return str(value) if isinstance(value, float) else f"a {type(value).__name__}"


def local_file(source: DataSource, field: str = DATA) -> Path | None:
    """The file of a source, downloaded if it is on s3://; None for a hub id. Raises InputError."""
    setting = f"{field}.source"
    name = source.source
    if name == GENERAL:
        return Path(__file__).with_name("general.jsonl")
    path = Path(name)
    is_remote = name.startswith("s3://")
    if path.name.endswith((*JSON_LINES, ".parquet")):
        if is_remote:
            return _from_s3(name, setting)
        if path.is_file():
            return path
        is_open = path.name.startswith(FILL_IN)
        problem = f"{path.name} is still to be filled in" if is_open else f"no file {path}"
        raise InputError(problem, field=setting, remedy=f"give {FILE_KINDS}")
    # the id of a data set has no such ending
    if path.suffix == ".csv":
        raise InputError(
            f"{name} is no .jsonl, .jsonl.gz or .parquet file",
            field=setting,
            remedy=_from_csv(path),
        )
    if path.suffix in (".json", ".csv", ".txt") or path.exists() or is_remote:
        raise InputError(
            f"{name} is no .jsonl, .jsonl.gz or .parquet file",
            field=setting,
            remedy="convert it (of a JSON list: jq -c '.[]' FILE.json > FILE.jsonl), or give a hub id",
        )
    return None


def _from_csv(path: Path) -> str:
    """The line that makes JSON lines of a CSV file."""
    program = (
        "import csv, json, sys; [print(json.dumps(row)) for row in "
        "csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''))]"
    )
    converted = shlex.quote(path.with_suffix(".jsonl").name)
    return f'convert it: python3 -c "{program}" {shlex.quote(str(path))} > {converted}'


def content_digest(source: DataSource) -> str | None:
    """What changes with a source's content: a file's sha256, an object's ETag; None for a hub id. Raises InputError."""
    if source.source.startswith("s3://"):
        return _etag(source.source, f"{DATA}.source")
    path = local_file(source)
    return None if path is None else file_digest(path)


def _from_parquet(path: Path, setting: str) -> Any:
    import datasets

    try:
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(_cache()))
        # A damaged text would only be noticed in the row that has it.
        rows.data.table.validate(full=True)
    except Exception as raised:  # of a damaged file, the libraries raise a dozen kinds
        error = _cause(raised)
        if getattr(error, "errno", None):  # of the cache's disk
            raise error from None
        raise InputError(
            f"{path} is no readable Parquet file ({type(error).__name__}: {error})",
            field=setting,
            remedy="write it again",
        ) from error
    return rows


def _cause(error: Exception) -> Any:
    """What it was, such as a full disk: `datasets` hides that behind an error of its own."""
    from datasets.exceptions import DatasetGenerationError

    return (isinstance(error, DatasetGenerationError) and error.__cause__) or error


def _from_s3(uri: str, setting: str) -> Path:
    """Download once: the copy is named by the object's ETag, so that a changed object is fetched again."""
    from ptl.storage import s3

    bucket, key = s3.split(uri)
    digest = hashlib.sha256(f"{uri} {_etag(uri, setting)}".encode()).hexdigest()
    target = _cache() / digest[:32] / Path(key).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Another process may download the same object.
        partial = target.with_name(f".{os.getpid()}.{target.name}")
        with s3.explained(uri, setting):
            s3.client().download_file(bucket, key, str(partial))
        partial.rename(target)
    return target


def _etag(uri: str, setting: str) -> str:
    """What S3 names an object's content by."""
    from botocore.exceptions import ClientError

    from ptl.storage import s3

    bucket, key = s3.split(uri)
    with s3.explained(uri, setting):
        try:
            answer = s3.client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if not s3.is_missing(error):
                raise
            raise InputError(
                f"no object {uri}", field=setting, remedy=f"give {FILE_KINDS}"
            ) from error
    # As from a web page in place of the server.
    if "ETag" not in answer:
        raise InputError(
            f"{uri}: no ETag in the answer",
            field=setting,
            remedy="is MLFLOW_S3_ENDPOINT_URL an S3 server?",
        )
    return answer["ETag"]


def _cache() -> Path:
    """Downloaded and converted files, which another step on the same machine may use again: the run's or the user's."""
    from datasets import config

    folder = os.environ.get("PTL_SCRATCH") or config.HF_DATASETS_CACHE
    return Path(folder, "ptl-data")


def _from_hub(source: DataSource, setting: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.source, source.subset, split=source.split, revision=source.revision
        )
    # the library raises a dozen kinds; each means that the source cannot be had
    except Exception as raised:
        error = _cause(raised)
        problem = (
            f"dataset {source.source!r} (subset {source.subset}, split {source.split}, revision {source.revision}) "
            f"cannot be loaded: {hub.reason(error)}"
        )
        remedy = f"check the id, HF_TOKEN and the connection, or give {FILE_KINDS}"
        raise hub.error_for(error, problem, field=setting, remedy=remedy) from error
