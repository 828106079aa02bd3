"""The models of lm-evaluation-harness, with a note on every answer: Hugging Face or vLLM."""

from __future__ import annotations

import json
import os
import sys
import zlib
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from ptl import extras
from ptl.config.chat import NO_CHAT, Chat
from ptl.config.run import Evaluate
from ptl.evaluation.helpers import AnswerNote, AnswerNotes, Helper, recommended_sampling
from ptl.model import checkpoint, pretrained
from ptl.model.families import family_of
from ptl.model.shapes import longrope_limit

VLLM_FIELD = "evaluate.backend"
VLLM_REMEDY = "use the image evaluate-vllm (`--runner docker`), or backend: hf"


def language_model(
    src: Path,
    settings: Evaluate,
    chat: Chat = NO_CHAT,
    seed: int = 0,
    processes: int = 1,
    *,
    thoughts: bool = False,
) -> Any:
    """The harness's model for a checkpoint folder, on the GPU where there is one, with the notes of `AnswerNotes`.

    Its answers are without their thoughts, unless with `thoughts`.

    With several processes the others are helpers; `close` ends them.
    """
    cache_templates()
    if settings.backend == "vllm":
        return _vllm(src, settings, chat, seed, thoughts)
    # They load the model while this process does.
    load = partial(language_model, src, settings, chat, thoughts=thoughts)
    helpers = [Helper(load, number) for number in range(1, processes)]
    try:
        model = _hugging_face(src, settings, chat, thoughts)
        for helper in helpers:
            helper.share()
    except BaseException:
        for helper in helpers:
            helper.close()
        raise
    model.helpers = helpers
    return model


