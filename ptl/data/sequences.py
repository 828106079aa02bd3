"""Calibration text and training sets: rows become token sequences, the same way everywhere."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ptl.config.chat import NO_CHAT, Chat
from ptl.config.data import DataSource, TrainingData
from ptl.config.run import Calibration
from ptl.data.chat_templates import (
    TokenIds,
    by_template,
    chat_ids,
    end_of_turn,
    opening,
    space_before_answer,
    up_to_end,
)
from ptl.data.decontamination import Filter
from ptl.data.sources import (
    THOUGHT,
    SourceRow,
    chat_and_answer,
    prompt_of,
    read_rows,
    texts,
    turns,
    user_turn,
)
from ptl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# input_ids, attention_mask, labels: int64 [B, T], padded on the right; of calibration text also source: int64 [B]
Batch = dict[str, "Tensor"]
IGNORED = -100  # label of a token without loss, as in torch's cross_entropy


@dataclass(frozen=True)
class Tokens:
    """One sequence; the prompt carries no loss when training on completions only."""

    ids: TokenIds
    prompt: int  # tokens of the prompt, at the front
    cut: bool = False  # whether max_length left out its end
    source: int = 0  # its number in the list of calibration text
    passes: float = field(default=0.0, compare=False)  # over its source, up to here
    passed_over: int = field(default=0, compare=False)  # rows before it that gave no sequence

    @property
    def is_useful(self) -> bool:
        """Whether there is something to train on: a completion, or a text."""
        return self.prompt < len(self.ids)

    def labels(self, loss: str) -> TokenIds:
        """Labels for next-token training: all tokens, or the completion's only."""
        if loss == "all":
            return self.ids
        return [IGNORED] * self.prompt + self.ids[self.prompt :]


def tokenize(row: SourceRow, tokenizer: Any, max_length: int, chat: Chat = NO_CHAT) -> Tokens:
    """One row as tokens, truncated to max_length, and ended by EOS or by the chat template's end of a turn.

    Unless the row's answer was truncated when it was written: then it has no end.
    """
    if chat.enabled and row.source.format != "text":
        prompt, ids = _served_tokens(row, tokenizer, chat)
    elif row.source.format == "messages":
        prompt, ids = _chat_tokens(row, tokenizer)
    else:
        prompt, ids = _text_tokens(row, tokenizer)
    # a prompt that fills max_length leaves no completion
    return Tokens(ids[:max_length], min(len(prompt), max_length), len(ids) > max_length)


def _text_tokens(row: SourceRow, tokenizer: Any) -> tuple[TokenIds, TokenIds]:
    """Tokens of the prompt, and of the prompt with its completion."""
    eos = tokenizer.eos_token_id
    prompt_text, completion_text = texts(row)
    # Many data sets of text have blank rows; a blank answer is an error.
    if not completion_text.strip():
        return [], []
    prompt = tokenizer(prompt_text)["input_ids"] if prompt_text else []
    # some tokenizers end every text by themselves
    if prompt and prompt[-1] == eos:
        prompt = prompt[:-1]
    # tokens such as BOS begin the sequence, whichever part that is
    completion = tokenizer(completion_text, add_special_tokens=not prompt)["input_ids"]
    if completion and completion[-1] == eos:
        completion = completion[:-1]
    return prompt, prompt + completion + ([] if row.is_truncated else [eos])


def _served_tokens(row: SourceRow, tokenizer: Any, chat: Chat) -> tuple[TokenIds, TokenIds]:
    """Tokens of the prompt as a chat, and of that with the answer as the model would write it.

    The template has no part in the answer: many leave out the thought of one that has been given.
    """
    if row.source.format == "messages":
        before, (last,) = chat_and_answer(row)
        if last.get("tool_calls"):  # each template writes them in its own way
            return _chat_tokens(row, tokenizer, chat)
        answer = chat.with_thought(last.get(THOUGHT) or "", last["content"])
    else:
        prompt_text, answer = texts(row)
        before = user_turn(prompt_text)
    prompt = chat_ids(tokenizer, before, row, chat)
    prompt_text = by_template(tokenizer, before, row, chat, tokenize=False)
    begun = chat.begun_thought(prompt_text, opening(tokenizer, chat))
    space = "" if begun else space_before_answer(tokenizer, chat)
    completion = _continuation(
        prompt_text, prompt, space + chat.continued(begun, answer), tokenizer, space
    )
    end = [] if row.is_truncated else end_of_turn(tokenizer, chat)
    return prompt, prompt + completion + end


