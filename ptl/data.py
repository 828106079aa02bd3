"""Calibration text and training sets: rows become token sequences, the same way everywhere."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.config import Calibration, DataSource
from ptl.errors import InputError

if TYPE_CHECKING:
    from ptl.importance import Batch

JSON_LINES = (".jsonl", ".jsonl.gz")
IGNORED = -100  # label of a token without loss, as in torch's cross_entropy


@dataclass(frozen=True)
class Tokens:
    """One sequence; the first `prompt` tokens carry no loss when training on completions only."""

    ids: list[int]
    prompt: int

    def labels(self, loss: str) -> list[int]:
        """Labels for next-token training: all tokens, or the completion's only."""
        return self.ids if loss == "all" else [IGNORED] * self.prompt + self.ids[self.prompt :]


def read_rows(source: DataSource) -> Any:
    """The rows of a source, indexable. Raises InputError that names the file and line of a malformed row."""
    path = Path(source.source)
    if path.name.endswith(JSON_LINES):
        return list(_json_lines(path))
    if path.suffix == ".parquet":
        if not path.is_file():
            raise InputError(f"data.source: no file {path}; give an existing .jsonl, .jsonl.gz or .parquet file")
        import datasets

        return _not_empty(datasets.Dataset.from_parquet(str(path)), source)
    if path.suffix in (".json", ".csv", ".txt") or path.exists():
        raise InputError(f"data.source: {path} is no .jsonl, .jsonl.gz or .parquet file; convert it, or give a hub id")
    return _not_empty(_from_hub(source), source)


def check_rows(source: DataSource) -> None:
    """Fail early: a local file must exist, parse and have the columns that its templates name."""
    if Path(source.source).name.endswith(JSON_LINES):
        for number, row in enumerate(_json_lines(Path(source.source)), 1):
            _texts(row, source, number)
    elif Path(source.source).suffix:
        read_rows(source)


def tokenize(row: dict[str, Any], source: DataSource, tokenizer: Any, max_length: int, number: int = 0) -> Tokens:
    """One row as tokens, ended by EOS and cut to max_length."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "model.path: the tokenizer has no EOS token, so no answer could end; set eos_token and save it"
        )
    if source.format == "messages":
        prompt, full = _chat(row, source, tokenizer, number)
        return Tokens(full[:max_length], min(len(prompt), max_length))
    prompt_text, completion_text = _texts(row, source, number)
    head = tokenizer(prompt_text)["input_ids"] if prompt_text else []
    if head and head[-1] == tokenizer.eos_token_id:
        head = head[:-1]
    tail = tokenizer(completion_text, add_special_tokens=not head)["input_ids"]
    if not tail or tail[-1] != tokenizer.eos_token_id:
        tail = [*tail, tokenizer.eos_token_id]
    return Tokens((head + tail)[:max_length], min(len(head), max_length))


def order(count: int, seed: int) -> Iterator[int]:
    """Endless row numbers: one deterministic permutation after another, so that data runs out only to begin again."""
    epoch = 0
    while True:
        yield from random.Random(f"{seed}/{epoch}").sample(range(count), count)
        epoch += 1


def calibration_batches(settings: Calibration, tokenizer: Any, seed: int) -> list[Batch]:
    """Batches of right-padded sequences: input_ids, attention_mask, labels, int64 [B, T]."""
    rows = read_rows(settings.data)
    count = min(settings.num_sequences, len(rows))
    picked = [i for i, _ in zip(order(len(rows), seed), range(count), strict=False)]
    sequences = [tokenize(rows[i], settings.data, tokenizer, settings.max_length, i + 1) for i in picked]
    sequences.sort(key=lambda tokens: len(tokens.ids))  # equal lengths together: less padding
    size = settings.batch_size
    return [_pad(sequences[i : i + size]) for i in range(0, count, size)]


def training_chunk(
    source: DataSource, tokenizer: Any, max_length: int, *, seed: int, skip: int, budget: int
) -> list[Tokens]:
    """The sequences of one iteration: exactly `budget` tokens, none of them among the first `skip` of the run.

    The run reads one endless shuffled stream; sequences that an earlier iteration began are left out, and the last
    one is cut so that the count is exact. The cut one comes first, so that it never makes a batch of its own.
    """
    rows = read_rows(source)
    stream = (tokenize(rows[i], source, tokenizer, max_length, i + 1) for i in order(len(rows), seed))
    passed = 0
    while passed < skip:
        passed += len(next(stream).ids)
    chunk: list[Tokens] = []
    left = budget
    while left > 0:
        tokens = next(stream)
        if len(tokens.ids) > left:
            chunk.insert(0, Tokens(tokens.ids[:left], min(tokens.prompt, left)))
        else:
            chunk.append(tokens)
        left -= len(tokens.ids)
    return chunk


def _texts(row: Any, source: DataSource, number: int) -> tuple[str, str]:
    """Prompt and completion of a row; a text row has no prompt."""
    templates = {"text": ("", source.text), "prompt_completion": (source.prompt, source.completion)}
    if source.format == "messages":
        if not isinstance(row.get(source.messages), list):
            raise InputError(
                f"data.messages: row {number} of {source.source} has no list in column {source.messages!r}"
            )
        return "", ""
    try:
        prompt, completion = (template.format(**row) for template in templates[source.format])
    except (KeyError, IndexError, ValueError) as error:
        columns = ", ".join(sorted(row))
        raise InputError(
            f"data.{source.format}: row {number} of {source.source} lacks {error}, which a template names "
            f"(columns there: {columns}); correct the template"
        ) from error
    return prompt, completion


def _chat(row: Any, source: DataSource, tokenizer: Any, number: int) -> tuple[list[int], list[int]]:
    _texts(row, source, number)
    if not tokenizer.chat_template:
        raise InputError(
            "data.format: `messages` needs a chat template, and the tokenizer has none; use another format"
        )
    messages = row[source.messages]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    full = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    if full[: len(prompt)] != prompt:
        raise InputError(
            f"data.messages: row {number}: the chat template renders the prompt differently with its answer"
        )
    return prompt, full


def _pad(sequences: list[Tokens]) -> Batch:
    import torch

    width = max(len(tokens.ids) for tokens in sequences)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens in sequences:
        padding = width - len(tokens.ids)
        rows["input_ids"].append(tokens.ids + [0] * padding)
        rows["attention_mask"].append([1] * len(tokens.ids) + [0] * padding)
        rows["labels"].append(tokens.labels("all") + [IGNORED] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"data.source: no file {path}; give an existing .jsonl, .jsonl.gz or .parquet file")
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"data.source: {path}, line {number} is not JSON ({error}); correct the line"
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"data.source: {path}, line {number} must be a JSON object; correct the line")
            yield row
    if number == 0:
        raise InputError(f"data.source: {path} is empty; give a file with at least one row")


def _from_hub(source: DataSource) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.source, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises a dozen kinds; each means that the source cannot be had
        raise InputError(
            f"data.source: dataset {source.source!r} (subset {source.subset}, split {source.split}) cannot be loaded: "
            f"{type(error).__name__}: {error}; check the id, or give a local .jsonl or .parquet file"
        ) from error


def _not_empty(rows: Any, source: DataSource) -> Any:
    if len(rows) == 0:
        raise InputError(f"data.source: {source.source} is empty; give a source with at least one row")
    return rows
