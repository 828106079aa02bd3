"""Quantize a checkpoint with llmcompressor: a script for the Python that has it, which imports nothing of ptl."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Write the weights and config.json of SRC, quantized, to the folder DST."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--scheme", required=True, help="a preset of compressed-tensors")
    parser.add_argument("--group-size", type=int, help="weights that share a scale, where the scheme has groups")
    parser.add_argument("--sequences", type=Path, help="JSON Lines with input_ids; without it nothing is calibrated")
    options = parser.parse_args()

    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        options.src,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=False,
    )
    calibration = _calibration(options.sequences) if options.sequences else {}
    recipe = _recipe(options.scheme, options.group_size, calibrated=bool(calibration))
    oneshot(model=model, recipe=recipe, output_dir=str(options.dst), **calibration)


def _recipe(scheme: str, group_size: int | None, *, calibrated: bool) -> Any:
    """What is done to every linear layer but the output layer: GPTQ where there are sequences, else rounding."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    preset = preset_name_to_scheme(scheme, ["Linear"])
    if group_size:
        preset.weights.group_size = group_size
    modifier = GPTQModifier if calibrated else QuantizationModifier
    return modifier(config_groups={"group_0": preset}, ignore=["lm_head"])


def _calibration(sequences: Path) -> dict[str, Any]:
    """The arguments of `oneshot` for sequences of token ids, one after the other and whole."""
    from datasets import Dataset

    with sequences.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {
        "dataset": Dataset.from_list(rows),
        "num_calibration_samples": len(rows),
        "shuffle_calibration_samples": False,
    }


if __name__ == "__main__":
    main()