@cache
def noted_hflm() -> Any:
    """The harness's class for models of transformers, with the notes of `AnswerNotes`."""
    from lm_eval.models.huggingface import HFLM

    class NotedModel(AnswerNotes, HFLM):
        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            self.check_helpers()
            return super()._model_call(*args, **kwargs)

        def _model_generate(
            self, context: Any, max_length: int, stop: list[str], **kwargs: Any
        ) -> Any:
            self.check_helpers()
            # [batch, prompt + answer]
            out = super()._model_generate(context, max_length, stop, **kwargs)
            answers = out[:, context.shape[1] :]  # [batch, answer]
            for tokens in answers.tolist():
                # Padding follows an answer that ended before others of its batch.
                length = next((i for i, token in enumerate(tokens) if token in self.ends), None)
                self.pending.append(self.note(tokens[:length], stop, ended=length is not None))
            return out

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
            if not (skip_special_tokens and self.chat.enabled and isinstance(tokens, list)):
                return super().tok_decode(tokens, skip_special_tokens)
            kept = [token for token in tokens if token not in self.dropped_tokens]
            return super().tok_decode(kept, skip_special_tokens=False)

        @cached_property
        def dropped_tokens(self) -> set[int]:
            """Special tokens but those around a thought: without them it could not be told from the answer."""
            added = self.tokenizer.added_tokens_decoder
            return {
                i
                for i, token in added.items()
                if token.special and not self.chat.delimits(str(token))
            }

        def note(self, tokens: list[int], stop: list[str], ended: bool) -> AnswerNote:
            """How an answer ended; `ended`: by a token."""
            if not ended:
                text = self.tok_decode(tokens)
                ended = any(sequence in text for sequence in stop)
            return AnswerNote(len(tokens), truncated=not ended)

        def tok_batch_encode(
            self, strings: Any, *args: Any, left_truncate_len: Any = None, **kwargs: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(
                strings, *args, left_truncate_len=left_truncate_len, **kwargs
            )
            # A prompt that fills its room to the last token has lost its beginning, most likely.
            if left_truncate_len:
                lengths = mask.sum(1)  # [batch]
                self.cut_prompts += int((lengths >= left_truncate_len).sum())
            return ids, mask

    return NotedModel


def _hugging_face(src: Path, settings: Evaluate, chat: Chat, thoughts: bool) -> Any:
    import torch

    lm = noted_hflm()(
        pretrained=str(src),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="auto",  # the checkpoint's own
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        trust_remote_code=False,  # a checkpoint's own code is never run
        chat=chat,
        thoughts=thoughts,
    )
    pretrained.for_generation(lm.model)
    generation = lm.model.generation_config
    # The limit is the task's: one in the checkpoint's generation config would silently take precedence.
    generation.max_new_tokens = None
    # vLLM as the harness calls it, and the evaluation of a GGUF file, know none: forms would not be compared.
    generation.repetition_penalty = None
    lm.sampling = recommended_sampling(src)
    ends = generation.eos_token_id
    lm.ends = {
        lm.eot_token_id,
        lm.tokenizer.pad_token_id,
        *(ends if isinstance(ends, list) else [ends]),
    }
    return lm


def check_backend(settings: Evaluate) -> None:
    """Raise InputError where vLLM is asked for and cannot be loaded here; takes seconds where it can."""
    if settings.backend == "vllm":
        command = (sys.executable, "-c", "from vllm import LLM")
        extras.check_loads("vLLM", command, field=VLLM_FIELD, remedy=VLLM_REMEDY)


def _vllm(src: Path, settings: Evaluate, chat: Chat, seed: int, thoughts: bool) -> Any:
    import torch

    # When it starts, vLLM would compile FlashInfer's sampler by nvcc, which is not in the image. That sampler takes no
    # seed for each answer, so that it would not be used.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

    try:
        from lm_eval.models.huggingface import HFLM
        from lm_eval.models.vllm_causallms import VLLM
    except (ImportError, OSError) as error:  # the loader's are OSErrors
        reason = f"{type(error).__name__}: {error}"
        raise extras.unusable("vLLM", reason, field=VLLM_FIELD, remedy=VLLM_REMEDY) from error

    class NotedModel(AnswerNotes, VLLM):
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            # VLLM's own gives the template an enable_thinking of None where it is not set.
            return HFLM.apply_chat_template(self, *args, **kwargs)

        def _model_generate(
            self, requests: Any, generate: bool = False, sampling_params: Any = None
        ) -> Any:
            if generate:
                # One of its own for each request, whatever else is in its batch; equal ones would go alike.
                for prompt, params in zip(requests, sampling_params, strict=True):
                    params.seed = zlib.crc32(json.dumps([self.seed, prompt]).encode())
            outputs = super()._model_generate(
                requests, generate=generate, sampling_params=sampling_params
            )
            # Log-likelihoods have no answer.
            if not generate:
                return outputs
            for prompt, params, output in zip(requests, sampling_params, outputs, strict=True):
                answer = output.outputs[0]
                self.pending.append(
                    AnswerNote(len(answer.token_ids), answer.finish_reason == "length")
                )
                # The harness has cut such a prompt to exactly the room that the answer leaves.
                self.cut_prompts += len(prompt) + params.max_tokens >= self.max_length
            return outputs

        def close(self) -> None:
            # Its processes outlive it otherwise: a forked step waits for them, the next export's finds no memory.
            self.model.llm_engine.engine_core.shutdown()
            super().close()

    lm = NotedModel(
        pretrained=str(src),
        dtype="auto",
        # All requests at once: with a number, each batch waits for its longest answer.
        batch_size="auto",
        max_num_seqs=settings.batch_size,
        max_model_len=settings.max_length or longrope_limit(checkpoint.read_config(src)),
        tensor_parallel_size=tensor_parallel(src, torch.cuda.device_count()),
        seed=seed,
        trust_remote_code=False,
        chat=chat,
        thoughts=thoughts,
    )
    lm.chat_template_args = dict(chat.template_kwargs)  # VLLM takes enable_thinking out
    lm.sampling = recommended_sampling(src)
    return lm


def tensor_parallel(src: Path, gpus: int) -> int:
    """Over how many of a step's GPUs vLLM divides a checkpoint: the most that divide its heads, FFN and vocabulary.

    Not copies of the model: for those the harness needs ray.
    """
    config = checkpoint.read_config(src)
    config.pop("quantization_config", None)  # the sizes are those of the float weights
    sizes = pretrained.config_with_defaults(config)
    width = getattr(sizes, family_of(config).width_field)
    heads = sizes.num_key_value_heads  # of keys and values; several GPUs may hold the same one
    vocabulary = -(-sizes.vocab_size // 64) * 64  # as vLLM pads it
    best = 1
    for count in range(1, gpus + 1):
        divided = (sizes.num_attention_heads, width, vocabulary, max(heads, count))
        if all(size % count == 0 for size in divided) and max(heads, count) % heads == 0:
            best = count
    return best


def cache_templates() -> None:
    """Let the harness compile each prompt template once: five times for every item is 40 % of a tiny model's time.

    In Jinja's sandbox: a template of a task's YAML is data and has no way to Python's internals.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.utils import env

    if hasattr(env.from_string, "cache_info"):  # by an earlier call
        return
    sandboxed = SandboxedEnvironment(
        undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline
    )
    sandboxed.filters = env.filters
    env.from_string = lru_cache(maxsize=256)(sandboxed.from_string)
