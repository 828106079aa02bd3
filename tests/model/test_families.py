"""Every family: the same statements on a tiny model of each. A new family is a line in variants.yaml.

What their pruned models compute is in tests/pruning/test_width.py.
"""

import copy

import pytest
import tiny_models
import torch
from tiny_models import (
    DAILY,
    MOE_VARIANTS,
    VARIANTS,
    batches,
    build,
    change_config,
    family_at,
    load,
    logits,
    save,
)
from transformers import AutoConfig

from ptl.errors import InputError
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES, family_of
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.surgery import PER_LAYER_FIELDS, Selection, prune_config, write_pruned

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = tuple(range(4))


@pytest.fixture
def source(variant, tmp_path):
    return save(build(variant), tmp_path / "source")


@pytest.mark.parametrize("variant", tiny_models.nightly_but(*DAILY, of=VARIANTS | MOE_VARIANTS))
def test_layer_by_layer_it_computes_what_the_whole_model_does(variant, source):
    model, texts = build(variant), batches()
    texts[0]["labels"][:, :4] = -100  # a prompt
    layerwise = LayerwiseModel(source, family_at(source), texts)
    with torch.no_grad():
        states = layerwise.embed()
        for i in ALL:
            with layerwise.layer(i):
                states = [layerwise.run(i, b, hidden) for b, hidden in enumerate(states)]
        with layerwise.head():
            losses = [layerwise.loss(0, row, states[0][row : row + 1]) for row in range(3)]
        for row, loss in enumerate(losses):
            ids, labels, mask = (
                texts[0][name][row : row + 1] for name in ("input_ids", "labels", "attention_mask")
            )
            predicted = model(input_ids=ids, attention_mask=mask).logits[0, :-1]
            expected = torch.nn.functional.cross_entropy(predicted, labels[0, 1:], reduction="sum")
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.device.type == "meta" for parameter in layerwise.causal_lm.parameters())


@pytest.mark.parametrize("variant", ["qwen2-sliding", "gemma2", "gemma3_text", "smollm3", "cwm"])
def test_lists_that_the_file_leaves_out_stay_with_their_layers(source):
    family, layers = family_at(source), (0, 1, 3)
    lists = [name for name in PER_LAYER_FIELDS if name in checkpoint.read_config(source)]
    change_config(source, **dict.fromkeys(lists, ...))
    whole = AutoConfig.from_pretrained(source)
    pruned = AutoConfig.for_model(
        **prune_config(checkpoint.read_config(source), family, Selection(layers, {}))
    )
    assert lists
    for field in lists:
        assert getattr(pruned, field) == [getattr(whole, field)[i] for i in layers]


def test_the_sources_config_stays_as_it_was():
    """transformers writes rope_theta into the scaling that it is given."""
    config = {"model_type": "qwen2", "num_hidden_layers": 4, "rope_theta": 1e6}
    config["rope_scaling"] = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    before = copy.deepcopy(config)
    pruned = prune_config(config, FAMILIES["qwen2"], Selection((0, 2, 3), {}))
    assert config == before and pruned["rope_scaling"] == before["rope_scaling"]


def test_files_of_ministral_and_internlm3_are_read_as_they_are_on_the_hub(tmp_path):
    """So does transformers: Ministral 8B has a file with model_type mistral."""
    source = change_config(save(build("ministral"), tmp_path / "source"), model_type="mistral")
    write_pruned(source, tmp_path / "pruned", family_at(source), Selection((0, 2, 3), {}))
    reference, batch = tiny_models.skipping(build("ministral"), (0, 2, 3)), batches()[0]
    assert torch.equal(logits(load(tmp_path / "pruned"), batch), logits(reference, batch))
    source = save(build("internlm3"), tmp_path / "internlm3")
    config = checkpoint.read_config(source)
    names = {
        "attention_bias": ...,
        "mlp_bias": ...,
        "qkv_bias": config["attention_bias"],
        "bias": config["mlp_bias"],
    }
    change_config(source, **names)
    assert model_dimensions(source, family_at(source)).params == load(source).num_parameters()


def test_every_family_is_tested():
    assert {model_type for model_type, _ in (VARIANTS | MOE_VARIANTS).values()} == FAMILIES.keys()


@pytest.mark.parametrize("model_type", ["gpt2", None, ["llama"], "ernie4_5_moe", "gemma3n"])
def test_other_architectures_are_refused(model_type):
    with pytest.raises(
        InputError, match=r"^model: .*is not supported \(supported: cohere2, cwm, deepseek_v3, "
    ):
        family_of({"model_type": model_type})
