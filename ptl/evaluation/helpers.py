"""How an evaluation's requests are answered: noted, and divided among processes with the model on a GPU of their own.

The harness stays in one process, and so does all that depends on the order of the items. Its own way of using several
GPUs (accelerate) gives each process its own items, whose few-shot examples are then drawn in another order: prompts
would depend on the number of GPUs, and scores could not be compared item by item.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ptl.config.chat import NO_CHAT, QUESTION, Chat
from ptl.config.run import Evaluate
from ptl.errors import WorkError
from ptl.model import checkpoint
from ptl.processes import VISIBLE_GPUS, die_with, listed_gpus, on_gpus

ENDING = 10.0  # seconds in which a helper that is ended may clean up
SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # of generation_config.json
# Of several answers to a prompt, where a model's makers recommend none; without a top_k transformers would take 50.
PLAIN_SAMPLING = {"temperature": 1.0, "top_k": 0}
MANY_TRUNCATED = 0.2  # share of answers that hit the token limit, above which the log warns


class AnswerNote(NamedTuple):
    """How a generated answer ended."""

    tokens: int
    truncated: bool  # by the token limit
    thought: str = ""  # what the model wrote before its answer


class Share(NamedTuple):
    """What a helper has answered."""

    answers: list[Any]  # in the order of its requests
    notes: Mapping[str, AnswerNote]  # by prompt
    cut_prompts: int


def seed_of_sample(seed: int, samples: int, number: int) -> int:
    """Of one of several samples: runs with other seeds have other samples."""
    return (seed * samples + number) % 2**31


def recommended_sampling(src: Path) -> dict[str, Any]:
    """How the makers of the model in `src` recommend to sample; empty: greedily."""
    recommended = checkpoint.generation_config(src)
    if not recommended.get("do_sample"):
        return {}
    given = {name: recommended[name] for name in SAMPLING if recommended.get(name) is not None}
    return PLAIN_SAMPLING | given


class Helper:
    """A process with the model on GPU `number` of this step; its first share, when it has loaded it, is empty.

    `load` makes the model there: a function that can be pickled.
    """

    def __init__(self, load: Callable[[], Any], number: int) -> None:
        spawn = get_context("spawn")  # a forked process cannot use CUDA
        self._number = number
        self._connection, theirs = spawn.Pipe()
        work = (theirs, load, number, os.getpid())
        self._process = spawn.Process(target=_answer_requests, args=work, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, arguments: list[tuple[Any, ...]], seed: int = 0) -> None:
        """Have requests of one kind answered: generate_until, loglikelihood or loglikelihood_rolling."""
        with contextlib.suppress(OSError):  # it has ended: `share` says so
            self._connection.send((method, arguments, seed))

    def share(self) -> Share:
        """Wait for the answers. Raises WorkError where the helper has failed."""
        try:
            share: Share | str = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise self._ended() from None
        if isinstance(share, str):  # its error
            raise self._failed(share)
        return share

    def check(self) -> None:
        """Raise WorkError where the process has ended: it waits for requests until it is closed."""
        if not self._process.is_alive():
            self.share()  # its error, if it could send one
            raise self._ended()

    def close(self) -> None:
        """End the process, also while it works on a share that nobody needs any more."""
        self._process.terminate()
        self._process.join(ENDING)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ended(self) -> WorkError:
        return self._failed(f"exit code {self._process.exitcode}")

    def _failed(self, reason: str) -> WorkError:
        return WorkError(
            f"process {self._number} of those that answer failed: {reason}",
            field="evaluate",
            remedy="see its output above; evaluate.processes: 1 uses a single process, and a smaller "
            "evaluate.batch_size less memory",
        )


def _answer_requests(
    connection: Connection, load: Callable[[], Any], number: int, parent: int
) -> None:
    """A helper's process: answer requests until it is ended."""
    # Ctrl-C reaches every process of the command: the one that evaluates ends this one, whose libraries then clean up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    die_with(parent)
    # Before torch is imported. On CPUs one thread each: helpers share the cores.
    os.environ[VISIBLE_GPUS] = visible_gpu(number, os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from lm_eval.api.instance import Instance

    try:
        model = load()
        connection.send(Share([], {}, 0))
        while True:
            method, arguments, seed = connection.recv()
            model.seed = seed + number
            model.start_notes()
            requests = [Instance(method, {}, request, 0) for request in arguments]
            answers = getattr(model, method)(requests, disable_tqdm=True)
            connection.send(Share(answers, model.notes, model.cut_prompts))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise


def visible_gpu(number: int, environment: Mapping[str, str]) -> str:
    """The `number`-th of the GPUs that a process with this environment sees; empty where it has no such GPU."""
    devices = listed_gpus(environment)
    if devices is None:
        return str(number)
    return devices[number] if number < len(devices) else ""


def processes_for(settings: Evaluate) -> int:
    """How many processes answer; vLLM has one in any case."""
    return on_gpus(settings.processes, "evaluate")


def divided(requests: Sequence[tuple[Any, ...]], processes: int) -> list[list[int]]:
    """The positions of each process's requests; all requests of one context go to the same process.

    The harness reads a context once for all choices of a single token (MMLU has four). Two processes would read it
    twice.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    process_of: dict[Hashable, int] = {}  # by context
    for position, request in enumerate(requests):
        # Requests without a context have nothing in common, and may be half of a task's.
        context = request[0] or position
        process = process_of.setdefault(context, len(process_of) % processes)
        shares[process].append(position)
    return shares


def _divided(name: str) -> Callable[..., Any]:
    """A method of the harness's model: its requests are divided among all processes, its time goes to `seconds`."""

    def run(self: AnswerNotes, requests: list[Any], **options: Any) -> Any:
        started = time.perf_counter()
        if name == "generate_until":
            from transformers import set_seed

            set_seed(self.seed)
        own, *others = divided([request.args for request in requests], 1 + len(self.helpers))
        asked = [
            (helper, positions)
            for helper, positions in zip(self.helpers, others, strict=True)
            if positions
        ]
        for helper, positions in asked:
            helper.ask(name, [requests[position].args for position in positions], self.seed)
        own_requests = [requests[position] for position in own]
        answer_all = getattr(super(AnswerNotes, self), name)
        # It ends on the CPU: the GPU has finished too.
        if name == "generate_until" and self.chat.enabled:
            whole = answer_all([_without_stops(request) for request in own_requests], **options)
            own_answers = map(self._answer, own_requests, whole)
        else:
            own_answers = answer_all(own_requests, **options)
        answers = dict(zip(own, own_answers, strict=True))  # by position
        for helper, positions in asked:
            share = helper.share()
            answers.update(zip(positions, share.answers, strict=True))
            self.notes.update(share.notes)
            self.cut_prompts += share.cut_prompts
        self.seconds += time.perf_counter() - started
        return [answers[position] for position in range(len(requests))]

    return run


def _without_stops(request: Any) -> Any:
    """A request whose answer ends where the model ends it: a thought may have the task's texts in it."""
    context, options = request.args
    return replace(request, arguments=(context, {**options, "until": []}))


class AnswerNotes:
    """To be mixed into a model of the harness: notes its time and how every answer ended; may have helpers."""

    apply_chat_template: Callable[..., Any]  # of the harness's model
    helpers: Sequence[Helper] = ()
    seed: int = 0  # of answers that are sampled
    sampling: Mapping[str, Any] = {}  # that the model's makers recommend; empty: greedily

    def __init__(
        self, *arguments: Any, chat: Chat = NO_CHAT, thoughts: bool = False, **options: Any
    ) -> None:
        self.chat = chat
        self.thoughts = thoughts  # whether they stay in the answers
        # Not `enable_thinking`, with which the harness refuses tasks that generate nothing.
        template = {"chat_template_args": dict(chat.template_kwargs)} if chat.enabled else {}
        super().__init__(*arguments, **template, **options)
        self.start_notes()

    def close(self) -> None:
        """End the helpers."""
        for helper in self.helpers:
            helper.close()
        self.helpers = ()

    def check_helpers(self) -> None:
        """Raise WorkError where one has ended; called between batches, so that the others need not be finished."""
        for helper in self.helpers:
            helper.check()

    def start_notes(self) -> None:
        """Forget what was noted, and take the place of the harness's cache hook."""
        self.cache_hook = self
        self.notes: dict[str, AnswerNote] = {}  # by prompt
        self.seconds = 0.0  # spent in the model, over all requests
        self.cut_prompts = 0  # prompts whose beginning did not fit into the context
        # notes whose prompts the cache hook has yet to name
        self.pending: deque[AnswerNote] = deque()

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """The harness's cache hook: called once for each answer, in the order of the batch."""
        if attr == "generate_until":
            self.notes[req[0]] = self.pending.popleft()

    @cached_property
    def opening(self) -> str:
        """QUESTION as the chat template writes it, with what begins the answer."""
        return str(self.apply_chat_template([{"role": "user", "content": QUESTION}]))

    def begun_thought(self, prompt: str) -> str:
        """The thought at the end of a prompt, as of `Chat.begun_thought`; empty where prompts are no chats."""
        return self.chat.begun_thought(prompt, self.opening) if self.chat.enabled else ""

    def _answer(self, request: Any, text: str) -> str:
        """What follows the thought, up to the task's texts that end an answer. The thought goes into the answer's note.

        By the harness (think_end_token) an answer without a thought would lose its indentation, and a thought without
        an end would be the answer.
        """
        if self.thoughts:
            return text
        from lm_eval.models.utils import postprocess_generated_text

        prompt, options = request.args
        answer = self.chat.answer(self.begun_thought(prompt) + text)
        thought = text.removesuffix(answer).strip()
        self.notes[prompt] = self.notes[prompt]._replace(thought=thought)
        return str(postprocess_generated_text(answer, options.get("until"), None))

    generate_until = _divided("generate_until")
    loglikelihood = _divided("loglikelihood")
    loglikelihood_rolling = _divided("loglikelihood_rolling")
