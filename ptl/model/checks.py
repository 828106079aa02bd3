"""Whether a checkpoint can be trained and asked at all: tokenizer, EOS token, positions, vocabulary. Reads no weights.

`ptl validate` looks at files, also where transformers is not installed. The steps ask transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ptl import json_input
from ptl.errors import InputError
from ptl.model import checkpoint, pretrained, text_tower
from ptl.model.families import ConfigJson, Family

JSON_FILES = (
    "tokenizer.json",  # the tokenizer itself, vocabulary included
    "tokenizer_config.json",  # special tokens and chat template
    "special_tokens_map.json",  # special tokens, in older checkpoints
    "vocab.json",  # the vocabulary, where there is no tokenizer.json
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")


# Numbers above 0 in a config.json, which transformers takes whatever they are
POSITIVE = (
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range", "max_position_embeddings"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
MAX_LAYERS = 10_000  # a model beyond it is a typing error, and would take minutes to build
CORRECT = "correct it, or fetch the checkpoint again"


def check_config(config: ConfigJson, source: str) -> None:
    """Raise InputError for fields of a config.json that transformers would read otherwise, or not object to.

    `source` is the file, for the messages.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        remedy = "where the weights are float, remove that field, else dequantize the model and save it"
        if method == "mxfp4":  # gpt-oss
            remedy = (
                "load it by AutoModelForCausalLM.from_pretrained(..., quantization_config="
                "Mxfp4Config(dequantize=True)) of transformers, save that model and its tokenizer, and give that folder"
            )
        problem = f"{source} has a quantization_config ({method}), and only float weights can be pruned"
        raise checkpoint.checkpoint_error(problem, remedy)
    depth = config.get("num_hidden_layers", 1)
    if not isinstance(depth, int) or not 0 < depth <= MAX_LAYERS:
        problem = f"{source} has num_hidden_layers={depth!r}, which must be a whole number from 1 to {MAX_LAYERS:,}"
        raise checkpoint.checkpoint_error(problem, CORRECT)
    for field in POSITIVE:
        value = config.get(field)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise checkpoint.checkpoint_error(
                f"{source} has {field}={value!r}, which must be a number above 0", CORRECT
            )


def check_built_config(config: Any, family: Family, source: str) -> None:
    """Raise InputError for sizes in transformers' config of a model that it builds and cannot compute with."""
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    problem = ""
    if heads % key_value_heads:
        problem = f"num_attention_heads={heads}, no multiple of num_key_value_heads={key_value_heads}"
    elif family.experts:
        number = getattr(config, family.experts.counts[0])
        groups = getattr(config, "n_group", 1)
        if number % groups or number < fewest_experts(config):
            problem = f"{number} experts in each layer, of which num_experts_per_tok={config.num_experts_per_tok} "
            problem += f"cannot be chosen (n_group={groups}, topk_group={getattr(config, 'topk_group', 1)})"
    if problem:
        raise checkpoint.checkpoint_error(f"{source} has {problem}", CORRECT)


def fewest_experts(config: Any) -> int:
    """The fewest experts that a layer of a mixture can have: a token finds all its own in the groups that are chosen.

    `config` is that of transformers.
    """
    groups: int = getattr(config, "n_group", 1)
    of_group = math.ceil(config.num_experts_per_tok / getattr(config, "topk_group", 1))
    # By its two best experts a group is chosen.
    return groups * (max(2, of_group) if groups > 1 else of_group)


