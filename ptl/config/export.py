"""Which exports of the final checkpoint a run makes for other runtimes."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ptl.config.base import Positive, Section

# By format: the data types of the weights. Those of GGUF are llama.cpp's names; k-quants need rows divisible by 256.
TYPES = {
    "gguf": ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m"),
    "compressed-tensors": ("fp8", "int8", "w4a16"),
}
# What a server loads: a checkpoint, or an export of it
ServedFormat = Literal["transformers", "gguf", "compressed-tensors"]


def gguf_name(type: str) -> str:
    """The file that an export to GGUF has."""
    return f"model-{type}.gguf"


class Export(Section):
    """One export of the final checkpoint."""

    format: Literal["gguf", "compressed-tensors"]
    """gguf: for llama.cpp; compressed-tensors: quantized weights for vLLM and transformers"""
    type: str
    """data type of the weights: f16, q8_0, q4_k_m and others for gguf; fp8, int8 or w4a16 for compressed-tensors"""
    limit: Positive | None = None
    """score it on only the first N items of each benchmark; default: on all items that the run scores"""

    @property
    def name(self) -> str:
        """For example gguf-q4_k_m."""
        return f"{self.format}-{self.type}"

    @model_validator(mode="after")
    def _format_has_the_type(self) -> Export:
        types = TYPES[self.format]
        if self.type not in types:
            raise ValueError(f"type={self.type!r} is none of {self.format}'s: {', '.join(types)}")
        return self
