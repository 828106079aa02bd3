"""How a model's answers are generated: how they are sampled, with which seed, and how each of them ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ptl.config.chat import NO_CHAT, QUESTION, Chat
from ptl.model import checkpoint

SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # fields of generation_config.json
# How several answers to a prompt are sampled where the model's makers recommend nothing. Without a top_k transformers
# would take 50.
PLAIN_SAMPLING = {"temperature": 1.0, "top_k": 0}
MANY_TRUNCATED = 0.2  # share of answers that hit the token limit, above which the log warns


class AnswerNote(NamedTuple):
    """How a generated answer ended."""

    tokens: int
    truncated: bool  # by the token limit
    thought: str = ""  # text before the answer


def seed_of_sample(seed: int, samples: int, number: int) -> int:
    """Give each of several samples its own seed, so that runs with other seeds have other samples."""
    return (seed * samples + number) % 2**31


def recommended_sampling(src: Path) -> dict[str, Any]:
    """Read how the makers of the model in `src` recommend to sample; empty where they recommend greedy answers."""
    recommended = checkpoint.generation_config(src)
    if not recommended.get("do_sample"):
        return {}
    options = {name: recommended[name] for name in SAMPLING if recommended.get(name) is not None}
    return PLAIN_SAMPLING | options


class AnswerNotes:
    """Notes of the time and the answers of a model of the harness, whose class it is mixed into.

    The harness groups and batches requests on its own and returns bare texts. Each model's `_model_generate` therefore
    appends a note for every answer of a batch to `pending`. The harness then calls its cache hook for every answer, in
    the same order and with the prompt, and the note gets its place in `notes`.

    Breaks when the harness calls the hook in another order than that of the batch, or without the prompt: all tests of
    tests/evaluation/test_chat.py and `test_vllm_backend_notes_every_answer` show it.
    """

    apply_chat_template: Callable[..., Any]  # the harness's method
    seed: int = 0  # of answers that are sampled
    sampling: Mapping[str, Any] = {}  # the makers' recommendation; empty: greedy

    def __init__(
        self, *arguments: Any, chat: Chat = NO_CHAT, thoughts: bool = False, **options: Any
    ) -> None:
        self.chat = chat
        self.keeps_thoughts = thoughts
        # The harness's own option `enable_thinking` would make it refuse tasks that generate nothing.
        template = {"chat_template_args": dict(chat.template_kwargs)} if chat.enabled else {}
        super().__init__(*arguments, **template, **options)
        self.start_notes()

    def start_notes(self) -> None:
        """Forget all notes, and stand in for the harness's cache hook."""
        self.cache_hook = self
        self.notes: dict[str, AnswerNote] = {}  # by prompt
        self.pending: deque[AnswerNote] = deque()  # whose prompts the cache hook has yet to name
        self.seconds = 0.0  # in the model, over all requests
        self.cut_prompts = 0  # prompts whose beginning did not fit into the context

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Take the place of `CacheHook.add_partial`, which the harness calls once for each answer."""
        if attr == "generate_until":
            prompt = req[0]
            self.notes[prompt] = self.pending.popleft()

    def close(self) -> None:
        """Free what would outlive the model; nothing does with transformers and llama.cpp."""

    def generate_until(self, requests: list[Any], **options: Any) -> Any:
        """Generate answers, without their thoughts in a chat."""
        from transformers import set_seed

        set_seed(self.seed)
        if not self.chat.enabled:
            return self._timed("generate_until", requests, options)
        texts = self._timed("generate_until", [_without_stops(r) for r in requests], options)
        return [self._answer(request, text) for request, text in zip(requests, texts, strict=True)]

    def loglikelihood(self, requests: list[Any], **options: Any) -> Any:
        """Score continuations of prompts."""
        return self._timed("loglikelihood", requests, options)

    def loglikelihood_rolling(self, requests: list[Any], **options: Any) -> Any:
        """Score whole texts."""
        return self._timed("loglikelihood_rolling", requests, options)

    def _timed(self, method: str, requests: list[Any], options: dict[str, Any]) -> Any:
        """Answer requests by the harness's own method, and add its time to `seconds`."""
        started = time.perf_counter()
        # The answers arrive on the CPU, so that the GPU has finished too.
        answers = getattr(super(), method)(requests, **options)
        self.seconds += time.perf_counter() - started
        return answers

    @cached_property
    def opening(self) -> str:
        """QUESTION as the chat template writes it, with the beginning of the answer."""
        return str(self.apply_chat_template([{"role": "user", "content": QUESTION}]))

    def begun_thought(self, prompt: str) -> str:
        """Return the thought that a prompt of a chat begins (`Chat.begun_thought`); empty where it begins none."""
        return self.chat.begun_thought(prompt, self.opening) if self.chat.enabled else ""

    def _answer(self, request: Any, text: str) -> str:
        """Return what follows the thought, up to the task's texts that end an answer; note the thought.

        The harness has an option for this, `think_end_token`. With it an answer without a thought would lose its
        indentation, and a thought without an end would be the answer.
        """
        if self.keeps_thoughts:
            return text
        from lm_eval.models.utils import postprocess_generated_text

        prompt, options = request.args
        answer = self.chat.answer(self.begun_thought(prompt) + text)
        thought = text.removesuffix(answer).strip()
        self.notes[prompt] = self.notes[prompt]._replace(thought=thought)
        return str(postprocess_generated_text(answer, options.get("until"), None))


def _without_stops(request: Any) -> Any:
    """Let the model end its answer itself: a thought may contain the task's texts that end an answer."""
    prompt, options = request.args
    return replace(request, arguments=(prompt, {**options, "until": []}))
