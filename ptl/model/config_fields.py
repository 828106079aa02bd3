"""Fields of a config.json that transformers builds a model of, whatever number they hold. Torch-free."""

from __future__ import annotations

import math

from ptl.model.checkpoint import DTYPES, checkpoint_error
from ptl.model.families import ConfigJson

CORRECT = "correct it, or fetch the checkpoint again"
Fields = tuple[str, ...]  # of config.json


def longrope_limit(config: ConfigJson) -> int | None:
    """Tokens up to which longrope has its short factors; none for other rotary embeddings."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = config.get(field)
        if isinstance(parameters, dict) and parameters.get("rope_type", parameters.get("type")) in ("longrope", "su"):
            key = "original_max_position_embeddings"
            return parameters.get(key) or config.get(key)
    return None


def check_not_quantized(config: ConfigJson, source: str) -> None:
    """transformers would load something else than the weights that are there."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    remedy = "where the weights are float, remove that field, else dequantize the model and save it"
    if method == "mxfp4":  # gpt-oss
        remedy = (
            "load it by AutoModelForCausalLM.from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)) "
            "of transformers, save that model and its tokenizer, and give that folder"
        )
    raise checkpoint_error(
        f"{source} has a quantization_config ({method}), and only float weights can be pruned",
        remedy,
    )


POSITIVE = (
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range", "max_position_embeddings"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)


def check(config: ConfigJson, source: str) -> None:
    """Raise InputError that names a field, its value and what is possible. `source` is the file, for the messages."""
    for field in POSITIVE:
        value = config.get(field)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise checkpoint_error(f"{source} has {field}={value!r}, which must be a number above 0", CORRECT)
    # What transformers takes, and torch refuses in the first step that computes.
    dropout = config.get("attention_dropout") or 0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise checkpoint_error(f"{source} has attention_dropout={dropout!r}, which must be from 0 to below 1", CORRECT)
    window = config.get("sliding_window")
    if isinstance(window, int) and window <= 0 and config.get("use_sliding_window", True):
        raise checkpoint_error(f"{source} has sliding_window={window}, which must be above 0", CORRECT)
    for field in ("dtype", "torch_dtype"):
        if config.get(field) not in (None, *DTYPES):
            possible = ", ".join(DTYPES)
            raise checkpoint_error(f"{source} has {field}={config[field]!r}, which must be one of {possible}", CORRECT)
