"""The tensors of a checkpoint against its config.json: names, shapes and dtypes, from the headers. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from pathlib import Path

from ptl.model import shapes
from ptl.model.checkpoint import checkpoint_error
from ptl.model.config_fields import Fields
from ptl.model.families import IN_LAYER, ConfigJson, Family
from ptl.model.safetensors_io import FLOATS, Entries, TensorShape
from ptl.model.sizes import Sizes


def check_tensors(folder: Path, config: ConfigJson, family: Family, sizes: Sizes, entries: Entries) -> None:
    """Raise InputError that names a missing, extra or misshapen tensor, or dtypes that cannot be pruned."""
    fused = family.experts is not None and family.experts.is_fused(entries)
    expert_tensors = shapes.expert_tensors(family, sizes, fused)
    _check_names(folder, family, config, sizes, entries, expert_tensors)
    _check_shapes(family, sizes, entries, expert_tensors)
    _check_dtypes(entries)


def _check_names(
    folder: Path,
    family: Family,
    config: ConfigJson,
    sizes: Sizes,
    entries: Entries,
    expert_tensors: Collection[str],  # of each layer that has experts
) -> None:
    """All tensors of the family, and no others: transformers would initialise missing ones and drop unknown ones."""
    layers = range(sizes.num_hidden_layers)
    required = {"model.embed_tokens.weight", "model.norm.weight"}
    for i in layers:
        has_experts = bool(expert_tensors) and i not in sizes.dense_layers
        required.update(f"model.layers.{i}.{part}.weight" for part in family.parts(config, has_experts))
        required.update(f"model.layers.{i}.{part}.bias" for part in family.biases_of(config, has_experts))
        required.update(f"model.layers.{i}.{name}" for name in family.vectors)
        if has_experts:
            required.update(f"model.layers.{i}.{name}" for name in expert_tensors)
    allowed = required | {"lm_head.weight"}  # a tied one may be stored
    if not family.is_tied(config):
        required = allowed

    # Only the first is named: a wrong checkpoint has hundreds.
    missing = required - entries.keys()
    unknown = entries.keys() - allowed
    if missing:
        problem = f"lacks tensor {_first_of(missing)}"
    elif unknown:
        problem = f"has an unknown tensor {_first_of(unknown)}"
    else:
        return
    raise checkpoint_error(
        f"{folder} {problem}, for model_type {family.model_type} with {len(layers)} layers",
        "use a complete checkpoint of this architecture",
    )


def _first_of(names: Set[str]) -> str:
    """The first name, and how many others there are."""
    first = min(names)
    others = len(names) - 1
    return f"{first} and {others} more" if others else first


def _check_shapes(
    family: Family,
    sizes: Sizes,
    entries: Entries,
    expert_tensors: Mapping[str, tuple[TensorShape, Fields]],  # of each layer that has experts
) -> None:
    """Every tensor has the shape that config.json gives it."""
    for name, entry in entries.items():
        # Outside the layers: model.embed_tokens.weight, model.norm.weight, lm_head.weight
        match = IN_LAYER.match(name)
        if match:
            part, kind = match["part"], match["kind"]
        else:
            part, kind = name.removeprefix("model.").split(".")
        in_layer = f"{part}.{kind}" if kind else part
        if match and in_layer in expert_tensors:
            shape, fields = expert_tensors[in_layer]
        else:
            shape, fields = shapes.expected(part, family, sizes)
        if kind == "bias":
            shape = shape[:1]  # one number for each row of the weight
        if entry.shape != shape:
            settings = ", ".join(f"{family.config_field(field)}={getattr(sizes, field)}" for field in fields)
            raise checkpoint_error(
                f"tensor {name} in {entry.path} has shape {list(entry.shape)}, "
                f"and config.json gives it {list(shape)} by {settings}",
                "correct config.json, or use a checkpoint with the same shapes in every layer",
            )


def _check_dtypes(entries: Entries) -> None:
    """All tensors are floating-point numbers, each of a dtype of its own: transformers keeps some in float32."""
    for name, entry in entries.items():
        if entry.dtype not in FLOATS:
            possible = ", ".join(FLOATS)
            raise checkpoint_error(
                f"tensor {name} in {entry.path} is {entry.dtype}; one of {possible} is needed",
                "load it with from_pretrained(..., dtype=...), save it, and give that folder",
            )
