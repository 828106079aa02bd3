"""A GGUF file as a model of lm-evaluation-harness, answered by llama.cpp, and how fast it generates."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptl.config.chat import NO_CHAT, Chat
from ptl.config.run import Evaluate, Speed
from ptl.errors import InputError
from ptl.evaluation import tasks
from ptl.evaluation.language_models import cache_templates, noted_hflm
from ptl.evaluation.speed import Measurement, Times, measure_in_turns
from ptl.model import checkpoint, pretrained
from ptl.model.llama_runtime import LlamaContext, LlamaModel, Part, max_sequences
from ptl.model.shapes import longrope_limit

MAX_QUOTED = 80  # characters of a prompt, in an error


def gguf_language_model(file: Path, src: Path, settings: Evaluate, chat: Chat = NO_CHAT) -> Any:
    """The harness's model for a GGUF file that was made of the checkpoint `src`, with the notes of `AnswerNotes`.

    It is the harness's model of transformers, with llama.cpp in place of the weights, and answers greedily. InputError
    before the first answer where the file's tokens are not those of the checkpoint's tokenizer, or where the chat
    template is asked for and is not the checkpoint's.
    """
    tasks.check_greedy(settings)
    model = LlamaModel(file)
    if chat.enabled:
        _check_template(model, pretrained.load_tokenizer(src).chat_template, file)
    # llama.cpp chooses longrope's factors by the size of the context: here as in a server for texts of max_length.
    limit, longest = longrope_limit(checkpoint.read_config(src)), settings.max_length
    context_length = longest if limit and longest and longest > limit else 0

    class GGUFModel(noted_hflm()):  # type: ignore[misc]  # a class of the harness
        def _create_model(self, *_: Any, **__: Any) -> None:
            # the harness would move a model to the GPU
            self._model = SimpleNamespace(to=lambda device: None)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            """As the harness does; the file's tokens are compared with those."""
            from lm_eval.models.utils import has_bos_prefix

            special = add_special_tokens
            if special is None:
                special = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            return checked_tokens(model, self.tokenizer, string, special)

        def _model_generate(
            self, context: Any, max_length: int, stop: list[str], **options: Any
        ) -> Any:
            import torch

            # Without the padding in front
            prompts = [
                row[mask.bool()].tolist()
                for row, mask in zip(context, options["attention_mask"], strict=True)
            ]
            limit = max_length - context.shape[1]
            answers = answer(model, self.tokenizer, prompts, stop, limit, context_length)
            for tokens in answers:
                self.pending.append(self.note(tokens, stop, ended=len(tokens) < limit))
            padded = [
                tokens + [self.tokenizer.pad_token_id] * (limit - len(tokens)) for tokens in answers
            ]
            return torch.cat([context, torch.tensor(padded)], dim=1)  # [batch, prompt + answer]

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **_: Any
        ) -> list[tuple[float, bool]]:
            # Of the text, the prompt, and what may follow it. The last token has no other after it.
            texts = [(prompt + choice)[-self.max_length - 1 :] for _, prompt, choice in requests]
            lengths = [len(choice) for _, _, choice in requests]
            return loglikelihoods(model, texts, lengths, context_length)

    cache_templates()
    return GGUFModel(
        pretrained=str(src),
        device="cpu",
        batch_size=min(settings.batch_size, max_sequences()),
        max_length=longest or limit or model.context_length,
        chat=chat,
    )


def _check_template(model: LlamaModel, template: str | None, file: Path) -> None:
    """Raise InputError where llama.cpp's server would write another chat than the evaluation does."""
    if not template or model.chat_template() != template:
        raise InputError(
            f"{file} does not have the chat template of the checkpoint's tokenizer",
            field="chat.enabled",
            remedy="export the checkpoint again with its template, or set it to false",
        )


def checked_tokens(model: LlamaModel, tokenizer: Any, text: str, special: bool) -> list[int]:
    """The file's tokens of a text. Raises InputError where the checkpoint's tokenizer gives others."""
    tokens = model.tokens(text, special)
    expected: list[int] = tokenizer.encode(text, add_special_tokens=special)
    if tokens == expected:
        return tokens
    same = _common(tokens, expected)
    after = tokenizer.decode(expected[:same])[-40:]
    raise InputError(
        f"llama.cpp and the checkpoint's tokenizer give different tokens for {text[:MAX_QUOTED]!r} after {after!r}: "
        f"{tokens[same : same + 8]} and {expected[same : same + 8]}",
        field="export",
        remedy="serve this checkpoint with transformers or vLLM, or remove such characters from the prompts",
    )


