"""The pipeline, its configs and the examples: in the root of a checkout, or in an installed package in ptl/shipped."""

from __future__ import annotations

import sys
from pathlib import Path

import ptl
from ptl.config.base import FOLDER
from ptl.config.run import Config, check
from ptl.errors import InputError

PACKAGE = Path(ptl.__file__).parent
INSTALLED = PACKAGE / "shipped"  # setup.py makes it
ROOT = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent
CONFIGS = ROOT / "pipelines" / "prune_tune_loop" / "configs"


def make_importable() -> None:
    """Let `pipelines` and `components` be those that belong to this package, whatever else has these names."""
    sys.path.insert(0, str(ROOT))


def config_file(text: str) -> Path:
    """The file of a config that is given by its path, or by the name of a shipped one."""
    path = Path(text)
    shipped = CONFIGS / f"{text}.yaml"
    # A name may have a dot in it, as qwen2.5-7b has.
    is_name = path.name == text and path.suffix not in (".yaml", ".yml")
    if not is_name or path.is_file():
        return path
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    raise InputError(
        f"no file {text}, and no shipped config of this name",
        field="config",
        remedy=f"give the path of a YAML file, or one of {names}",
    )


def shown(file: Path) -> str:
    """A config as it can be typed: a shipped one by its name, wherever it is installed."""
    return file.stem if file.parent == CONFIGS else str(file)


def image_root(file: Path) -> Path:
    """The folder that stands for the images' working directory: the paths of a config below it are relative to it."""
    # The images hold the examples; a config of one's own says where its files are.
    return ROOT if file.absolute().parent == CONFIGS else Path.cwd()


def as_in_images(config: Config, file: Path) -> Config:
    """A config whose paths are those that its steps find in the images, from whatever folder it is compiled."""
    settings = config.model_dump(mode="json", context={FOLDER: image_root(file)})
    return check(Config, settings, str(file))
