"""An ordinary checkpoint becomes the run's dense model: checked, weights included, and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from ptl.model import checkpoint, checks, hub, pretrained
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of


def import_checkpoint(path: str, revision: str | None, dst: Path) -> None:
    """Copy an ordinary checkpoint to `dst`, weights checked for NaN; raises InputError for what is wrong with it."""
    # Headers and small files first: what is wrong there is found in seconds.
    src = hub.locate(path, revision)
    family = family_of(checkpoint.read_config(src))
    checkpoint.check_links(src)
    model_dimensions(src, family)
    pretrained.config(src)
    checks.check_tokenizer(src)

    # Then every value.
    weights = checkpoint.shards(src)
    checkpoint.check_finite(weights)

    # Weights and config as they are, and what must travel with them.
    dst.mkdir(parents=True, exist_ok=True)
    for file in [*weights, src / "config.json", src / checkpoint.INDEX]:
        if file.is_file():  # one shard has no index
            shutil.copyfile(file, dst / file.name)
    checkpoint.copy_companions(src, dst)
