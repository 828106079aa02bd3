"""A GGUF file as a model of lm-evaluation-harness, answered by llama.cpp, and how fast it generates."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptl.config.run import Evaluate, Speed
from ptl.errors import InputError
from ptl.evaluation.helpers import AnswerNote
from ptl.evaluation.language_models import AnswerNotes
from ptl.evaluation.speed import Measurement, Timer, Times, measure_in_turns
from ptl.evaluation.task_loading import cache_templates
from ptl.model import checkpoint, checks
from ptl.model.config_fields import longrope_limit
from ptl.model.llama_runtime import LlamaContext, LlamaModel, Part, max_sequences

MAX_QUOTED = 80  # characters of a prompt, in an error
MAX_GENERATED = 256  # tokens of an answer whose task has no limit, as in the harness's Hugging Face model


@dataclass
class Answer:
    """A prompt, and what has been generated after it."""

    prompt: list[int]  # tokens
    stop: list[str]  # texts that end an answer
    limit: int  # of tokens
    tokens: list[int] = field(default_factory=list)

    @property
    def last(self) -> Sequence[int]:
        """Enough tokens to have the longest stop text in them."""
        longest = max((len(text.encode()) for text in self.stop), default=0)
        return self.tokens[-longest - 1 :]


def gguf_language_model(file: Path, src: Path, settings: Evaluate) -> Any:
    """The harness's model for a GGUF file that was made of the checkpoint `src`, with the notes of `AnswerNotes`.

    It answers greedily, with the file's own tokens: InputError before the first answer where they are not those of the
    checkpoint's tokenizer, or where the chat template is asked for and is not the checkpoint's.
    """
    from lm_eval.api.model import TemplateLM

    class NotedModel(AnswerNotes, GGUFAnswers, TemplateLM):
        """The harness's methods around ours."""

    cache_templates()
    model = NotedModel(file, src, settings)
    model.start_notes()
    return model


class GGUFAnswers:
    """What a model of the harness (TemplateLM) does, by llama.cpp."""

    notes: dict[str, AnswerNote]  # of AnswerNotes
    cut_prompts: int
    max_gen_toks = MAX_GENERATED

    def __init__(self, file: Path, src: Path, settings: Evaluate) -> None:
        super().__init__()
        self.tokenizer = checks.load_tokenizer(src)
        self.model = LlamaModel(file)
        self._batch_size = settings.batch_size
        # llama.cpp chooses longrope's factors by the size of the context: here as in a server for texts of max_length.
        limit, longest = longrope_limit(checkpoint.read_config(src)), settings.max_length
        self._context_length = longest if limit and longest and longest > limit else 0
        self.max_length: int = longest or limit or self.model.context_length
        template = self.tokenizer.chat_template
        # llama.cpp's server would write another chat than the evaluation does.
        if settings.chat_template and (not template or self.model.chat_template() != template):
            raise InputError(
                f"{file} does not have the chat template of the checkpoint's tokenizer",
                field="evaluate.chat_template",
                remedy="export the checkpoint again with its template, or set it to false",
            )

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint's folder, for the harness's caches."""
        return str(self.tokenizer.name_or_path)

    @property
    def eot_token_id(self) -> int:
        """The token at which an answer ends."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text whose first token has a likelihood too."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with those at its ends unless they are written out or not asked for."""
        from lm_eval.models.utils import has_bos_prefix

        special = add_special_tokens
        if special is None:
            special = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return checked_tokens(self.model, self.tokenizer, string, special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, up to a text that ends them."""
        from lm_eval.models.utils import postprocess_generated_text as cut_at

        # All prompts are read, and their tokens compared, before the first answer.
        answers = [self._ask(*request.args) for request in requests]
        answer_all(self.model, self.tokenizer, answers, self._batch_size, self._context_length)
        texts = []
        for request, answer in zip(requests, answers, strict=True):
            text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            ended = len(answer.tokens) < answer.limit or any(stop in text for stop in answer.stop)
            self.notes[request.args[0]] = AnswerNote(len(answer.tokens), truncated=not ended)
            texts.append(cut_at(text, answer.stop, None))
        return texts

    def _ask(self, prompt: str, generation: dict[str, Any]) -> Answer:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options = normalize_gen_kwargs(generation, self.max_gen_toks)
        if options.get("do_sample"):
            raise InputError(
                "a task has answers sampled (do_sample), and of a GGUF file they are greedy",
                field="evaluate.tasks",
                remedy="use a task without do_sample",
            )
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(options.get("until"), eos=eos)
        tokens = self.tok_encode(prompt)
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise InputError(
                f"an answer may have {options['max_gen_toks']} tokens, and prompt and answer together "
                f"{self.max_length}",
                field="evaluate.tasks.max_new_tokens",
                remedy="lower it, or raise evaluate.max_length",
            )
        self.cut_prompts += len(tokens) > room
        return Answer(tokens[-room:], stop, options["max_gen_toks"])

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],  # of the text, the prompt, and what may follow it
        **_: Any,
    ) -> list[tuple[float, bool]]:
        # The last token has no other after it.
        texts = [(prompt + choice)[-self.max_length - 1 :] for _, prompt, choice in requests]
        return loglikelihoods(self.model, texts, [len(choice) for *_, choice in requests], self._context_length)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the context's length."""
        from lm_eval import utils

        sums = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            parts = [("", *utils.make_disjoint_window(window)) for window in windows]
            sums.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(parts)))
        return sums