def longrope_limit(config: ConfigJson) -> int | None:
    """Tokens up to which longrope has its short factors; none for other rotary embeddings."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = config.get(field)
        if isinstance(parameters, dict) and parameters.get("rope_type", parameters.get("type")) in ("longrope", "su"):
            key = "original_max_position_embeddings"
            return parameters.get(key) or config.get(key)
    return None


def load_tokenizer(folder: Path, field: str = pretrained.MODEL) -> Any:
    """The tokenizer of a checkpoint. Raises InputError where it cannot be read or has no EOS token."""
    pretrained.config(folder, field)  # transformers reads it too: what is wrong with it is no fault of the tokenizer
    try:
        tokenizer = pretrained.tokenizer(folder, field)
    except (InputError, ModuleNotFoundError):  # the latter: without transformers
        raise
    except Exception as error:  # transformers and tokenizers raise a dozen kinds; each means that it cannot be read
        raise _unreadable_tokenizer(folder, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{folder}: the tokenizer has no EOS token, so no answer could end",
            field=field,
            remedy="set eos_token and save it",
        )
    return tokenizer


def check_tokenizer(folder: Path) -> None:
    """Raise InputError for a tokenizer that is not there, cannot be read or has no EOS token, as far as files say."""
    # Is there one, and is each of its files JSON?
    checkpoint.check_tokenizer(folder)
    files = _json_files(folder)
    # The library that transformers uses for it reads the file in milliseconds.
    core = folder / "tokenizer.json"
    if core.is_file() and find_spec("tokenizers") is not None:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(core))
        except Exception as error:  # the library raises Exception itself
            raise _unreadable_tokenizer(folder, error) from error

    # A few tokenizer classes of transformers have a default EOS token, which the files do not name.
    eos = files["tokenizer_config.json"].get("eos_token") or files["special_tokens_map.json"].get("eos_token")
    if not eos and find_spec("transformers") is not None:
        load_tokenizer(folder)


def check_generation_config(folder: Path) -> None:
    """Raise InputError for a generation_config.json that is no JSON object: transformers reads it with the weights."""
    path = folder / "generation_config.json"
    if path.is_file():
        checkpoint.json_object(path)


def check_positions(folder: Path, lengths: Mapping[str, int]) -> None:
    """Raise InputError for a config field whose sequences are longer than the model's context; `lengths` in tokens."""
    positions = text_tower.read_config(folder).get("max_position_embeddings")
    if not isinstance(positions, int):  # a family without a limit
        return
    for field, length in lengths.items():
        if length > positions:
            raise InputError(
                f"{length} is more than the model's {positions} positions ({folder})",
                field=field,
                remedy=f"lower it to {positions}",
            )


def has_chat_template(folder: Path) -> bool:
    """Whether chats can be rendered; older checkpoints have the template in the tokenizer's config."""
    if any((folder / name).is_file() for name in TEMPLATES):
        return True
    return bool(_json_files(folder)["tokenizer_config.json"].get("chat_template"))


def check_teacher(folder: Path, teacher: Path, name: str) -> None:
    """Raise InputError for a teacher with another vocabulary, where both store it in tokenizer.json."""
    student_tokens = _vocabulary(folder)
    teacher_tokens = _vocabulary(teacher)
    if student_tokens and teacher_tokens:
        compare_vocabularies(student_tokens, teacher_tokens, name)


def compare_vocabularies(student: Mapping[str, int], teacher: Mapping[str, int], name: str) -> None:
    """Raise InputError where a token has not the same number for student and teacher; `name` is the teacher's."""
    if student == teacher:
        return
    # An entry is a token with its number; a token that has moved counts on both sides.
    different = set(student.items()) ^ set(teacher.items())
    raise InputError(
        f"{name} has another vocabulary ({len(teacher)} tokens, the student {len(student)}; "
        f"{len(different)} entries differ)",
        field="recover.teacher",
        remedy="distillation needs a teacher with the same tokenizer",
    )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their numbers, from tokenizer.json; empty without one."""
    core = _json_files(folder)["tokenizer.json"]
    if not core:
        return {}
    # Tokens that were added later (of chats, for example) are listed apart.
    try:
        vocabulary = core["model"].get("vocab", {})
        if not isinstance(vocabulary, dict):  # Unigram: pairs of a token and its score, in the order of their numbers
            vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
        added = core.get("added_tokens") or ()
        return {**vocabulary, **{token["content"]: token["id"] for token in added}}
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise _unreadable_tokenizer(folder, f"tokenizer.json: {type(error).__name__}: {error}") from error


def _json_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The tokenizer's JSON files by name; empty: not there."""
    files: dict[str, dict[str, Any]] = {}
    for name in JSON_FILES:
        path = folder / name
        try:
            files[name] = json_input.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            raise _unreadable_tokenizer(folder, f"{name}: {error}") from error
        if not isinstance(files[name], dict):
            raise _unreadable_tokenizer(folder, f"{name} holds no JSON object")
    return files


def _unreadable_tokenizer(folder: Path, reason: object) -> InputError:
    return checkpoint.checkpoint_error(
        f"the tokenizer of {folder} cannot be read ({str(reason)[:300]})",
        "fetch the checkpoint again, or save a tokenizer beside the weights: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
    )
