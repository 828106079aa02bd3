"""What pruned variants of a model need, by its config.json alone."""

import json

import pytest
from tiny_models import VARIANTS, build, build_multimodal, save

from ptl.model import shapes
from ptl.model.goals import dense_model
from ptl.preflight.forecast_model import shape_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_needs_are_those_of_the_checkpoint(variant, tmp_path):
    source = save(build(variant), tmp_path, tokenizer=False)
    needs, static = dense_model(source).needs(), shapes.static_cost(source)
    assert (needs.params, needs.flops_per_token) == (static.params, static.flops_per_token)
    assert 4 * needs.cached_numbers == static.kv_bytes_per_token  # float32
    assert needs.memory(3, 5, 2) == 2 * (needs.params + 3 * 5 * needs.cached_numbers)


def test_of_a_multimodal_checkpoint_the_text_model_counts(tmp_path):
    source = save(build_multimodal("gemma3", "gemma3_text"), tmp_path, tokenizer=False)
    assert dense_model(source).needs().params == shape_of(str(source)).params


@pytest.fixture
def llama(tmp_path):
    return dense_model(save(build("llama"), tmp_path, tokenizer=False))


@pytest.mark.parametrize("unit", ["neurons", "layers"])
def test_the_largest_that_reaches_a_goal_is_one_neuron_or_layer_from_one_that_does_not(llama, unit):
    most = llama.dimensions.width if unit == "neurons" else llama.dimensions.layers - 1
    sizes = [llama.needs(removed, unit).params for removed in range(most + 1)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == most + 1
    for removed in (1, 2, most):
        just_enough = llama.needs(removed, unit)
        assert llama.largest(unit, lambda needs, most=just_enough: needs.params <= most.params) == just_enough
        below = llama.largest(unit, lambda needs, most=just_enough: needs.params < most.params)
        assert below == (None if removed == most else llama.needs(removed + 1, unit))


def test_layers_take_their_cache_with_them_and_neurons_do_not(llama):
    assert llama.smallest("neurons").cached_numbers == llama.needs().cached_numbers
    assert llama.smallest("layers").cached_numbers == llama.needs().cached_numbers // 4


def test_a_config_without_weights_is_enough(tmp_path):
    source = save(build("llama"), tmp_path / "whole", tokenizer=False)
    raw = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 77}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    alone = dense_model(tmp_path)
    assert alone.needs() == dense_model(source).needs() and alone.context == 77
