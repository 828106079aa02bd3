"""Where layers, MLPs and config fields live: one record per model_type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptl.errors import InputError

# A tensor of a decoder layer, whatever stands before `layers.`
IN_LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<part>.+)\.(?P<kind>weight|bias)$")


@dataclass(frozen=True)
class Family:
    """How one architecture names the parts that are cut.

    Tensor names are relative to a decoder layer, as in the checkpoint: `<prefix>layers.<i>.<name>.weight`.
    """

    model_type: str
    rows: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # [intermediate, hidden]; biases are cut alike
    columns: str = "mlp.down_proj"  # [hidden, intermediate]; its bias stays
    width_field: str = "intermediate_size"
    depth_field: str = "num_hidden_layers"
    per_layer_fields: tuple[str, ...] = ("layer_types",)  # config lists with one entry per layer


FAMILIES: dict[str, Family] = {family.model_type: family for family in (Family("llama"),)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The record for a checkpoint's config.json. Raises InputError that lists what is supported."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    supported = ", ".join(sorted(FAMILIES))
    raise InputError(
        f"model: model_type {model_type!r} is not supported (supported: {supported}); "
        "a family is one record in ptl/families.py and one line in tests/test_families.py"
    )
