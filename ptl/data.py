"""Calibration text and training sets: rows become token sequences, the same way everywhere."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptl.config import Calibration, DataSource, TrainingData
from ptl.errors import InputError
from ptl.sources import Message, chat_and_answer, check_rows, read_rows, texts

if TYPE_CHECKING:
    from torch import Tensor

    from ptl.decontaminate import Filter

__all__ = [
    "Batch",
    "Tokens",
    "calibration_batches",
    "check_rows",
    "order",
    "padded",
    "prompt_rows",
    "read_rows",
    "tokenize",
]
Batch = dict[str, "Tensor"]  # input_ids, attention_mask, labels: int64 [B, T], padded on the right
IGNORED = -100  # label of a token without loss, as in torch's cross_entropy


@dataclass(frozen=True)
class Tokens:
    """One sequence; the first `prompt` tokens carry no loss when training on completions only."""

    ids: list[int]
    prompt: int

    def labels(self, loss: str) -> list[int]:
        """Labels for next-token training: all tokens, or the completion's only."""
        return self.ids if loss == "all" else [IGNORED] * self.prompt + self.ids[self.prompt :]


def tokenize(row: dict[str, Any], source: DataSource, tokenizer: Any, max_length: int, number: int = 0) -> Tokens:
    """One row as tokens, ended by EOS and cut to max_length."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "model.path: the tokenizer has no EOS token, so no answer could end; set eos_token and save it"
        )
    if source.format == "messages":
        prompt, full = _chat(row, source, tokenizer, number)
        return Tokens(full[:max_length], min(len(prompt), max_length))
    prompt_text, completion_text = texts(row, source, number)
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
    """Rows drawn with the seed, as `padded` batches."""
    rows = read_rows(settings.data)
    picked = itertools.islice(order(len(rows), seed), min(settings.num_sequences, len(rows)))
    sequences = [tokenize(rows[i], settings.data, tokenizer, settings.max_length, i + 1) for i in picked]
    return padded(sequences, settings.batch_size)


def padded(sequences: Sequence[Tokens], size: int) -> list[Batch]:
    """Right-padded batches, those of equal length together: input_ids, attention_mask, labels, int64 [B, T].

    Only the completions have labels; a text without a prompt is all completion.
    """
    ordered = sorted(sequences, key=lambda tokens: len(tokens.ids))
    return [_pad(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def training_chunk(
    data: TrainingData,
    tokenizer: Any,
    max_length: int,
    *,
    seed: int,
    earlier: Sequence[int],
    budget: int,
    filter_: Filter | None = None,
) -> list[Tokens]:
    """The sequences of one budget: exactly `budget` tokens, none from a sequence that an earlier budget began.

    The run reads one endless shuffled stream, which the budgets take from one after another: `earlier` lists those
    before this one. The last sequence is cut at its front, so that the count is exact and the answer stays; it comes
    first, so that it never makes a batch of its own.
    """
    stream = _stream(data, tokenizer, max_length, seed, filter_)
    for before in earlier:
        while before > 0:
            before -= len(next(stream).ids)
    chunk: list[Tokens] = []
    left = budget
    while left > 0:
        tokens = next(stream)
        cut = len(tokens.ids) - left
        if cut > 0:
            chunk.insert(0, Tokens(tokens.ids[cut:], max(0, tokens.prompt - cut)))
        else:
            chunk.append(tokens)
        left -= len(tokens.ids)
    return chunk


def prompt_rows(
    source: DataSource, *, seed: int, skip: int, count: int, filter_: Filter | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows for prompts, after the first `skip` of the run's order."""
    rows = read_rows(source)
    if filter_ is None:
        picked = order(len(rows), seed)
    else:
        kept = [i for i in range(len(rows)) if filter_.keeps(source, i + 1, rows[i])]
        if not kept:
            raise InputError(
                f"training.decontaminate: each of the {len(rows)} rows of {source.source} is dropped; give other data"
            )
        picked = (kept[i] for i in order(len(kept), seed))
    return [(i + 1, rows[i]) for i in itertools.islice(picked, skip, skip + count)]


def _stream(data: TrainingData, tokenizer: Any, max_length: int, seed: int, filter_: Filter | None) -> Iterator[Tokens]:
    """Endless sequences; with several sources the one that is furthest behind its share of the tokens comes next."""
    streams = [_shuffled(source, tokenizer, max_length, seed, filter_) for source in data.sources]
    taken = [0.0] * len(streams)  # tokens over weight
    while True:
        behind = taken.index(min(taken))
        tokens = next(streams[behind])
        taken[behind] += len(tokens.ids) / data.sources[behind].weight
        yield tokens


def _shuffled(
    source: DataSource, tokenizer: Any, max_length: int, seed: int, filter_: Filter | None
) -> Iterator[Tokens]:
    """One source, again and again, without rows that the filter drops and prompts that leave no room for an answer."""
    rows = read_rows(source)
    useless = 0
    for i in order(len(rows), seed):
        kept = filter_ is None or filter_.keeps(source, i + 1, rows[i])
        tokens = tokenize(rows[i], source, tokenizer, max_length, i + 1) if kept else None
        if tokens is not None and tokens.prompt < len(tokens.ids):
            useless = 0
            yield tokens
            continue
        useless += 1
        if useless == 2 * len(rows):  # a whole permutation lies in there
            raise InputError(
                f"training: no row of {source.source} is left: each is dropped by training.decontaminate or its prompt "
                f"fills recover.max_length={max_length}; raise max_length or give other data"
            )


def _chat(row: Any, source: DataSource, tokenizer: Any, number: int) -> tuple[list[int], list[int]]:
    chat, answer = chat_and_answer(row, source, number)
    prompt, full = chat_ids(tokenizer, chat, number), chat_ids(tokenizer, [*chat, *answer], number, ended=True)
    if full[: len(prompt)] != prompt:
        raise InputError(
            f"data.messages: row {number}: the chat template renders the prompt differently with its answer"
        )
    return prompt, full


def chat_ids(tokenizer: Any, chat: list[Message], number: int, ended: bool = False) -> list[int]:
    """A chat by the tokenizer's template; unless it has ended, with the words that begin an answer."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "data.format: `messages` needs a chat template, and the tokenizer has none; use another format"
        )
    try:
        ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=not ended, return_dict=True)[
            "input_ids"
        ]
    except (TemplateError, TypeError) as error:
        raise InputError(
            f"data.messages: row {number}: the model's chat template does not take it ({error}); correct the row"
        ) from error
    return ids


def _pad(sequences: list[Tokens]) -> Batch:
    import torch

    width = max(len(tokens.ids) for tokens in sequences)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens in sequences:
        padding = width - len(tokens.ids)
        rows["input_ids"].append(tokens.ids + [0] * padding)
        rows["attention_mask"].append([1] * len(tokens.ids) + [0] * padding)
        rows["labels"].append(tokens.labels("completion") + [IGNORED] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}
