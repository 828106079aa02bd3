"""What config.json alone tells of a model's sizes is what its weights have."""

import pytest
import tiny_models

from ptl.model import checkpoint, shapes
from ptl.model.dimensions import dimensions_of, model_dimensions
from ptl.model.families import family_of


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_the_config_and_the_weights_agree(variant, tmp_path):
    folder = tiny_models.save(tiny_models.build(variant), tmp_path / "model", tokenizer=False)
    config = checkpoint.read_config(folder)
    family = family_of(config)
    assert dimensions_of(shapes.of_config(config, family, "config.json")) == model_dimensions(folder, family)
