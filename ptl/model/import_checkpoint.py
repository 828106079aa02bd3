"""An ordinary checkpoint becomes the run's dense model: checked, weights included, and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from ptl import log
from ptl.model import checkpoint, checks, hub, text_tower
from ptl.model.dimensions import model_dimensions
from ptl.model.families import family_of


def import_checkpoint(path: str, revision: str | None, dst: Path) -> None:
    """Copy an ordinary checkpoint to `dst`, weights checked for NaN; raises InputError for what is wrong with it.

    Of a multimodal checkpoint the text model is saved, and a line of the log says so.
    """
    # Headers and small files first: what is wrong there is found in seconds.
    src = hub.locate(path, revision)
    family = family_of(text_tower.read_config(src))
    checkpoint.check_links(src)
    model_dimensions(src, family)
    checkpoint.check_tokenizer(src)
    checks.load_tokenizer(src)

    # Then every value.
    weights = checkpoint.shards(src)
    checkpoint.check_finite(weights)

    # Weights and config, and what must travel with them.
    dst.mkdir(parents=True, exist_ok=True)
    config = checkpoint.read_config(src)
    if text_tower.has_tower(config):
        log.say("import-model", f"{path} is a {config['model_type']}: its text model is saved, as {family.model_type}")
        text_tower.write_text_model(src, dst)
        return
    for file in [*weights, src / "config.json", src / checkpoint.INDEX]:
        if file.is_file():  # one shard has no index
            shutil.copyfile(file, dst / file.name)
    checkpoint.copy_companions(src, dst)
