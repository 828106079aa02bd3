"""The model card of the dense model: its license, and which published model it is or was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ptl import log
from ptl.model import checkpoint

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # what the hub's metadata allows
# a folder of the hub's own cache
CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
CARD = "README.md"
LICENSE_FIELDS = ("license", "license_name", "license_link")


def published(path: str, folder: Path) -> dict[str, str]:
    """The fields of a model card that a model made from this one repeats; empty texts where they are not known.

    `path` is the hub id or the folder that the config names, `folder` its local files. Returns `base_model` and
    `license`, with the `license_name` and `license_link` of a license that the hub does not know by name.
    """
    card = _metadata(folder / CARD)
    fields = {name: card.get(name) for name in LICENSE_FIELDS}
    fields["base_model"] = _hub_id(path, folder) or _first(card.get("base_model"))
    if not fields["license"]:
        log.say(
            "import-model",
            f"the model card will name no license: {CARD} of {path} is missing or names none",
        )
    return {name: value if isinstance(value, str) else "" for name, value in fields.items()}


def _hub_id(path: str, folder: Path) -> str:
    """The hub id of a checkpoint, or of the one that it was loaded from; empty where nothing names it."""
    for part in folder.resolve().parts:
        if cached := CACHED.fullmatch(part):
            return f"{cached['owner']}/{cached['name']}"
    # Older versions of transformers wrote where a checkpoint was loaded from.
    loaded_from = checkpoint.read_config(folder).get("_name_or_path")
    for name in (path, loaded_from):
        if (
            isinstance(name, str)
            and "/" in name
            and HUB_ID.fullmatch(name)
            and not Path(name).exists()
        ):
            return name
    return ""


def _metadata(card: Path) -> dict[str, Any]:
    """The YAML at the beginning of a model card; empty where there is none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:  # UnicodeDecodeError is a ValueError
        log.say("import-model", f"warning: {card} is not read as a model card: {error}")
        return {}


def _first(names: Any) -> Any:
    """The name, or the first of several: a merge has more than one base model."""
    return names[0] if isinstance(names, list) and names else names