def _continuation(
    prompt_text: str, prompt: TokenIds, text: str, tokenizer: Any, space: str
) -> TokenIds:
    """Tokens of a text that continues a prompt.

    White space at its front may be one token with what is before or after it, so both are read together.
    """
    alone: TokenIds = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not space:
        return alone
    whole: TokenIds = tokenizer(prompt_text + text, add_special_tokens=False)["input_ids"]
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone


def _chat_tokens(row: SourceRow, tokenizer: Any, chat: Chat = NO_CHAT) -> tuple[TokenIds, TokenIds]:
    """Tokens of the turns before the answer, and of the chat with its answer."""
    before, answer = chat_and_answer(row)
    prompt = chat_ids(tokenizer, before, row, chat)
    full = chat_ids(tokenizer, before + answer, row, chat, ended=True)
    # the prompt's length is where the labels begin
    if full[: len(prompt)] != prompt:
        raise _written_otherwise(row)
    return prompt, prompt + up_to_end(full[len(prompt) :], tokenizer, chat)


def check_chat(row: SourceRow, tokenizer: Any, chat: Chat, *, answers: bool) -> None:
    """Raise InputError for a chat that the template does not take, or whose prompt it writes otherwise with the answer.

    By its texts: `tokenize` compares the tokens, which takes far longer.
    """
    before, answer = chat_and_answer(row) if answers else (turns(row)[0], [])
    prompt = by_template(tokenizer, before, row, chat, tokenize=False)
    # As a model is served the answer is not written by the template, unless it calls tools.
    if answer and (not chat.enabled or answer[0].get("tool_calls")):
        full = by_template(tokenizer, before + answer, row, chat, ended=True, tokenize=False)
        if not full.startswith(prompt):
            raise _written_otherwise(row)


def _written_otherwise(row: SourceRow) -> InputError:
    return row.error(
        ": the model's chat template writes the prompt otherwise with its answer",
        "set chat.enabled: true, which trains on the answer as it is served, or leave the row out",
    )


def order(count: int, seed: int) -> Iterator[int]:
    """Endless row numbers: one deterministic permutation after another, so that data runs out only to begin again."""
    for epoch in itertools.count():
        # a seed of its own, so that no epoch repeats the order of another
        shuffle = random.Random(f"{seed}/{epoch}")
        yield from shuffle.sample(range(count), count)


def calibration_batches(
    settings: Calibration, tokenizer: Any, seed: int, chat: Chat = NO_CHAT
) -> list[Batch]:
    """Calibration rows as right-padded batches, those of equal length together.

    Only the completions have labels; a text without a prompt is all completion.
    """
    import torch

    # by length: little padding
    rows = sorted(
        calibration_rows(settings, tokenizer, seed, chat), key=lambda tokens: len(tokens.ids)
    )
    batches = []
    for begin in range(0, len(rows), settings.batch_size):
        group = rows[begin : begin + settings.batch_size]
        batch = {
            "input_ids": _pad([tokens.ids for tokens in group], 0),  # [B, T]
            "attention_mask": _pad([[1] * len(tokens.ids) for tokens in group], 0),  # [B, T]
            "labels": _pad([tokens.labels("completion") for tokens in group], IGNORED),  # [B, T]
            "source": torch.tensor([tokens.source for tokens in group]),  # [B]
        }
        batches.append(batch)
    return batches