def _common(one: list[int], other: list[int]) -> int:
    """The length of what both begin with."""
    same = 0
    while one[same : same + 1] == other[same : same + 1] != []:
        same += 1
    return same


def answer(
    model: LlamaModel,
    tokenizer: Any,
    prompts: list[list[int]],
    stop: list[str],  # texts that end an answer
    limit: int,  # tokens of an answer
    context_length: int,  # tokens that a sequence has room for; more where the longest needs it
) -> list[list[int]]:
    """Greedy answers to prompts, all at once: the tokens up to the one that ends an answer, or with its stop text."""
    longest = max(map(len, prompts)) + limit
    context = LlamaContext(model, len(prompts), max(context_length, longest))
    answers: list[list[int]] = [[] for _ in prompts]
    # Enough tokens to have the longest stop text in them
    last = 1 + max((len(text.encode()) for text in stop), default=0)
    parts = [Part(sequence, prompt, 1) for sequence, prompt in enumerate(prompts)]
    while parts:
        chosen = context.append(parts).argmax(-1).tolist()  # [parts]
        running = []
        for (sequence, _, _), token in zip(parts, chosen, strict=True):
            if model.is_end(token):
                continue
            tokens = answers[sequence]
            tokens.append(token)
            text = tokenizer.decode(tokens[-last:], skip_special_tokens=True)
            if len(tokens) < limit and not any(ending in text for ending in stop):
                running.append(Part(sequence, [token], 1))
        parts = running
    return answers


def loglikelihoods(
    model: LlamaModel, texts: list[list[int]], lengths: list[int], context_length: int
) -> list[tuple[float, bool]]:
    """Of the last `lengths` tokens of each text: their log-likelihood, and whether each was the most likely one.

    The sequence has room for `context_length` tokens, or more, as in `answer`.
    """
    results: dict[int, tuple[float, bool]] = {}
    context = LlamaContext(model, 1, max(context_length, *map(len, texts)))
    # What a text has in common with the one before it is not read again.
    before: list[int] = []
    for i in sorted(range(len(texts)), key=texts.__getitem__):
        read, expected = texts[i][:-1], texts[i][-lengths[i] :]
        kept = min(_common(before, read), len(read) - lengths[i])
        context.forget(0, kept)
        logits = context.append([Part(0, read[kept:], lengths[i])])  # [length, vocabulary]
        results[i] = _likelihood(logits.astype(np.float64), expected)
        before = read
    return [results[i] for i in range(len(texts))]


def _likelihood(
    logits: NDArray[np.float64],  # [length, vocabulary]
    tokens: list[int],  # of that length
) -> tuple[float, bool]:
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted[range(len(tokens)), tokens] - np.log(np.exp(shifted).sum(-1))
    return float(logs.sum()), logits.argmax(-1).tolist() == tokens


def gguf_speed(
    files: Mapping[str, Path], settings: Speed, seed: int = 0
) -> dict[str, list[Measurement]]:
    """Prefill and decode speed of GGUF files in llama.cpp, in turns: by name, rows as of `speed.measure_in_turns`."""
    timers = {name: partial(_time_once, LlamaModel(file), seed) for name, file in files.items()}
    return measure_in_turns(timers, settings)


def _time_once(model: LlamaModel, seed: int, batch: int, passes: int) -> Times:
    """Seconds for the prompts, the mean of `passes`, and for the greedy steps after them."""
    generator = random.Random(seed)
    context = LlamaContext(model, batch, Speed.prompt_tokens + Speed.new_tokens)
    prompts = [
        Part(sequence, generator.choices(range(model.vocabulary_size), k=Speed.prompt_tokens), 1)
        for sequence in range(batch)
    ]
    started = time.perf_counter()
    for _ in range(passes):
        for sequence in range(batch):
            context.forget(sequence)
        logits = context.append(prompts)
    filled = time.perf_counter()
    for _ in range(Speed.new_tokens):
        chosen = logits.argmax(-1).tolist()  # [batch]
        logits = context.append(
            [Part(sequence, [token], 1) for sequence, token in enumerate(chosen)]
        )
    return (filled - started) / passes, time.perf_counter() - filled
