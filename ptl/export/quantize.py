"""Quantize a checkpoint with llmcompressor: a script for the Python that has it, which imports nothing of ptl.

Arguments: SRC DST OPTIONS. It writes the weights and config.json of SRC, quantized, to the folder DST. OPTIONS is JSON:
`scheme`, a preset of compressed-tensors; `group_size`, weights that share a scale, or null where it has no groups; and
`sequences`, a file of JSON Lines with input_ids, or null: nothing is calibrated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(src: str, dst: str, scheme: str, group_size: int | None, sequences: str | None) -> None:
    """Every linear layer but the output layer is quantized: by GPTQ where there are sequences, else by rounding."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        src, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    preset = preset_name_to_scheme(scheme, ["Linear"])
    if group_size:
        preset.weights.group_size = group_size
    modifier = QuantizationModifier
    calibration: dict[str, Any] = {}
    if sequences:
        modifier = GPTQModifier
        rows = [
            json.loads(line) for line in Path(sequences).read_text(encoding="utf-8").splitlines()
        ]
        # One after the other and whole
        calibration = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "shuffle_calibration_samples": False,
        }
    recipe = modifier(config_groups={"group_0": preset}, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, output_dir=dst, **calibration)


if __name__ == "__main__":
    _, src, dst, options = sys.argv
    main(src, dst, **json.loads(options))
