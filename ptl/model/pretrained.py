"""Configs, tokenizers and models loaded by transformers: never with a checkpoint's own code, never from pickles.

transformers asks on the terminal where it needs such code (`auto_map` in a JSON file names it) and is not forbidden to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ptl import connections
from ptl.errors import InputError

MODEL = "model.path"  # the field of the config that names the checkpoint
MAX_REASON = 300  # characters of transformers' own message that an error quotes


def config(folder: Path, field: str = MODEL) -> Any:
    """The config of a checkpoint. Raises InputError where it needs code of its own, or transformers refuses a field."""
    from transformers import AutoConfig

    with _explained(f"config.json in {folder}", field):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def config_with_defaults(content: Mapping[str, Any]) -> Any:
    """The config that transformers makes of a config.json's content, with its defaults for what is left out."""
    from transformers import AutoConfig

    # transformers writes into nested fields
    return AutoConfig.for_model(**copy.deepcopy(dict(content)))


def can_build() -> bool:
    """Whether `skeleton` has what it needs on this machine; nothing is imported."""
    return bool(find_spec("torch") and find_spec("transformers"))


def skeleton(folder: Path, dtype: Any = None, field: str = MODEL, *, buffers: bool = False) -> Any:
    """The language model of a checkpoint without its weights, on torch's meta device; with `buffers` these are real.

    Raises InputError where config.json is what transformers builds no model of.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    text_config = config(folder, field).get_text_config()
    # accelerate's keeps buffers, and makes each parameter on the CPU first.
    without_weights = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    with _explained(f"config.json in {folder}", field), without_weights:
        return AutoModelForCausalLM.from_config(
            text_config, dtype=dtype or text_config.dtype, trust_remote_code=False
        )


def skeleton_of_config(content: Mapping[str, Any], source: str) -> Any:
    """The language model of a config.json's content as `skeleton` gives it; `source` is the file, for the messages."""
    import torch
    from transformers import AutoModelForCausalLM

    with _explained(source, MODEL), torch.device("meta"):
        # Not the one that the config may name: its package need not be here.
        return AutoModelForCausalLM.from_config(
            config_with_defaults(content), trust_remote_code=False, attn_implementation="eager"
        )


def tokenizer(folder: Path, field: str = MODEL) -> Any:
    """The tokenizer of a checkpoint. Raises InputError where it cannot be read or needs code of its own."""
    from transformers import AutoTokenizer

    # transformers reads it too: what is wrong with it is no fault of the tokenizer
    config(folder, field)
    with _explained(f"the tokenizer of {folder}", field):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: Path, field: str = MODEL) -> Any:
    """The tokenizer of a checkpoint. Raises InputError where it cannot be read or has no EOS token.

    And where a text may hold a token that has no embedding, as after adding one for padding alone.
    """
    loaded = tokenizer(folder, field)
    rows = config(folder, field).get_text_config().vocab_size
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(loaded, f"{name}_id")
        if number is not None and number >= rows:
            raise InputError(
                f"{folder}: {name} is token {number}, and the model has embeddings for {rows} tokens",
                field=field,
                remedy=f"set {name} to another token of the tokenizer, or resize the embeddings, and save it",
            )
    if loaded.eos_token_id is None:
        raise InputError(
            f"{folder}: the tokenizer has no EOS token, so no answer could end",
            field=field,
            remedy="set eos_token and save it",
        )
    return loaded


@contextmanager
def _explained(source: str, field: str) -> Iterator[None]:
    """Turn whatever transformers raises over the small files of a checkpoint into an InputError."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a dozen kinds: a field is checked where the model first needs it
        if getattr(error, "errno", None):  # of the disk
            raise
        if "trust_remote_code" in str(error):  # transformers has no error of its own for it
            raise InputError(
                f"{source} needs code of its own, which is never run",
                field=field,
                remedy="use a checkpoint that transformers loads without trust_remote_code",
            ) from error
        reason = connections.shortened(f"{type(error).__name__}: {error}", MAX_REASON)
        raise InputError(
            f"transformers cannot read {source} ({reason})",
            field=field,
            remedy="correct it, or fetch the checkpoint again",
        ) from error


def causal_lm(folder: Path, dtype: Any = "auto", field: str = MODEL) -> Any:
    """The model in its stored dtype, or in the one given. Raises InputError where it needs code of its own.

    Or where it is no language model: a `mistral3`, for example, given as a teacher.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model_config = config(folder, field)
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{folder} is no language model (model_type {model_config.model_type})",
            field=field,
            remedy="of a multimodal checkpoint give the text model, which `ptl import-model` saves",
        )
    skeleton(folder, field=field)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return for_generation(model)


def for_generation(model: Any) -> Any:
    """A model that returns no router logits, whatever its config says; of a dense model nothing changes.

    transformers would compute the routers' loss from them for each token that it generates, and fail on a batch with
    padding. trl's trainers ask for them again.
    """
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model
