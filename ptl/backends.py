"""The models of lm-evaluation-harness, with notes on every answer: Hugging Face or vLLM."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl.config import Evaluate
from ptl.errors import InputError


def language_model(src: Path, settings: Evaluate, seed: int = 0) -> Any:
    """The harness's model for a checkpoint folder, on the GPU where there is one, with the notes of `Notes`."""
    from ptl.harness import keep_templates

    keep_templates()
    return _vllm(src, settings, seed) if settings.backend == "vllm" else _hugging_face(src, settings)


class Notes:
    """To be mixed into a model of the harness: notes its time and how every answer ended."""

    def start_notes(self) -> None:
        """Forget what was noted, and take the place of the harness's cache hook."""
        self.cache_hook = self
        self.notes: dict[str, tuple[int, bool]] = {}  # prompt -> (tokens of the answer, cut by the token limit)
        self.seconds = 0.0  # spent in the model, over all requests
        self.cut_prompts = 0  # whose beginning did not fit into the context
        self.pending: deque[tuple[int, bool]] = deque()  # notes whose prompts the cache hook has yet to name

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """The harness's cache hook: called once for each answer, in the order of the batch."""
        if attr == "generate_until":
            self.notes[req[0]] = self.pending.popleft()

    def generate_until(self, *args: Any, **kwargs: Any) -> Any:
        """Timed."""
        return self._timed(super().generate_until, *args, **kwargs)  # type: ignore[misc]

    def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
        """Timed."""
        return self._timed(super().loglikelihood, *args, **kwargs)  # type: ignore[misc]

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
        """Timed."""
        return self._timed(super().loglikelihood_rolling, *args, **kwargs)  # type: ignore[misc]

    def _timed(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        out = work(*args, **kwargs)  # ends on the CPU, so that the GPU has finished too
        self.seconds += time.perf_counter() - started
        return out


def _hugging_face(src: Path, settings: Evaluate) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    class Noted(Notes, HFLM):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.start_notes()
            # The limit is the task's: one in the checkpoint's generation config would silently take precedence.
            self.model.generation_config.max_new_tokens = None
            ends = self.model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            self._ends = {self.eot_token_id, self.tokenizer.pad_token_id, *ends}

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            out = super()._model_generate(context, max_length, stop, **kwargs)
            for tokens in out[:, context.shape[1] :].tolist():
                ended = next((i for i, token in enumerate(tokens) if token in self._ends), None)
                text = "" if ended is not None else self.tok_decode(tokens)
                cut = ended is None and not any(sequence in text for sequence in stop)
                self.pending.append((len(tokens) if ended is None else ended, cut))
            return out

        def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: Any = None, **kwargs: Any) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)
            if left_truncate_len:
                self.cut_prompts += int((mask.sum(1) >= left_truncate_len).sum())
            return ids, mask

    return Noted(
        pretrained=str(src),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="auto",
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        trust_remote_code=False,
    )


def _vllm(src: Path, settings: Evaluate, seed: int) -> Any:
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except ModuleNotFoundError as error:
        raise InputError(
            f"evaluate.backend: vllm is not installed here ({error}); use the image evaluate-vllm, or backend: hf"
        ) from error

    class Noted(Notes, VLLM):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.start_notes()

        def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
            outputs = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
            if generate:
                for request, params, output in zip(requests, sampling_params, outputs, strict=True):
                    answer = output.outputs[0]
                    self.pending.append((len(answer.token_ids), answer.finish_reason == "length"))
                    self.cut_prompts += len(request) + params.max_tokens >= self.max_length
            return outputs

    return Noted(
        pretrained=str(src),
        dtype="auto",
        batch_size=settings.batch_size,
        max_model_len=settings.max_length,
        seed=seed,
        trust_remote_code=False,
    )
