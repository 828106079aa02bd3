"""What makes a checkpoint's folder an MLflow model: the file MLmodel, and the tokenizer where MLflow looks for it.

`mlflow.transformers.load_model("models:/NAME/VERSION")` and `mlflow.pyfunc.load_model` then load it from the store. The
files hold nothing but what follows from the checkpoint: equal checkpoints stay equal, byte for byte.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from ptl.model import checkpoint

MLMODEL = checkpoint.MLFLOW_FILES[0]
# Where mlflow.transformers.model_io looks for it, beside the weights' own folder.
TOKENIZER = Path("components", "tokenizer")


def write(folder: Path) -> None:
    """Make an MLflow model of a checkpoint's folder; the weights are where they are."""
    tokenizer = folder / TOKENIZER
    tokenizer.mkdir(parents=True, exist_ok=True)
    checkpoint.copy_companions(folder, tokenizer)
    # Some tokenizers are chosen by the model's type.
    shutil.copyfile(folder / "config.json", tokenizer / "config.json")
    transformers = {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        # Not the class in config.json, which need not name one.
        "pipeline_model_type": "AutoModelForCausalLM",
        "source_model_name": "",
        "model_binary": ".",
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
    }
    flavors = {
        "python_function": {"loader_module": "mlflow.transformers"},
        "transformers": transformers,
    }
    (folder / MLMODEL).write_text(yaml.safe_dump({"flavors": flavors}))
