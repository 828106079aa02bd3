"""The rows that `ptl init` is given: their format by the names of their columns, how long they are, how many."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptl.config.data import DataSource, columns_of
from ptl.config.run import check
from ptl.data.sources import SourceRow, chat_and_answer, local_file, numbered_rows, texts
from ptl.errors import InputError
from ptl.model import hub
from ptl.preflight.amount import CHARACTERS_PER_TOKEN, tokens_of
from ptl.preflight.rows import SAMPLE, unused_columns

FIELD = "--data"
LENGTHS = (256, 512, 1024, 2048, 4096)  # tokens of a training row
# in the words of a benchmark
QUESTION = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
# Columns that need no option: a chat, a pair, a text. Fields of a source that are not here are as by default.
KNOWN = {
    ("messages",): {"format": "messages"},
    ("prompt", "completion"): {"prompt": "{prompt}", "completion": "{completion}"},
    ("question", "answer"): QUESTION,
    # Alpaca, which may also have the whole prompt as `text`
    ("instruction", "input", "output"): {
        "prompt": "{instruction}\n{input}\n",
        "completion": "{output}",
    },
    ("instruction", "output"): {"prompt": "{instruction}\n", "completion": "{output}"},
    ("text",): {"format": "text", "text": "{text}"},
}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """A source as a config has it, and its size."""

    source: DataSource
    tokens: float | None  # roughly; None: of a data set on the hub
    max_length: int  # tokens of a row
    mean_length: float  # tokens of a row, roughly
    unused: str = ""  # a sentence about columns that no template names


def read(name: str, columns: str | None) -> Rows:
    """The rows of a file, or of a data set of the hub (ID or ID:SUBSET). Raises InputError that names the option.

    `columns`: PROMPT,COMPLETION, or the one column of chats or texts; None: one of KNOWN.
    """
    dataset, _, subset = name.partition(":")
    is_subset = bool(subset) and "://" not in name
    named = {"source": dataset, "subset": subset} if is_subset else {"source": name}
    source = check(DataSource, named, FIELD)
    if local_file(source, FIELD) is None:
        source, sample = _from_hub(source)
    else:
        sample = [row.columns for row in itertools.islice(numbered_rows(source, FIELD), SAMPLE)]
    source = source.model_copy(update=settings_of(sample[0], columns))
    lengths = [
        _characters(SourceRow(row, source, number, FIELD)) for number, row in enumerate(sample, 1)
    ]
    max_length = next(
        (length for length in LENGTHS if length * CHARACTERS_PER_TOKEN >= max(lengths)), LENGTHS[-1]
    )
    mean_length = statistics.mean(
        min(length / CHARACTERS_PER_TOKEN, max_length) for length in lengths
    )
    tokens = tokens_of(source, max_length, FIELD) or None
    return Rows(source, tokens, max_length, mean_length, unused_columns(source, sample, FIELD))


def settings_of(row: Row, columns: str | None) -> dict[str, str]:
    """Format and templates for rows with such columns. Raises InputError that names --columns."""
    present = row.keys()
    names: tuple[str, ...] = next((known for known in KNOWN if present >= set(known)), ())
    if columns:
        names = tuple(map(str.strip, columns.split(",")))
    if names in KNOWN and present >= set(names):
        return KNOWN[names]
    if not 1 <= len(names) <= 2 or not present >= set(names):
        raise InputError(
            f"{columns or 'missing'}; the rows have {', '.join(sorted(row))}",
            field="--columns",
            remedy="give --columns PROMPT,COMPLETION, or the one column of chats (role and content) or of texts",
        )
    try:
        columns_of("".join(f"{{{name}}}" for name in names))
    except ValueError as error:
        problem = f"{columns}: no template can name such a column"
        raise InputError(problem, field="--columns", remedy="rename it in the file") from error
    if len(names) == 2:
        return {"prompt": f"{{{names[0]}}}\n", "completion": f"{{{names[1]}}}"}
    if isinstance(row[names[0]], list):
        return {"format": "messages", "messages": names[0]}
    return {"format": "text", "text": f"{{{names[0]}}}"}


def _characters(row: SourceRow) -> int:
    """The length of a row as training will read it. Raises InputError where that cannot."""
    if row.source.format == "messages":
        chat_and_answer(row)
    return sum(map(len, texts(row)))


def _from_hub(source: DataSource) -> tuple[DataSource, list[Row]]:
    """A data set at its newest commit, and its first rows: no more is downloaded than they need."""
    import datasets
    import huggingface_hub

    name = source.source
    try:
        source = source.model_copy(update={"revision": huggingface_hub.dataset_info(name).sha})
        rows = datasets.load_dataset(
            name, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        return source, list(itertools.islice(rows, SAMPLE))
    # the libraries raise a dozen kinds; each means that the source cannot be had
    except Exception as error:
        raise InputError(
            f"{name!r} is no file here, and the hub does not give it as a data set ({hub.reason(error)})",
            field=FIELD,
            remedy="give a .jsonl, .jsonl.gz or .parquet file, or check the id, HF_TOKEN and the connection",
        ) from error
