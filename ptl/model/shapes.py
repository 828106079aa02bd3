"""The shape of every tensor of a model, as transformers builds it on torch's meta device, and what follows from shapes.

A checkpoint's headers are compared with it, after the fields of its config.json that transformers reads otherwise than
a step needs them. What a token costs is counted from it, for all families alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError
from ptl.model import axes, checkpoint, pretrained, text_tower
from ptl.model.checkpoint import EMBEDDINGS, OUTPUT_LAYER, checkpoint_error
from ptl.model.experts import BIASES, DOWN, FUSED, Experts, stored_tensors
from ptl.model.families import ConfigJson, Family
from ptl.model.safetensors_io import FLOATS, Entries

if TYPE_CHECKING:
    from torch import Tensor

LAST_NORM = "model.norm.weight"
LAYERS = "model.layers."
# ends of the names of a config's sizes
SIZE_FIELDS = ("_size", "_heads", "_dim", "_layers", "_rank", "_experts")
MAX_LAYERS = 10_000  # a model beyond it is a typing error, and would take minutes to build


@dataclass(frozen=True)
class ModelShapes:
    """A model without its weights."""

    family: Family
    content: ConfigJson  # of config.json
    config: Any  # transformers' own, with its defaults for what config.json leaves out
    # On the meta device, by their names in transformers' memory; the output layer's too where it is tied
    tensors: Mapping[str, Tensor]

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embeddings."""
        return bool(self.config.tie_word_embeddings)

    def layers(self) -> list[dict[str, Tensor]]:
        """The tensors of each decoder layer, by their names in the layer: `mlp.down_proj.weight`."""
        layers: list[dict[str, Tensor]] = [{} for _ in range(self.config.num_hidden_layers)]
        for name, tensor in self.tensors.items():
            if name.startswith(LAYERS):
                number, _, in_layer = name.removeprefix(LAYERS).partition(".")
                layers[int(number)][in_layer] = tensor
        return layers

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
        queries = getattr(config, "qk_head_dim", axes.head_size(config))
        return int(
            config.num_hidden_layers
            * config.num_attention_heads
            * (queries + axes.value_size(config))
        )

    @property
    def cached_numbers(self) -> int:
        """Numbers of a token in the KV cache, in all layers; a sliding window limits the tokens, not these."""
        config = self.config
        if hasattr(config, "kv_lora_rank"):  # latent attention: from these it computes both
            return int(config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim))
        return int(config.num_hidden_layers * 2 * axes.kv_heads(config) * axes.head_size(config))


def of_config(config: ConfigJson, family: Family, source: str) -> ModelShapes:
    """The model of a config.json. Raises InputError for what transformers or a step could not compute with.

    `source` is the file, for the messages.
    """
    _check_config(config, source)
    model = pretrained.skeleton_of_config(config, source)
    # Transformers builds a model without neurons or experts too.
    for name in (family.width_field, "num_experts_per_tok", "n_group", "topk_group"):
        value = getattr(model.config, name, None)
        if value is not None and value < 1:
            raise checkpoint_error(
                f"{source} has {name}={value!r}, which must be a whole number of 1 or more"
            )
    tensors = model.state_dict()
    if family.experts:
        _check_experts(model.config, family.experts, source)
        if not any(name.endswith(DOWN) for name in tensors):
            raise checkpoint_error(f"{source} has no layer with experts")
    return ModelShapes(family, config, model.config, tensors)


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


def _check_config(config: ConfigJson, source: str) -> None:
    """Raise InputError for fields of a config.json that transformers would read otherwise, or not object to.

    `source` is the file, for the messages.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise checkpoint_error(
            f"{source} has a quantization_config ({method}), and only float weights can be pruned",
            "where the weights are float, remove that field, else load the model dequantized and save it (mxfp4: "
            "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)))",
        )
    depth = config.get("num_hidden_layers", 1)
    if not isinstance(depth, int) or not 0 < depth <= MAX_LAYERS:
        problem = f"{source} has num_hidden_layers={depth!r}, which must be a whole number from 1 to {MAX_LAYERS:,}"
        raise checkpoint_error(problem, "correct it, or fetch the checkpoint again")


def _check_experts(config: Any, experts: Experts, source: str) -> None:
    """Raise InputError where a token cannot be sent to as many experts as transformers' config says."""
    number = getattr(config, experts.counts[0])
    groups = getattr(config, "n_group", 1)
    if number % groups or number < fewest_experts(config):
        raise checkpoint_error(
            f"{source} has {number} experts in each layer, of which num_experts_per_tok={config.num_experts_per_tok} "
            f"cannot be chosen (n_group={groups}, topk_group={getattr(config, 'topk_group', 1)})"
        )


def _check_names(folder: Path, model: ModelShapes, entries: Entries, expected: Set[str]) -> None:
    """All tensors of the model, and no others: transformers would initialise missing ones and drop unknown ones."""
    # a tied one may be stored
    missing = expected - entries.keys() - ({OUTPUT_LAYER} if model.tied else set())
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


def fewest_experts(config: Any) -> int:
    """The fewest experts that a layer of a mixture can have: a token finds all its own in the groups that are chosen.

    `config` is that of transformers.
    """
    groups: int = getattr(config, "n_group", 1)
    of_group = math.ceil(config.num_experts_per_tok / getattr(config, "topk_group", 1))
    # By its two best experts a group is chosen.
    return groups * (max(2, of_group) if groups > 1 else of_group)


def longrope_limit(config: ConfigJson) -> int | None:
    """Tokens up to which longrope has its short factors; none for other rotary embeddings."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = config.get(field)
        if isinstance(parameters, dict) and parameters.get("rope_type", parameters.get("type")) in (
            "longrope",
            "su",
        ):
            key = "original_max_position_embeddings"
            return parameters.get(key) or config.get(key)
    return None


def check_positions(folder: Path, lengths: Mapping[str, int]) -> None:
    """Raise InputError for a config field whose sequences are longer than the model's context; `lengths` in tokens."""
    positions = text_tower.read_config(folder).get("max_position_embeddings")
    if not isinstance(positions, int):  # a family without a limit
        return
    for field, length in lengths.items():
        if length > positions:
            raise InputError(
                f"{length} is more than the model's {positions} positions ({folder})",
                field=field,
                remedy="lower it",
            )
