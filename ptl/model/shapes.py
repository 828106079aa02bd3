"""The shape of every tensor of a model, as transformers builds it on torch's meta device, and what follows from shapes.

A checkpoint's headers are compared with it. What a token costs is counted from it, for all families alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.model import checkpoint, config_fields, pretrained, text_tower
from ptl.model.checkpoint import checkpoint_error
from ptl.model.experts import BIASES, DOWN, FUSED, stored_tensors
from ptl.model.families import ConfigJson, Family
from ptl.model.safetensors_io import FLOATS, Entries

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDINGS = "model.embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"
LAYERS = "model.layers."
SIZE_FIELDS = ("_size", "_heads", "_dim", "_layers", "_rank", "_experts")  # ends of the names of a config's sizes


@dataclass(frozen=True)
class ModelShapes:
    """A model without its weights."""

    family: Family
    config: Any  # transformers' own, with its defaults for what config.json leaves out
    tied: bool  # whether the output layer is the embeddings
    # On the meta device, by their names in transformers' memory; the output layer's too where it is tied
    tensors: Mapping[str, Tensor]

    def layers(self) -> list[dict[str, Tensor]]:
        """The tensors of each decoder layer, by their names in the layer: `mlp.down_proj.weight`."""
        layers: list[dict[str, Tensor]] = [{} for _ in range(self.config.num_hidden_layers)]
        for name, tensor in self.tensors.items():
            if name.startswith(LAYERS):
                number, _, in_layer = name.removeprefix(LAYERS).partition(".")
                layers[int(number)][in_layer] = tensor
        return layers

    @property
    def params(self) -> int:
        """Parameters of the model; an output layer that is the embeddings counts once."""
        params = count(self.tensors)
        if self.tied:
            params -= self.tensors[OUTPUT_LAYER].numel()
        return params

    @property
    def matrix_params(self) -> int:
        """Parameters of the matrices that a token is multiplied with: the output layer, and experts that it is sent to.

        Twice as many FLOPs are a forward pass for one token, without attention.
        """
        params = 0
        for name, tensor in self.tensors.items():
            if tensor.dim() < 2 or name == EMBEDDINGS or name.endswith(BIASES):
                continue
            if name.endswith(FUSED):
                params += self.config.num_experts_per_tok * tensor[0].numel()
            else:
                params += tensor.numel()
        return params

    @property
    def attention_width(self) -> int:
        """Numbers of a token's queries and of what its heads give, in all layers; 2 FLOPs each per token of context."""
        config = self.config
        queries = getattr(config, "qk_head_dim", self._head_size)
        values = getattr(config, "v_head_dim", self._head_size)
        return int(config.num_hidden_layers * config.num_attention_heads * (queries + values))

    @property
    def cached_numbers(self) -> int:
        """Numbers of a token in the KV cache, in all layers; a sliding window limits the tokens, not these."""
        config = self.config
        if hasattr(config, "kv_lora_rank"):  # latent attention: from these it computes both
            return int(config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim))
        return int(config.num_hidden_layers * 2 * config.num_key_value_heads * self._head_size)

    @property
    def _head_size(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count(tensors: Mapping[str, Tensor]) -> int:
    """Parameters of these tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


def of_config(config: ConfigJson, family: Family, source: str) -> ModelShapes:
    """The model of a config.json. Raises InputError for what transformers or a step could not compute with.

    `source` is the file, for the messages.
    """
    config_fields.check(config, source)
    model = pretrained.skeleton_of_config(config, source)
    tensors = model.state_dict()
    if family.experts:
        config_fields.check_experts(model.config, family.experts, source)
        if not any(name.endswith(DOWN) for name in tensors):
            raise checkpoint_error(f"{source} has no layer with experts")
    return ModelShapes(family, model.config, family.is_tied(config), tensors)


def of_checkpoint(folder: Path, family: Family) -> ModelShapes:
    """The model of a checkpoint, of a multimodal one its text model, after a look at the headers of its weights.

    Raises InputError that names an impossible config.json, a missing, extra or misshapen tensor, a dtype that cannot be
    pruned, or a tied output layer with values of its own.
    """
    config = text_tower.read_config(folder)
    model = of_config(config, family, f"config.json in {folder}")
    checkpoint.check_no_adapter(folder)
    contents = text_tower.contents(folder)
    entries = {name: entry for name, entry in contents.items() if family.is_read(name, config)}
    expected = stored_tensors(model.tensors, family.experts, entries)
    _check_names(folder, model, entries, expected.keys())
    _check_tensors(config, entries, expected)
    if model.tied:
        checkpoint.check_tied(entries)
    return model


def _check_names(folder: Path, model: ModelShapes, entries: Entries, expected: Set[str]) -> None:
    """All tensors of the model, and no others: transformers would initialise missing ones and drop unknown ones."""
    missing = expected - entries.keys() - ({OUTPUT_LAYER} if model.tied else set())  # a tied one may be stored
    unknown = entries.keys() - expected
    if not missing and not unknown:
        return
    # Only the first is named: a wrong checkpoint has hundreds.
    first, *others = sorted(missing or unknown)
    named = f"{first} and {len(others)} more" if others else first
    raise checkpoint_error(
        f"{folder} {'lacks tensor' if missing else 'has an unknown tensor'} {named}, for model_type "
        f"{model.family.model_type} with {model.config.num_hidden_layers} layers",
        "use a complete checkpoint of this architecture",
    )


def _check_tensors(config: ConfigJson, entries: Entries, expected: Mapping[str, Tensor]) -> None:
    """Every tensor has the shape that config.json gives it, and floating-point numbers.

    Their dtypes may differ: transformers keeps some tensors in float32.
    """
    for name, entry in entries.items():
        if entry.shape != expected[name].shape:
            sizes = {field: value for field, value in config.items() if field.endswith(SIZE_FIELDS)}
            settings = ", ".join(f"{field}={value}" for field, value in sorted(sizes.items()))
            raise checkpoint_error(
                f"tensor {name} in {entry.path} has shape {list(entry.shape)}, and config.json gives it "
                f"{list(expected[name].shape)} ({settings})",
                "correct config.json, or use a checkpoint with the same shapes in every layer",
            )
        if entry.dtype not in FLOATS:
            possible = ", ".join(FLOATS)
            raise checkpoint_error(
                f"tensor {name} in {entry.path} is {entry.dtype}; one of {possible} is needed",
                "load it with from_pretrained(..., dtype=...), save it, and give that folder",
            )
