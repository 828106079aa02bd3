"""The language model inside a multimodal checkpoint: which tensors it has, by which names, and its config.

ptl prunes language models: the import takes this one out and saves it as a checkpoint of its own. Whatever looks at
a model before the import (`ptl validate`, `ptl plan`) sees the text model too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ptl.model import checkpoint, pretrained, safetensors_io
from ptl.model.checkpoint import OUTPUT_LAYER
from ptl.model.families import TEXT_TOWERS, ConfigJson
from ptl.model.safetensors_io import Entries, Entry, NewTensor

# What tensor names of the text model begin with: in files on the hub, then in a model in memory; and in a text model
PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
# Fields that hold for the text model too, and for which the multimodal config has the last word
OUTER_FIELDS = (
    *("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
# Settings of how images are cut and scaled
IMAGE_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def has_tower(config: ConfigJson) -> bool:
    """Whether the config is that of a multimodal model whose text model can be taken out."""
    return str(config.get("model_type")) in TEXT_TOWERS


def text_config(config: ConfigJson) -> dict[str, Any]:
    """The config of the text model in a multimodal one."""
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise checkpoint.checkpoint_error(
            f"config.json has text_config={text!r}, which must be a JSON object"
        )
    outer = {field: config[field] for field in OUTER_FIELDS if field in config}
    return {"model_type": TEXT_TOWERS[config["model_type"]]} | text | outer


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint's language model: config.json, or the text model's part of a multimodal one."""
    config = checkpoint.read_config(folder)
    if not has_tower(config):
        return config
    text = text_config(config)
    # Multimodal configs say either thing of the same model. Of a hub id perhaps only config.json has been downloaded.
    if any(folder.glob("*.safetensors")):
        text["tie_word_embeddings"] = OUTPUT_LAYER not in _text_entries(checkpoint.contents(folder))
    return text


def contents(folder: Path) -> Entries:
    """The tensors of a checkpoint's language model, by the names that they have in a text model."""
    entries = checkpoint.contents(folder)
    return _text_entries(entries) if has_tower(checkpoint.read_config(folder)) else entries


def _text_entries(entries: Entries) -> dict[str, Entry]:
    """Those of the text model, by their new names; the towers of other modalities and their projectors are left out."""
    return {text: entry for name, entry in entries.items() if (text := text_name(name)) is not None}


def text_name(name: str) -> str | None:
    """The name of a multimodal model's tensor in the text model; None: it belongs to another tower."""
    for prefix, text_prefix in PREFIXES:
        if name.startswith(prefix):
            return text_prefix + name.removeprefix(prefix)
    return None


def write_text_model(src: Path, dst: Path) -> None:
    """Write the text model as a checkpoint of its own; a shard with vision tensors alone is left out."""

    def renamed(entry: Entry) -> NewTensor | None:
        name = text_name(entry.name)
        if name is None:
            return None
        return (name, entry.dtype, entry.shape), partial(safetensors_io.read_tensor, entry)

    write_companions(src, dst)
    checkpoint.rewrite(src, dst, renamed)


def write_companions(src: Path, dst: Path) -> Path:
    """Write all of the text model but its weights to the folder `dst`, which is returned."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    dst.mkdir(parents=True, exist_ok=True)
    config = read_config(src)
    # By the class vLLM and llama.cpp choose.
    architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    # Other tools do not know the sizes that transformers takes for those that a multimodal config leaves out.
    complete = pretrained.config_with_defaults(config)
    sizes = {
        field: getattr(complete, field)
        for field in SIZES
        if getattr(complete, field, None) is not None
    }
    checkpoint.write_json(dst / "config.json", {"architectures": architectures} | sizes | config)
    checkpoint.copy_companions(src, dst, excluded=IMAGE_FILES)
    return dst