def _pad(rows: Sequence[TokenIds], value: int) -> Tensor:
    """Rows of numbers as one tensor, filled up on the right to the longest: int64 [B, T]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def calibration_rows(
    settings: Calibration, tokenizer: Any, seed: int, chat: Chat = NO_CHAT
) -> list[Tokens]:
    """Of each source its share of the rows, drawn with the seed, or all of them."""
    *ends, total = itertools.accumulate(source.weight for source in settings.data)
    bounds = [round(settings.num_sequences * end / total) for end in (0, *ends, total)]
    sequences = []
    for number, (source, (begin, end)) in enumerate(
        zip(settings.data, itertools.pairwise(bounds), strict=True)
    ):
        rows = read_rows(source)
        drawn = itertools.islice(order(len(rows), seed), len(rows))  # none twice
        tokenized = (
            tokenize(SourceRow(rows[i], source, i + 1), tokenizer, settings.max_length, chat)
            for i in drawn
        )
        found = itertools.islice(
            (tokens for tokens in tokenized if tokens.ids), max(1, end - begin)
        )
        sequences += [replace(tokens, source=number) for tokens in found]
    return sequences


def training_chunk(
    data: TrainingData,
    tokenizer: Any,
    max_length: int,  # tokens of a sequence
    *,
    seed: int,
    earlier: Sequence[int],  # the budgets before this one
    budget: int,  # tokens
    leak_filter: Filter | None = None,  # drops rows that share text with a benchmark
    chat: Chat = NO_CHAT,
) -> list[Tokens]:
    """The sequences of one budget: exactly `budget` tokens, none from a sequence that an earlier budget began.

    The run reads one endless shuffled stream, which the budgets take from one after another. The last sequence is
    truncated at its front, so that the count is exact and the answer stays; it comes first, so that it never makes a
    batch of its own.
    """
    streams = [
        _source_stream(source, tokenizer, max_length, seed, leak_filter, chat)
        for source in data.sources
    ]
    stream = _mixed(streams, [source.weight for source in data.sources])
    # read again from the start, as an attempt on another machine does
    for earlier_budget in earlier:
        _take(stream, earlier_budget)
    chunk = _take(stream, budget)
    excess = sum(len(tokens.ids) for tokens in chunk) - budget
    if excess > 0:
        last = chunk.pop()
        prompt = max(0, last.prompt - excess)
        chunk.insert(0, replace(last, ids=last.ids[excess:], prompt=prompt))
    return chunk


def _take(stream: Iterator[Tokens], budget: int) -> list[Tokens]:
    """Whole sequences of at least `budget` tokens."""
    sequences = []
    while budget > 0:
        tokens = next(stream)
        sequences.append(tokens)
        budget -= len(tokens.ids)
    return sequences


def prompt_rows(
    source: DataSource,
    *,
    seed: int,
    skip: int,  # those of earlier iterations
    count: int,
    # as by `leaves_room`; other prompts are passed over
    fits: Callable[[SourceRow], bool] = lambda row: True,
    leak_filter: Filter | None = None,  # drops rows that share text with a benchmark
) -> list[SourceRow]:
    """Rows for prompts, after the first `skip` of the run's order."""
    rows = read_rows(source)
    # without a filter no row is read but those that are picked
    kept: Sequence[int] = range(len(rows))
    if leak_filter is not None:
        numbered = (SourceRow(columns, source, number) for number, columns in enumerate(rows, 1))
        kept = [row.number - 1 for row in numbered if leak_filter.keeps(row)]
    if not kept:
        raise InputError(
            f"each of the {len(rows)} rows of {source.source} is dropped",
            field="training.decontaminate",
            remedy="give other data",
        )

    def shuffled() -> Iterator[SourceRow]:
        return (SourceRow(rows[kept[i]], source, kept[i] + 1) for i in order(len(kept), seed))

    if not any(map(fits, itertools.islice(shuffled(), len(kept)))):
        raise InputError(
            f"no prompt of {source.source} leaves room for an answer",
            field="training",
            remedy="lower the tokens of an answer (recover.max_completion_length, training.max_new_tokens)",
        )
    return list(itertools.islice(filter(fits, shuffled()), skip, skip + count))


def leaves_room(row: SourceRow, tokenizer: Any, chat: Chat, room: float) -> bool:
    """Whether a row's prompt, as the model reads it, has at most so many tokens."""
    prompt = prompt_of(row, chat)
    ids = (
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else chat_ids(tokenizer, prompt, row, chat)
    )
    return len(ids) <= room


def _mixed(streams: Sequence[Iterator[Tokens]], weights: Sequence[float]) -> Iterator[Tokens]:
    """Endless sequences; the source that is furthest behind its share of the tokens comes next."""
    taken = [0.0] * len(streams)  # tokens over weight
    while True:
        behind = taken.index(min(taken))
        tokens = next(streams[behind])
        # as if all weights were 1
        taken[behind] += len(tokens.ids) / weights[behind]
        yield tokens


def _source_stream(
    source: DataSource,
    tokenizer: Any,
    max_length: int,
    seed: int,
    leak_filter: Filter | None,
    chat: Chat,
) -> Iterator[Tokens]:
    """One source, again and again, without rows that the filter drops and prompts that leave no room for an answer."""
    rows = read_rows(source)
    useless = 0  # rows without a sequence, one after another
    for drawn, i in enumerate(order(len(rows), seed), 1):
        row = SourceRow(rows[i], source, i + 1)
        useless += 1
        if leak_filter is None or leak_filter.keeps(row):
            tokens = tokenize(row, tokenizer, max_length, chat)
            if tokens.is_useful:
                yield replace(tokens, passes=drawn / len(rows), passed_over=useless - 1)
                useless = 0
        # so many in a row hold one complete permutation, of which no row is of use
        if useless == 2 * len(rows):
            raise no_row_left(source, max_length)


def no_row_left(source: DataSource, max_length: int) -> InputError:
    """The error of a source that gives no sequence to train on."""
    return InputError(
        f"no row of {source.source} is left: each is blank or dropped by training.decontaminate, or its prompt fills "
        f"recover.max_length={max_length}",
        field="training",
        remedy="raise max_length or give other data",
    )
