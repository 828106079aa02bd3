"""The models of lm-evaluation-harness, with a note on every answer: Hugging Face or vLLM."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ptl import extras
from ptl.config.run import Evaluate
from ptl.evaluation.helpers import AnswerNote, Helper, Share
from ptl.evaluation.task_loading import cache_templates
from ptl.model import checkpoint, pretrained
from ptl.model.config_fields import longrope_limit
from ptl.model.families import family_of

VLLM_FIELD = "evaluate.backend"
VLLM_REMEDY = "use the image evaluate-vllm (`--runner docker`), or backend: hf"


def language_model(src: Path, settings: Evaluate, seed: int = 0, processes: int = 1) -> Any:
    """The harness's model for a checkpoint folder, on the GPU where there is one, with the notes of `AnswerNotes`.

    With several processes the others are helpers; `close` ends them.
    """
    cache_templates()
    if settings.backend == "vllm":
        return _vllm(src, settings, seed)
    # They load the model while this process does.
    helpers = [Helper(src, settings, number) for number in range(1, processes)]
    try:
        model = _hugging_face(src, settings)
        for helper in helpers:
            helper.share()
    except BaseException:
        for helper in helpers:
            helper.close()
        raise
    model.helpers = helpers
    return model


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

    def run(self: AnswerNotes, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        own, *others = divided([request.args for request in requests], 1 + len(self.helpers))
        asked = [(helper, positions) for helper, positions in zip(self.helpers, others, strict=True) if positions]
        for helper, positions in asked:
            helper.ask(name, [requests[position].args for position in positions])
        # It ends on the CPU: the GPU has finished too.
        own_answers = getattr(super(AnswerNotes, self), name)([requests[i] for i in own], *args, **kwargs)
        answers = dict(zip(own, own_answers, strict=True))  # by position
        for helper, positions in asked:
            share = helper.share()
            answers.update(zip(positions, share.answers, strict=True))
            self.notes.update(share.notes)
            self.cut_prompts += share.cut_prompts
        self.seconds += time.perf_counter() - started
        return [answers[position] for position in range(len(requests))]

    return run


class AnswerNotes:
    """To be mixed into a model of the harness: notes its time and how every answer ended; may have helpers."""

    helpers: Sequence[Helper] = ()

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
        self.pending: deque[AnswerNote] = deque()  # notes whose prompts the cache hook has yet to name

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """The harness's cache hook: called once for each answer, in the order of the batch."""
        if attr == "generate_until":
            prompt = req[0]
            self.notes[prompt] = self.pending.popleft()

    generate_until = _divided("generate_until")
    loglikelihood = _divided("loglikelihood")
    loglikelihood_rolling = _divided("loglikelihood_rolling")


def _hugging_face(src: Path, settings: Evaluate) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    class NotedModel(AnswerNotes, HFLM):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.start_notes()
            generation = self.model.generation_config
            # The limit is the task's: one in the checkpoint's generation config would silently take precedence.
            generation.max_new_tokens = None
            ends = generation.eos_token_id
            if not isinstance(ends, list):
                ends = [ends]
            # Padding follows an answer that ended before others of its batch.
            self._ends = {self.eot_token_id, self.tokenizer.pad_token_id, *ends}

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            self.check_helpers()
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            self.check_helpers()
            out = super()._model_generate(context, max_length, stop, **kwargs)  # [batch, prompt + answer]
            answers = out[:, context.shape[1] :]  # [batch, answer]
            for tokens in answers.tolist():
                self.pending.append(self._note(tokens, stop))
            return out

        def _note(self, tokens: list[int], stop: list[str]) -> AnswerNote:
            """`stop` are the texts at which the harness ends an answer."""
            for length, token in enumerate(tokens):
                if token in self._ends:
                    return AnswerNote(length, truncated=False)
            text = self.tok_decode(tokens)
            stopped = any(sequence in text for sequence in stop)
            return AnswerNote(len(tokens), truncated=not stopped)

        def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: Any = None, **kwargs: Any) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)
            # A prompt that fills its room to the last token has lost its beginning, most likely.
            if left_truncate_len:
                lengths = mask.sum(1)  # [batch]
                self.cut_prompts += int((lengths >= left_truncate_len).sum())
            return ids, mask

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = NotedModel(
        pretrained=str(src),
        device=device,
        dtype="auto",  # the checkpoint's own
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        trust_remote_code=False,  # a checkpoint's own code is never run
    )
    pretrained.for_generation(lm.model)
    return lm


