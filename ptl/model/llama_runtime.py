"""llama.cpp itself, by its C API in the package llama-cpp-py-sync: the tokens and the logits of a GGUF file."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptl import extras
from ptl.errors import InputError, WorkError

# environment variable: libllama.so of an own build, in place of the package's
OWN_LIBRARY = "PTL_LLAMA_CPP"
# the field of a GGUF file that names how text is split before BPE
PRE_TOKENIZER = "tokenizer.ggml.pre"
BYTE_TOKEN = 1 << 5  # LLAMA_TOKEN_ATTR_BYTE of llama.h, which the package declares as 6
BATCH = 512  # tokens that one call of llama.cpp reads
CALLBACK = "void(enum ggml_log_level, const char *, void *)"

_warnings: deque[str] = deque(maxlen=3)  # its last ones, for our own errors


class Part(NamedTuple):
    """Tokens that continue a sequence."""

    sequence: int
    tokens: Sequence[int]
    outputs: int  # of how many tokens, the last ones, logits are returned


def check_loads() -> None:
    """Raise InputError where llama.cpp's library cannot be loaded, with the system's reason."""
    extras.check_loads(
        "llama.cpp",
        (sys.executable, "-c", f"import {__name__} as llama; llama.library()"),
        field="export",
        remedy=f"use `--runner docker`, set {OWN_LIBRARY} to libllama.so of an own build, or a system with glibc 2.38, "
        "libgomp and AVX2 (docs/install.md)",
    )


@cache
def library() -> tuple[Any, Any]:
    """(cffi's interface, llama.cpp's functions); what it logs is kept for `last_warnings`."""
    from llama_cpp_py_sync import _cffi_bindings as bindings

    ffi = bindings.get_ffi()
    own = os.environ.get(OWN_LIBRARY)
    if own:
        _check_build(own)
    lib = ffi.dlopen(own) if own else bindings.get_lib()

    @ffi.callback(CALLBACK)
    def keep(level: int, text: Any, _: Any) -> None:
        if level in (lib.GGML_LOG_LEVEL_WARN, lib.GGML_LOG_LEVEL_ERROR):
            _warnings.append(ffi.string(text).decode(errors="replace").strip())

    library.keep = keep  # type: ignore[attr-defined]  # C has only its address
    lib.llama_log_set(keep, ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib


def _check_build(file: str) -> None:
    """Raise InputError for a build with other C structures than those that the package declares."""
    from cffi import FFI
    from llama_cpp_py_sync import __llama_cpp_commit__, __llama_cpp_tag__

    ffi = FFI()
    ffi.cdef("const char * ggml_commit(void);")
    commit = ffi.string(ffi.dlopen(file).ggml_commit()).decode()
    if not commit.startswith(__llama_cpp_commit__):  # "-dirty" follows where the source was changed
        raise InputError(
            f"{file} is of commit {commit}, the declarations of {__llama_cpp_commit__}",
            field=OWN_LIBRARY,
            remedy=f"build llama.cpp's tag {__llama_cpp_tag__}",
        )


def last_warnings() -> str:
    """What llama.cpp said last of what it could not do."""
    return "; ".join(_warnings)


def threads() -> int:
    """As many as transformers uses in this process."""
    import torch

    return torch.get_num_threads()


def max_sequences() -> int:
    """How many sequences a context can have."""
    _, lib = library()
    return int(lib.llama_max_parallel_sequences())


class LlamaModel:
    """A GGUF file: its vocabulary and, unless `vocabulary_only`, its weights. Freed with the last reference to it.

    `pre_tokenizer` replaces the one that the file names. Raises InputError where llama.cpp cannot read the file.
    """

    def __init__(
        self, file: Path, *, vocabulary_only: bool = False, pre_tokenizer: str = ""
    ) -> None:
        ffi, lib = library()
        params = lib.llama_model_default_params()
        params.vocab_only = vocabulary_only
        # the second one stays empty: the end
        overrides = ffi.new("struct llama_model_kv_override[2]")
        if pre_tokenizer:
            overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
            overrides[0].key = PRE_TOKENIZER.encode()
            overrides[0].val_str = pre_tokenizer.encode()
            params.kv_overrides = overrides
        _warnings.clear()
        model = lib.llama_model_load_from_file(str(file).encode(), params)
        if model == ffi.NULL:
            raise InputError(
                f"llama.cpp cannot read {file} ({last_warnings() or 'it does not say why'})",
                field="export",
                remedy="export the checkpoint again, or install a newer llama-cpp-py-sync; where tensors have a wrong "
                "shape and the hidden size was pruned, serve the checkpoint with transformers",
            )
        self.pointer = ffi.gc(model, lib.llama_model_free)
        self._vocabulary = lib.llama_model_get_vocab(model)
        self.vocabulary_size: int = lib.llama_vocab_n_tokens(self._vocabulary)
        self.context_length: int = lib.llama_model_n_ctx_train(model)  # of the training

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text in which special tokens may be written out; `special`: with those at its ends."""
        ffi, lib = library()
        encoded = text.encode()
        room = len(encoded) + 8  # a token for each byte, and those at the ends
        out = ffi.new("llama_token[]", room)
        count = lib.llama_tokenize(
            self._vocabulary, encoded, len(encoded), out, room, special, True
        )
        return list(out[0:count])

    def lacks_bytes(self) -> bool:
        """Whether a SentencePiece vocabulary has no tokens for bytes: a character without a token ends the process."""
        _, lib = library()
        if lib.llama_vocab_type(self._vocabulary) != lib.LLAMA_VOCAB_TYPE_SPM:
            return False
        attributes = (
            lib.llama_vocab_get_attr(self._vocabulary, token)
            for token in range(self.vocabulary_size)
        )
        return not any(attribute & BYTE_TOKEN for attribute in attributes)

    def is_end(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        _, lib = library()
        return bool(lib.llama_vocab_is_eog(self._vocabulary, token))

    def chat_template(self) -> str:
        """Empty where the file has none."""
        ffi, lib = library()
        template = lib.llama_model_chat_template(self.pointer, ffi.NULL)
        return "" if template == ffi.NULL else ffi.string(template).decode()


class LlamaContext:
    """The keys and values of several sequences of up to `length` tokens each."""

    def __init__(self, model: LlamaModel, sequences: int, length: int) -> None:
        ffi, lib = library()
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * length
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads()
        # windows of attention leave no gaps: the end of a sequence may be forgotten
        params.swa_full = True
        _warnings.clear()
        context = lib.llama_init_from_model(model.pointer, params)
        if context == ffi.NULL:
            raise WorkError(
                f"llama.cpp has no room for {sequences} sequences of {length} tokens ({last_warnings()})",
                field="evaluate.batch_size",
                remedy="lower it, or evaluate.max_length",
            )
        self._model = model  # must not be freed before the context
        self._pointer = ffi.gc(context, lib.llama_free)
        self._memory = lib.llama_get_memory(context)
        self._lengths = [0] * sequences

    def forget(self, sequence: int, length: int = 0) -> None:
        """Keep the first `length` tokens of a sequence."""
        _, lib = library()
        lib.llama_memory_seq_rm(self._memory, sequence, length, -1)
        self._lengths[sequence] = length

    def append(self, parts: Iterable[Part]) -> NDArray[np.float32]:
        """Read tokens at the ends of sequences; logits [outputs, vocabulary] in the order of the parts."""
        entries = []  # token, position, sequence, whether it has an output
        for sequence, tokens, outputs in parts:
            first = self._lengths[sequence]
            for i, token in enumerate(tokens):
                entries.append((token, first + i, sequence, i >= len(tokens) - outputs))
            self._lengths[sequence] += len(tokens)
        logits = []
        for start in range(0, len(entries), BATCH):
            batch = entries[start : start + BATCH]
            logits.append(self._decode(batch))
        return np.concatenate(logits)

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> NDArray[np.float32]:
        """Float32 [outputs, vocabulary] of up to BATCH tokens."""
        ffi, lib = library()
        batch = lib.llama_batch_init(len(entries), 0, 1)  # each token belongs to one sequence
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, sequence, has_output) in enumerate(entries):
                batch.token[i] = token
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = has_output
            status = lib.llama_decode(self._pointer, batch)
        finally:
            lib.llama_batch_free(batch)
        if status:
            raise WorkError(
                f"llama.cpp could not read a batch ({status}: {last_warnings()})", field="evaluate"
            )
        size = self._model.vocabulary_size
        outputs = sum(entry[3] for entry in entries)
        if not outputs:
            return np.empty((0, size), np.float32)
        logits = ffi.buffer(lib.llama_get_logits(self._pointer), outputs * size * 4)
        return np.frombuffer(logits, np.float32).reshape(outputs, size).copy()
