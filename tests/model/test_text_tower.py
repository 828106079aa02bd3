"""The text model of a multimodal checkpoint: the same logits, from either layout of names, in shards or not."""

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_models import batches, build_multimodal, family_at, load, logits, save
from transformers import AutoConfig

from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.model import checkpoint, hub, pretrained, text_tower
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES, family_of
from ptl.model.hub import import_checkpoint
from ptl.preflight.forecast_model import shape_of
from ptl.preflight.preflight import check_model

KINDS = {
    "gemma3": ("gemma3", "gemma3_text", {}),
    "mistral3": ("mistral3", "mistral", {"tie_word_embeddings": False}),
    # tied, though its text_config says otherwise
    "mistral3-ministral3": ("mistral3", "ministral3", {}),
}
# The text fields of google/gemma-3-4b-it; its config.json leaves all others to their defaults
GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {
        **{
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        **{"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    },
    "vision_config": {"model_type": "siglip_vision_model"},
    "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("gemma3", "on the hub"),
        ("mistral3", "shards"),
        ("mistral3", "in memory"),
        ("mistral3-ministral3", "in memory"),
    ],
)
def test_the_text_model_computes_the_same(kind, layout, tmp_path):
    model_type, variant, changes = KINDS[kind]
    multimodal = build_multimodal(model_type, variant, **changes)
    source = save(
        multimodal, tmp_path / "source", shard_size="8KB" if layout == "shards" else "5GB"
    )
    if layout == "in memory":  # the names of the newer layout, as the model has them
        tensors = load_file(source / "model.safetensors")
        named = {
            f"model.{name}".replace("language_model.model.", "language_model."): t
            for name, t in tensors.items()
        }
        named = {
            name.replace("model.language_model.lm_head", "lm_head"): tensor
            for name, tensor in named.items()
        }
        save_file(named, source / "model.safetensors", metadata={"format": "pt"})
    (source / "preprocessor_config.json").write_text("{}")
    import_checkpoint(str(source), None, tmp_path / "text")
    text, family = load(tmp_path / "text"), family_at(tmp_path / "text")
    assert checkpoint.read_config(tmp_path / "text")["architectures"] == [type(text).__name__]
    for batch in batches():
        assert torch.equal(logits(text, batch), logits(multimodal, batch))
    dimensions = model_dimensions(tmp_path / "text", family)
    assert (
        dimensions == model_dimensions(source, family)
        and dimensions.params == text.num_parameters()
    )
    # What images need stays behind, what text needs does not.
    files = {path.name for path in (tmp_path / "text").iterdir()}
    assert (
        "preprocessor_config.json" not in files
        and {"tokenizer.json", "generation_config.json"} <= files
    )
    assert (len(checkpoint.shards(tmp_path / "text")) > 1) == (layout == "shards")


def test_what_is_checked_before_the_import_sees_the_text_model_and_whether_it_can_be_pruned(
    tmp_path,
):
    source = save(
        build_multimodal("mistral3", "mistral", tie_word_embeddings=False), tmp_path / "source"
    )
    params = check_model(source, Schedule(target=0.3, recovery_tokens=10), Prune()).params
    assert (
        params
        == shape_of(str(source)).params
        == model_dimensions(source, FAMILIES["mistral"]).params
    )
    with pytest.raises(InputError, match="run `ptl import-model`, which saves its text model"):
        family_of(checkpoint.read_config(source))
    with pytest.raises(
        InputError, match=r"recover.teacher: .*source is no language model \(model_type mistral3\)"
    ):
        pretrained.causal_lm(source, field="recover.teacher")
    for text, problem in (
        ("gemma", "must be a JSON object"),
        ({"model_type": "mistral4"}, "'mistral4' is not supp"),
    ):
        with pytest.raises(InputError, match=problem):
            family_of(text_tower.text_config({"model_type": "mistral3", "text_config": text}))


def test_fields_that_the_file_leaves_out_are_those_of_transformers_in_a_plan_too(tmp_path):
    text = text_tower.text_config(GEMMA_3_4B)
    made, expected = (AutoConfig.for_model(**text), AutoConfig.for_model(**GEMMA_3_4B).text_config)
    differing = {"architectures", "dtype", "eos_token_id", "transformers_version"}
    assert {
        name for name, value in expected.to_dict().items() if made.to_dict()[name] != value
    } <= differing
    assert text["eos_token_id"] == [1, 106] and text["torch_dtype"] == "bfloat16"
    checkpoint.write_json(tmp_path / "config.json", GEMMA_3_4B)
    shape = shape_of(str(tmp_path))
    assert shape.params == 3_880_263_168  # of the model that transformers builds
    assert (shape.dimensions.layers, shape.dimensions.hidden, shape.vocabulary) == (
        34,
        2560,
        262_208,
    )
    checkpoint.write_json(
        tmp_path / "config.json", GEMMA_3_4B | {"quantization_config": {"quant_method": "fp8"}}
    )
    with pytest.raises(InputError, match=r"has a quantization_config \(fp8\)"):
        shape_of(str(tmp_path))


def test_weights_in_mistrals_own_format_are_not_downloaded(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, **options: asked.update(options) or tmp_path
    )
    assert hub.locate("mistralai/Mistral-Small-3.1-24B-Base-2503", None) == tmp_path
    files = [
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00010.safetensors",
        "tekken.json",
    ]
    patterns = {
        "allow_patterns": asked["allow_patterns"],
        "ignore_patterns": asked["ignore_patterns"],
    }
    assert list(filter_repo_objects(files, **patterns)) == [files[0], *files[2:]]
