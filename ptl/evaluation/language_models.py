"""The models of lm-evaluation-harness, with a note on every answer: by transformers (`hf`) or by vLLM.

Some methods here take the place of private ones of the harness. A comment beside each says what change of the harness
breaks it, and which test shows that.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from ptl import extras
from ptl.config.chat import NO_CHAT, Chat
from ptl.config.run import Evaluate
from ptl.evaluation.generation import AnswerNote, AnswerNotes, recommended_sampling
from ptl.model import checkpoint, pretrained
from ptl.model.families import family_of
from ptl.model.shapes import longrope_limit

VLLM_FIELD = "evaluate.backend"
VLLM_REMEDY = "use the image evaluate-vllm (`--runner docker`), or backend: hf"
VOCABULARY_UNIT = 64  # tokens; vLLM pads vocabularies to a multiple


def language_model(
    src: Path,
    settings: Evaluate,
    chat: Chat = NO_CHAT,
    seed: int = 0,
    *,
    thoughts: bool = False,
) -> Any:
    """Load the checkpoint folder `src` as a model of the harness that has the notes of `AnswerNotes`.

    transformers uses one GPU where there is one, vLLM as many as it can divide the model over. `thoughts` keeps the
    text before an answer in it.
    """
    cache_templates()
    if settings.backend == "vllm":
        return _vllm(src, settings, chat, seed, thoughts)
    return _hugging_face(src, settings, chat, thoughts)


@cache
def noted_hflm() -> Any:
    """Make the harness's class for models of transformers one that notes its answers."""
    from lm_eval.models.huggingface import HFLM

    class NotedModel(AnswerNotes, HFLM):
        # Breaks when the harness generates elsewhere, or no longer returns the prompts' tokens before the answers':
        # `test_scores_and_items_of_the_tiny_reasoner` counts the answers' tokens.
        def _model_generate(
            self, context: Any, max_length: int, stop: list[str], **options: Any
        ) -> Any:
            out = super()._model_generate(context, max_length, stop, **options)  # [batch, tokens]
            prompt_length = context.shape[1]
            for tokens in out[:, prompt_length:].tolist():
                # An answer that ended before others of its batch is padded after its end.
                length = next((i for i, token in enumerate(tokens) if token in self.ends), None)
                self.pending.append(self.note(tokens[:length], stop, ended=length is not None))
            return out

        # Breaks when answers are decoded by another method: their thoughts are gone, as test_chat.py shows.
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
            is_answer = skip_special_tokens and isinstance(tokens, list)
            if not (is_answer and self.chat.enabled):
                return super().tok_decode(tokens, skip_special_tokens)
            kept = [token for token in tokens if token not in self.dropped_tokens]
            return super().tok_decode(kept, skip_special_tokens=False)

        # Breaks when prompts are truncated elsewhere: `cut_prompts` stays 0 in
        # `test_answers_and_prompts_that_are_too_long_are_counted`.
        def tok_batch_encode(
            self, strings: Any, *args: Any, left_truncate_len: Any = None, **options: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(
                strings, *args, left_truncate_len=left_truncate_len, **options
            )
            # A prompt that fills its room to the last token has most likely lost its beginning.
            if left_truncate_len:
                lengths = mask.sum(1)  # [batch]
                self.cut_prompts += int((lengths >= left_truncate_len).sum())
            return ids, mask

        @cached_property
        def dropped_tokens(self) -> set[int]:
            """Special tokens that are no part of an answer; those around a thought stay, to tell where it ends."""
            added = self.tokenizer.added_tokens_decoder.items()
            return {i for i, token in added if token.special and not self.chat.delimits(str(token))}

        def note(self, tokens: list[int], stop: list[str], ended: bool) -> AnswerNote:
            """Note how an answer ended: by a token (`ended`), by one of the `stop` texts, or by the limit."""
            if not ended:
                text = self.tok_decode(tokens)
                ended = any(sequence in text for sequence in stop)
            return AnswerNote(len(tokens), truncated=not ended)

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
    # Neither vLLM, as the harness calls it, nor the evaluation of a GGUF file has a penalty: with one the scores of
    # the formats could not be compared.
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
    """Raise InputError where the backend is vLLM and cannot be loaded here; takes seconds where it can."""
    if settings.backend == "vllm":
        command = (sys.executable, "-c", "from vllm import LLM")
        extras.check_loads("vLLM", command, field=VLLM_FIELD, remedy=VLLM_REMEDY)


def _vllm(src: Path, settings: Evaluate, chat: Chat, seed: int, thoughts: bool) -> Any:
    import torch

    lm = _noted_vllm()(
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
    lm.chat_template_args = dict(chat.template_kwargs)  # the harness takes enable_thinking out
    lm.sampling = recommended_sampling(src)
    return lm


def _noted_vllm() -> Any:
    """Make the harness's class for models of vLLM one that notes its answers. Raises InputError without vLLM."""
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
        # Breaks when HFLM's method needs an attribute that VLLM does not have:
        # `test_vllm_is_given_the_variables_and_nothing_else`.
        def apply_chat_template(self, *args: Any, **options: Any) -> Any:
            # VLLM's own method gives the template an enable_thinking of None where it is not set.
            return HFLM.apply_chat_template(self, *args, **options)

        # Breaks when the harness renames the method or its arguments, or gives all prompts one object of parameters:
        # `test_vllm_backend_notes_every_answer` with a mock, and any run with vLLM, by an error.
        def _model_generate(
            self, requests: Any, generate: bool = False, sampling_params: Any = None
        ) -> Any:
            if not generate:  # log-likelihoods have no answers
                return super()._model_generate(requests, sampling_params=sampling_params)
            # Each prompt has a seed of its own, whatever else is in its batch: with equal seeds answers go alike.
            for prompt, params in zip(requests, sampling_params, strict=True):
                params.seed = zlib.crc32(json.dumps([self.seed, prompt]).encode())
            outputs = super()._model_generate(
                requests, generate=True, sampling_params=sampling_params
            )
            for prompt, params, output in zip(requests, sampling_params, outputs, strict=True):
                answer = output.outputs[0]
                truncated = answer.finish_reason == "length"
                self.pending.append(AnswerNote(len(answer.token_ids), truncated))
                # The harness has truncated a long prompt to exactly the room that the answer leaves.
                self.cut_prompts += len(prompt) + params.max_tokens >= self.max_length
            return outputs

        # Breaks when vLLM moves its engine: `test_vllm_backend_notes_every_answer` with a mock, and any run with vLLM.
        def close(self) -> None:
            # vLLM's processes would outlive the model: a forked step waits for them, and the next export finds no
            # memory.
            self.model.llm_engine.engine_core.shutdown()

    return NotedModel


def tensor_parallel(src: Path, gpus: int) -> int:
    """Choose over how many of a step's GPUs vLLM divides a checkpoint: the most that divide heads, FFN and vocabulary.

    Copies of the model on the other GPUs (data_parallel_size) are no option: for those the harness needs ray.
    """
    config = checkpoint.read_config(src)
    config.pop("quantization_config", None)  # the sizes are those of the float weights
    sizes = pretrained.config_with_defaults(config)
    width = getattr(sizes, family_of(config).width_field)
    kv_heads = sizes.num_key_value_heads
    vocabulary = -(-sizes.vocab_size // VOCABULARY_UNIT) * VOCABULARY_UNIT
    best = 1
    for count in range(1, gpus + 1):
        if any(size % count for size in (sizes.num_attention_heads, width, vocabulary)):
            continue
        # Several GPUs may hold the same KV head.
        if kv_heads % count == 0 or count % kv_heads == 0:
            best = count
    return best


def cache_templates() -> None:
    """Let the harness compile each prompt template once, in Jinja's sandbox.

    Compiled five times for every item, templates are 40 % of a tiny model's time. In the sandbox a template of a
    task's YAML is data, and has no way to Python's internals.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.utils import env

    # Breaks when the harness renders templates by another environment: `test_a_template_of_a_task_cannot_reach_python`.
    if hasattr(env.from_string, "cache_info"):  # done by an earlier call
        return
    sandboxed = SandboxedEnvironment(
        undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline
    )
    sandboxed.filters = env.filters
    env.from_string = lru_cache(maxsize=256)(sandboxed.from_string)
