"""A checkpoint with quantized weights (compressed-tensors), as a model of lm-evaluation-harness, and its size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ptl import extras
from ptl.config.run import Evaluate
from ptl.errors import InputError
from ptl.evaluation import helpers, language_models
from ptl.extras import AbsentError
from ptl.model import checkpoint, checks

METHOD = "compressed-tensors"  # quant_method in config.json, and the package that reads it


def quantized_model(src: Path, settings: Evaluate, seed: int = 0) -> Any:
    """The harness's model, for `evaluate.score_tasks`. Raises InputError where `src` is none that can be loaded.

    transformers expands the weights when it loads them or before the first token, so that neither its speed nor its
    memory is that of the runtime: speed is not measured.
    """
    quantization = checkpoint.read_config(src).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise InputError(
            f"config.json in {src} has no quantization_config of {METHOD}",
            field="export",
            remedy="evaluate a checkpoint with float weights as such",
        )
    check_installed()
    checks.load_tokenizer(src)
    return language_models.language_model(src, settings, seed, helpers.processes_for(settings))


def check_installed() -> None:
    """Raise InputError where transformers could not load such a checkpoint."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise AbsentError(
            f"the package {METHOD} is not installed, with which transformers loads quantized weights",
            field="export",
            remedy=extras.install("evaluate"),
        )
