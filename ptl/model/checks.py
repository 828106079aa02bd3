"""Whether a model can be computed with, trained and asked at all: config, tokenizer, positions. Reads no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptl.errors import InputError
from ptl.model import checkpoint, pretrained, text_tower
from ptl.model.families import ConfigJson, Family

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
        raise checkpoint.checkpoint_error(
            f"the tokenizer of {folder} cannot be read ({str(error)[:300]})",
            "fetch the checkpoint again, or save a tokenizer beside the weights: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{folder}: the tokenizer has no EOS token, so no answer could end",
            field=field,
            remedy="set eos_token and save it",
        )
    return tokenizer


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