def check_backend(settings: Evaluate) -> None:
    """Raise InputError where vLLM is asked for and cannot be loaded here; takes seconds where it can."""
    if settings.backend == "vllm":
        command = (sys.executable, "-c", "from vllm import LLM")
        extras.check_loads("vLLM", command, field=VLLM_FIELD, remedy=VLLM_REMEDY)


def _vllm(src: Path, settings: Evaluate, seed: int) -> Any:
    import torch

    try:
        from lm_eval.models.vllm_causallms import VLLM
    except (ImportError, OSError) as error:  # the loader's are OSErrors
        reason = f"{type(error).__name__}: {error}"
        raise extras.unusable("vLLM", reason, field=VLLM_FIELD, remedy=VLLM_REMEDY) from error

    class NotedModel(AnswerNotes, VLLM):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.start_notes()

        def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
            outputs = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
            # Log-likelihoods have no answer.
            if not generate:
                return outputs
            for prompt, params, output in zip(requests, sampling_params, outputs, strict=True):
                answer = output.outputs[0]
                truncated = answer.finish_reason == "length"
                self.pending.append(AnswerNote(len(answer.token_ids), truncated))
                # The harness has cut such a prompt to exactly the room that the answer leaves.
                self.cut_prompts += len(prompt) + params.max_tokens >= self.max_length
            return outputs

    return NotedModel(
        pretrained=str(src),
        dtype="auto",
        batch_size=settings.batch_size,
        max_model_len=settings.max_length or longrope_limit(checkpoint.read_config(src)),
        tensor_parallel_size=tensor_parallel(src, torch.cuda.device_count()),
        seed=seed,
        trust_remote_code=False,
    )


def tensor_parallel(src: Path, gpus: int) -> int:
    """Over how many of a step's GPUs vLLM divides a checkpoint: the most by which its heads and its FFN can be divided.

    Not copies of the model: for those the harness needs ray.
    """
    config = checkpoint.read_config(src)
    config.pop("quantization_config", None)  # the sizes are those of the float weights
    sizes = pretrained.config_with_defaults(config)
    width = getattr(sizes, family_of(config).width_field)

    def divides(count: int) -> bool:
        # Of keys and values several GPUs may hold the same head.
        heads = sizes.num_key_value_heads
        divided = (sizes.num_attention_heads, width, max(heads, count))
        return all(size % count == 0 for size in divided) and max(heads, count) % heads == 0

    return max((count for count in range(1, gpus + 1) if divides(count)), default=1)


def main(connection: Connection) -> None:
    """Answer the requests of an evaluation, as one of its helpers, until the connection is closed."""
    from lm_eval.api.instance import Instance

    # Ctrl-C reaches every process of the command: the one that evaluates ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    src, settings = connection.recv()
    try:
        model = language_model(src, settings)
        connection.send(Share())
        while True:
            method, arguments = connection.recv()
            model.start_notes()
            requests = [Instance(method, {}, request, 0) for request in arguments]
            answers = getattr(model, method)(requests, disable_tqdm=True)
            connection.send(Share(answers, model.notes, model.cut_prompts))
    except (EOFError, ConnectionError):
        return  # the evaluation has ended
    except Exception as error:
        connection.send(Share(error=f"{type(error).__name__}: {error}"))
        raise


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
