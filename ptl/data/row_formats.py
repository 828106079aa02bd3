"""What the rows of a source are, told by their columns: chats, plain text, or a prompt with its completion.

`recognise` reads a few rows and returns the source as a config has it, with templates that fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptl.config.recover import DataSource
from ptl.data.sources import SourceRow, chat_and_answer, local_file, numbered_rows, texts
from ptl.errors import InputError

SAMPLE = 200  # rows that are looked at
TIMEOUT = 20  # seconds for the hub to name a commit
CHATS = ("messages", "conversations", "conversation", "chat")
TEXTS = ("text", "content")
QUESTIONS = ("question", "problem", "query")  # asked in the words of a benchmark's prompt, `Question: ...`
# Answers that are worked out come before `answer`, which may be the bare result beside them.
ANSWERS = ("completion", "response", "output", "solution", "answer")
# Columns of prompt and completion, the likeliest first.
PAIRS = (
    *itertools.product(("instruction", *QUESTIONS, "prompt", "input"), ANSWERS),
    ("text", "code"),
)
KNOWN = (
    "chats in `messages` or `conversations` (role and content), `text`, or a prompt and its completion in columns such "
    "as question/answer, instruction/output, prompt/completion or problem/solution"
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Recognised:
    """A source whose rows are known."""

    source: DataSource
    long: int  # characters, prompt and completion together, that 95 % of the sampled rows do not exceed
    characters: float | None  # of all rows, estimated; None: on the hub


def recognise(name: str, subset: str | None = None, *, field: str) -> Recognised:
    """Look at the first rows of a file or of a hub data set. Raises InputError that names `field` for all others."""
    bare = DataSource(source=name, subset=subset)
    try:
        if local_file(bare, field) is None:
            bare = bare.model_copy(update={"revision": _commit(name)})
            rows, count = _from_hub(bare), None
        else:
            rows, count = _from_file(bare, field)
        return _measured(bare.model_copy(update=settings_of(rows)), rows, count)
    except InputError as error:  # whose field would be one of a config that does not exist yet
        raise InputError(error.problem, field=field, remedy=error.remedy) from error


def settings_of(rows: Sequence[Row]) -> dict[str, str]:
    """`format` of the rows, and the column or templates that go with it. Raises InputError where none fits."""
    for column in CHATS:
        if _all(rows, column, list):
            return _chats(rows, column)
    for prompt, completion in PAIRS:
        if _all(rows, prompt, str) and _all(rows, completion, (str, int, float)):
            return _pair(rows, prompt, completion)
    for column in TEXTS:
        if _all(rows, column, str):
            return {"format": "text", "text": f"{{{column}}}"}
    columns = ", ".join(sorted({str(name) for row in rows for name in row}))
    raise InputError(
        f"the columns of the rows ({columns}) are none that are recognised",
        remedy=f"rename them to {KNOWN}, or set format and templates of `training` in the config by hand",
    )


def _all(rows: Sequence[Row], column: str, kind: type | tuple[type, ...]) -> bool:
    """Whether each row has a value of that kind there, and some row one that is not empty."""
    values = [row.get(column) for row in rows]
    return all(isinstance(value, kind) for value in values) and any(value not in ("", []) for value in values)


def _chats(rows: Sequence[Row], column: str) -> dict[str, str]:
    """Chats of turns with role and content; ShareGPT's `from` and `value` are not read."""
    turns = [turn for row in rows for turn in row[column]]
    if any(isinstance(turn, Mapping) and {"from", "value"} <= turn.keys() for turn in turns):
        raise InputError(
            f"column {column!r} holds chats with `from` and `value` (ShareGPT), and turns need `role` and `content`",
            remedy="rewrite them (from: human -> role: user, from: gpt -> role: assistant, value -> content)",
        )
    return {"format": "messages", "messages": column}


def _pair(rows: Sequence[Row], prompt: str, completion: str) -> dict[str, str]:
    """Templates of a prompt and its completion, with what is between them where the rows have no space there."""
    words = {"format": "prompt_completion", "completion": f"{{{completion}}}"}
    if prompt in QUESTIONS:
        return {**words, "prompt": f"Question: {{{prompt}}}\nAnswer:", "completion": f" {{{completion}}}"}
    # Alpaca's `input` is what the instruction is about; it is empty in many rows, perhaps in all that were read.
    if prompt == "instruction" and any("input" in row for row in rows):
        _check_inputs(rows)
        return {**words, "prompt": "{instruction}\n{input}\n"}
    joined = all(row[prompt][-1:].isspace() or str(row[completion])[:1].isspace() for row in rows)
    return {**words, "prompt": f"{{{prompt}}}" if joined else f"{{{prompt}}}\n"}


def _check_inputs(rows: Sequence[Row]) -> None:
    """Raise InputError where a row lacks what its instruction is about: it may need none, or be incomplete."""
    for number, row in enumerate(rows, 1):
        value = row.get("input")
        if not isinstance(value, str):
            has = "null" if value is None and "input" in row else "nothing" if value is None else f"{value!r}"
            raise InputError(
                f"row {number} has {has} in column 'input', which is to follow its instruction in the prompt",
                remedy='write a text there in every row ("" where the instruction says it all), or remove the column',
            )


def _measured(source: DataSource, rows: Sequence[Row], count: int | None) -> Recognised:
    """Read the rows as training will, which checks them, and measure them; `count` is that of all rows."""
    lengths: list[int] = []
    for number, columns in enumerate(rows, 1):
        row = SourceRow(columns, source, number)
        if source.format == "messages":
            chat_and_answer(row)
        lengths.append(sum(map(len, texts(row))))
    lengths.sort()
    characters = None if count is None else count * sum(lengths) / len(lengths)
    return Recognised(source, lengths[int(0.95 * (len(lengths) - 1))], characters)


def _from_file(source: DataSource, field: str) -> tuple[list[Row], int]:
    """The first rows, and the number of all rows."""
    rows = numbered_rows(source, field)
    sample = [row.columns for row in itertools.islice(rows, SAMPLE)]
    return sample, len(sample) + sum(1 for _ in rows)


def _commit(name: str) -> str | None:
    """The newest commit of a data set on the hub; None where only the hub's cache may be used."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    # datasets itself would try for half a minute where there is no connection.
    try:
        return huggingface_hub.dataset_info(name, timeout=TIMEOUT).sha
    except Exception as error:  # each of the hub's, and of its client's
        raise _not_given(name, error) from error


def _from_hub(source: DataSource) -> list[Row]:
    """The first rows of a data set on the hub, of which no more is downloaded than they need."""
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(
            source.source,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=source.revision is not None,
        )
        sample = list(itertools.islice(rows, SAMPLE))
    except Exception as error:  # the library raises a dozen kinds; each means that the source cannot be had
        raise _not_given(source.source, error) from error
    if not sample:
        raise InputError(f"{source.source} is empty", remedy="give a source with at least one row")
    return sample


def _not_given(name: str, error: Exception) -> InputError:
    return InputError(
        f"{name!r} is no file here, and the hub does not give it as a data set ({type(error).__name__}: {error})",
        remedy="give a .jsonl, .jsonl.gz or .parquet file, or check the id (ID:SUBSET names a subset), HF_TOKEN and "
        "the connection",
    )