def checked_tokens(model: LlamaModel, tokenizer: Any, text: str, special: bool) -> list[int]:
    """The file's tokens of a text. Raises InputError where the checkpoint's tokenizer gives others."""
    tokens = model.tokens(text, special)
    expected = tokenizer.encode(text, add_special_tokens=special)
    if tokens == expected:
        return tokens
    same = 0
    while tokens[same : same + 1] == expected[same : same + 1]:
        same += 1
    after = tokenizer.decode(expected[:same])[-40:]
    raise InputError(
        f"llama.cpp and the checkpoint's tokenizer give different tokens for {text[:MAX_QUOTED]!r} after {after!r}: "
        f"{tokens[same : same + 8]} and {expected[same : same + 8]}",
        field="export",
        remedy="serve this checkpoint with transformers or vLLM, or remove such characters from the prompts",
    )


def answer_all(model: LlamaModel, tokenizer: Any, answers: list[Answer], batch_size: int, context_length: int) -> None:
    """Generate the tokens of all answers greedily; a prompt takes the sequence of an answer that has ended.

    Sequences have room for `context_length` tokens, or more where the longest needs it.
    """
    waiting = deque(sorted(answers, key=lambda answer: -len(answer.prompt)))
    longest = max(context_length, *(len(answer.prompt) + answer.limit for answer in answers))
    sequences = min(batch_size, len(answers), max_sequences())
    context = LlamaContext(model, sequences, longest)
    free = list(range(sequences))
    running: dict[int, Answer] = {}  # by sequence
    while waiting or running:
        parts = [Part(sequence, answer.tokens[-1:], 1) for sequence, answer in running.items()]
        while waiting and free:
            sequence = free.pop()
            answer = running[sequence] = waiting.popleft()
            context.forget(sequence)
            parts.append(Part(sequence, answer.prompt, 1))
        chosen = context.append(parts).argmax(-1)  # [parts]
        for part, token in zip(parts, chosen.tolist(), strict=True):
            if _ends(model, tokenizer, running[part.sequence], token):
                del running[part.sequence]
                free.append(part.sequence)


def _ends(model: LlamaModel, tokenizer: Any, answer: Answer, token: int) -> bool:
    """Add a token to an answer, unless it is an end itself; whether the answer is complete."""
    if model.is_end(token):
        return True
    answer.tokens.append(token)
    if len(answer.tokens) == answer.limit:
        return True
    text = tokenizer.decode(answer.last, skip_special_tokens=True)
    return any(stop in text for stop in answer.stop)


def loglikelihoods(
    model: LlamaModel, texts: list[list[int]], lengths: list[int], context_length: int
) -> list[tuple[float, bool]]:
    """Of the last `lengths` tokens of each text: their log-likelihood, and whether each was the most likely one.

    The sequence has room for `context_length` tokens, or more, as in `answer_all`.
    """
    results: dict[int, tuple[float, bool]] = {}
    context = LlamaContext(model, 1, max(context_length, *map(len, texts)))
    # What a text has in common with the one before it is not read again.
    before: list[int] = []
    for i in sorted(range(len(texts)), key=texts.__getitem__):
        read = texts[i][:-1]
        kept = min(_common(before, read), len(read) - lengths[i])
        context.forget(0, kept)
        logits = context.append([Part(0, read[kept:], lengths[i])])  # [length, vocabulary]
        results[i] = _likelihood(logits.astype(np.float64), texts[i][-lengths[i] :])
        before = read
    return [results[i] for i in range(len(texts))]


def _common(one: list[int], other: list[int]) -> int:
    """The length of what both begin with."""
    for i, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return i
    return min(len(one), len(other))


def _likelihood(
    logits: NDArray[np.float64],  # [length, vocabulary]
    tokens: list[int],  # of that length
) -> tuple[float, bool]:
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted[range(len(tokens)), tokens] - np.log(np.exp(shifted).sum(-1))
    return float(logs.sum()), logits.argmax(-1).tolist() == tokens


def gguf_speed(files: Mapping[str, Path], settings: Speed, seed: int = 0) -> dict[str, list[Measurement]]:
    """Prefill and decode speed of GGUF files in llama.cpp, in turns: by name, rows as of `speed.measure_speed`."""

    def timer(model: LlamaModel, batch: int) -> Timer:
        generator = random.Random(seed)
        prompts = [generator.choices(range(model.vocabulary_size), k=settings.prompt_tokens) for _ in range(batch)]
        context = LlamaContext(model, batch, settings.prompt_tokens + settings.new_tokens)
        return partial(_time_once, context, prompts, settings.new_tokens)

    return measure_in_turns({name: partial(timer, LlamaModel(file)) for name, file in files.items()}, settings)


def _time_once(context: LlamaContext, prompts: list[list[int]], new_tokens: int, passes: int) -> Times:
    """Seconds for the prompts, the mean of `passes`, and for `new_tokens` greedy steps after them."""
    started = time.perf_counter()
    for _ in range(passes):
        for sequence in range(len(prompts)):
            context.forget(sequence)
        logits = context.append([Part(sequence, prompt, 1) for sequence, prompt in enumerate(prompts)])
    filled = time.perf_counter()
    for _ in range(new_tokens):
        chosen = logits.argmax(-1).tolist()  # [batch]
        logits = context.append([Part(sequence, [token], 1) for sequence, token in enumerate(chosen)])
    return (filled - started) / passes, time.perf_counter() - filled
