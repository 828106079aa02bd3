"""Models that many people start from: hub id, family and size, for `ptl init --list` and for ids that are misspelt.

Any other checkpoint of these families works as well; nothing but the list depends on this table.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ptl.model.families import FAMILIES, TEXT_TOWERS


@dataclass(frozen=True)
class KnownModel:
    """A model on the hub."""

    hub_id: str
    family: str  # model_type in its config.json
    billions: float  # parameters, 10^9
    gated: bool


# Hub id: parameters of the language model, 10^9; by model_type in config.json.
_BILLIONS = {
    "qwen3": {
        "Qwen/Qwen3-0.6B": 0.596,
        "Qwen/Qwen3-1.7B": 1.72,
        "Qwen/Qwen3-4B": 4.02,
        "Qwen/Qwen3-8B": 8.19,
        "Qwen/Qwen3-14B": 14.8,
        "Qwen/Qwen3-32B": 32.8,
    },
    "qwen3_moe": {
        "Qwen/Qwen3-30B-A3B": 30.5,
    },
    "qwen2_moe": {
        "Qwen/Qwen1.5-MoE-A2.7B": 14.3,
    },
    "glm4_moe": {
        "zai-org/GLM-4.5-Air": 107.0,
    },
    "olmoe": {
        "allenai/OLMoE-1B-7B-0924": 6.92,
    },
    "qwen2": {
        "Qwen/Qwen2.5-0.5B": 0.494,
        "Qwen/Qwen2.5-1.5B": 1.54,
        "Qwen/Qwen2.5-3B": 3.09,
        "Qwen/Qwen2.5-7B": 7.62,
        "Qwen/Qwen2.5-14B": 14.8,
        "Qwen/Qwen2.5-32B": 32.8,
        "Qwen/Qwen2.5-Math-1.5B": 1.54,
        "Qwen/Qwen2.5-Math-7B": 7.62,
        "Qwen/Qwen2.5-Coder-7B": 7.62,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62,
    },
    "llama": {
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8.03,
        "meta-llama/Llama-3.2-1B": 1.24,
        "meta-llama/Llama-3.2-1B-Instruct": 1.24,
        "meta-llama/Llama-3.2-3B": 3.21,
        "meta-llama/Llama-3.2-3B-Instruct": 3.21,
        "meta-llama/Llama-3.1-8B": 8.03,
        "meta-llama/Llama-3.1-8B-Instruct": 8.03,
        "HuggingFaceTB/SmolLM2-135M": 0.135,
        "HuggingFaceTB/SmolLM2-360M": 0.362,
        "HuggingFaceTB/SmolLM2-1.7B": 1.71,
    },
    "smollm3": {
        "HuggingFaceTB/SmolLM3-3B": 3.08,
    },
    "mistral": {
        "mistralai/Mistral-7B-v0.3": 7.25,
        "mistralai/Mistral-7B-Instruct-v0.3": 7.25,
        "mistralai/Ministral-8B-Instruct-2410": 8.02,
    },
    "phi3": {
        "microsoft/Phi-3-mini-4k-instruct": 3.82,
        "microsoft/Phi-4-mini-instruct": 3.84,
        "microsoft/phi-4": 14.7,
    },
    "gemma2": {
        "google/gemma-2-2b": 2.61,
        "google/gemma-2-9b": 9.24,
    },
    "gemma3_text": {
        "google/gemma-3-270m": 0.268,
        "google/gemma-3-1b-it": 1.00,
    },
    "gemma3": {
        "google/gemma-3-4b-it": 3.88,
        "google/gemma-3-12b-it": 11.8,
        "google/gemma-3-27b-it": 27.0,
    },
    "olmo2": {
        "allenai/OLMo-2-0425-1B": 1.48,
        "allenai/OLMo-2-1124-7B": 7.30,
        "allenai/OLMo-2-1124-13B": 13.7,
    },
}
# Beginnings of ids that the hub gives only to those who have accepted the licence.
GATED = ("meta-llama/", "google/gemma", "mistralai/Ministral")
# Those whose family is supported.
KNOWN_MODELS = tuple(
    KnownModel(hub_id, family, billions, hub_id.startswith(GATED))
    for family, models in _BILLIONS.items()
    for hub_id, billions in models.items()
    if family in FAMILIES or family in TEXT_TOWERS
)


def similar(name: str) -> list[str]:
    """Ids that were perhaps meant: the one of that name where the organisation is missing, else the nearest."""
    wanted = name.rpartition("/")[2].lower()
    by_name = {model.hub_id.rpartition("/")[2].lower(): model.hub_id for model in KNOWN_MODELS}
    if wanted in by_name:
        return [by_name[wanted]]
    return [by_name[close] for close in difflib.get_close_matches(wanted, by_name, n=2, cutoff=0.8)]
