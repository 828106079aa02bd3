"""A config.json that does not fit its weights, or that transformers would stumble over, is named from the headers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, build, save
from transformers import AutoConfig
from typer.testing import CliRunner

from ptl.cli.app import app
from ptl.config.run import load_config
from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.evaluation.evaluate import evaluate_checkpoint
from ptl.model import checkpoint, dimensions, pretrained, shapes
from ptl.model.checkpoint import check_generation_config
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.model.hub import import_checkpoint
from ptl.model.pretrained import load_tokenizer
from ptl.preflight.forecast_model import shape_of
from ptl.preflight.preflight import check_model

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"
UNREADABLE = "transformers cannot read config.json in "
FULL = ["full_attention"] * 4
YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each variant, made when it is first asked for."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = save(build(variant), tmp_path_factory.mktemp(variant) / "model")
        return made[variant]

    return get


def changed(folder, tmp_path, **changes):
    """A folder with the weights of another and a changed config.json; a field that becomes `...` is left out."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, copy / path.name)
    config = json.loads((folder / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return copy


def refusal(folder, variant):
    with pytest.raises(InputError) as error:
        model_dimensions(folder, FAMILIES[VARIANTS[variant][0]])
    assert str(error.value).startswith("model.path: ")
    return str(error.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_real_model(folders, variant):
    model, config = build(variant), checkpoint.read_config(folders(variant))
    counted = shapes.of_config(config, FAMILIES[VARIANTS[variant][0]], "config.json")
    assert counted.params == model.num_parameters() == model_dimensions(folders(variant), counted.family).params
    assert counted.matrix_params == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("num_attention_heads", 2),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 16),
        ("vocab_size", 47),
        ("intermediate_size", 48),
    ],
)
def test_a_size_that_differs_from_the_weights_is_named(folders, tmp_path, variant, field, value):
    said = refusal(changed(folders(variant), tmp_path, **{field: value}), variant)
    assert f"{field}={value}" in said and "has shape" in said


def test_head_sizes_that_are_left_out_follow_from_the_others(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path, head_dim=...)
    assert model_dimensions(folder, FAMILIES["llama"]).layers == 4
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 8')
    )
    assert "has shape [16, 32], and config.json gives it [8, 32]" in refusal(folder, "llama")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        *(("num_attention_heads", value, UNREADABLE) for value in (0, -4, True, 4.0, "4", 5)),
        *(("hidden_size", value, UNREADABLE) for value in (10**30, [32])),
        *(("head_dim", 7, UNREADABLE), ("dtype", "float8", UNREADABLE), ("dtype", ["float32"], UNREADABLE)),
        ("num_key_value_heads", 3, "self_attn.k_proj.weight"),
        *(("num_hidden_layers", value, "whole number from 1 to 10,000") for value in (1_000_000_000, 0, "4")),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "has a quantization_config (gptq)"),
    ],
)
def test_a_field_that_cannot_be_is_named(folders, tmp_path, field, value, reason):
    said = refusal(changed(folders("llama"), tmp_path, **{field: value}), "llama")
    assert reason in said
    assert field in said or reason == UNREADABLE


@pytest.mark.parametrize(
    ("variant", "field", "value"),
    [
        *((variant, "hidden_act", None) for variant in ("llama", "qwen2", "qwen3", "phi3")),
        *((variant, "rms_norm_eps", None) for variant in ("llama", "qwen2", "gemma2")),
        *((variant, "max_window_layers", value) for variant in ("qwen2", "qwen3") for value in (None, "x")),
        *(("qwen3", "layer_types", types) for types in (FULL[:3], [*FULL[:3], "spiral"], "full_attention", [1] * 4)),
        ("qwen2", "head_dim", None),
        ("gemma2", "hidden_activation", "gelo"),
        ("llama", "hidden_act", "swigloo"),
        ("llama", "hidden_act", ["silu"]),
        ("llama", "max_position_embeddings", 64.5),
        ("llama", "use_cache", 1),
        ("llama", "initializer_range", "x"),
        ("llama", "rms_norm_eps", "small"),
        ("llama", "rope_parameters", {"rope_type": "spiral"}),
        ("llama", "rope_parameters", {"rope_type": ["yarn"]}),
        ("llama", "rope_parameters", {"rope_type": "yarn"}),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": "4"}),
        ("llama", "rope_scaling", "yarn"),
        ("llama", "rope_scaling", {"type": "spiral"}),
        ("llama", "pad_token_id", 48),
        ("llama", "pad_token_id", "0"),
    ],
)
def test_a_config_of_which_transformers_builds_no_model_is_named_as_such(folders, tmp_path, variant, field, value):
    """By validate and by the first step, and never as a tokenizer that cannot be read."""
    folder = changed(folders(variant), tmp_path, **{field: value})
    schedule = Schedule(target=0.3, recovery_tokens=100)
    ways = [
        lambda: check_model(folder, schedule, Prune()),
        lambda: import_checkpoint(str(folder), None, tmp_path / "imported"),
        lambda: pretrained.causal_lm(folder),
    ]
    for way in ways:
        with pytest.raises(InputError, match=r"model\.path: transformers cannot read config\.json in .*changed"):
            way()
    try:
        load_tokenizer(folder)  # a config may be sound so far
    except InputError as error:
        assert "transformers cannot read config.json" in str(error)


def test_what_transformers_knows_is_let_through(folders, tmp_path):
    changes = {"rope_parameters": YARN | {"rope_theta": 1e4}, "hidden_act": "swish", "quantization_config": None}
    assert model_dimensions(changed(folders("llama"), tmp_path, **changes), FAMILIES["llama"]).layers == 4


def test_embeddings_are_tied_by_default_as_in_transformers():
    for family in FAMILIES.values():
        default = AutoConfig.for_model(family.model_type)
        assert default.tie_word_embeddings == family.tied


def test_validate_finds_it_before_any_work(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path, num_attention_heads=8)
    schedule = Schedule(target=0.3, recovery_tokens=100)
    assert check_model(folders("llama"), schedule, Prune()).params == build("llama").num_parameters()
    with pytest.raises(InputError, match="num_attention_heads=8"):
        check_model(folder, schedule, Prune())


def test_a_left_over_adapter_is_named(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    assert "has adapter_config.json" in refusal(folder, "llama")


# ---- an output layer that is the embeddings, and stored all the same


def with_output_layer(folder, tmp_path, change=0.0):
    copy = changed(folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    output = tensors["model.embed_tokens.weight"].clone()
    output[-1, -1] += change
    (copy / "model.safetensors").unlink()
    save_file(tensors | {"lm_head.weight": output}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("variant", ["llama-tied", "gemma2"])
def test_a_tied_output_layer_that_is_stored_too_counts_once(folders, tmp_path, variant):
    folder = with_output_layer(folders(variant), tmp_path)
    params = build(variant).num_parameters()
    assert (
        model_dimensions(folder, FAMILIES[VARIANTS[variant][0]]).params
        == dimensions.static_cost(folder).params
        == params
    )


def test_a_tied_output_layer_with_other_values_is_named(folders, tmp_path):
    folder = with_output_layer(folders("llama-tied"), tmp_path, 0.5)
    assert "differs from the embeddings" in refusal(folder, "llama-tied")


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("named", [None, ...])
def test_without_a_dtype_in_the_config_the_weights_have_it(tmp_path, dtype, size, named):
    folder = changed(save(build("llama").to(dtype), tmp_path / "stored"), tmp_path, dtype=named)
    assert (
        dimensions.static_cost(folder).kv_bytes_per_token == 2 * 4 * 2 * 8 * size
    )  # keys and values, layers, KV heads, head_dim
    assert (shape_of(str(folder)).kv_bytes, shape_of(str(folder)).itemsize) == (2 * 4 * 2 * 8 * size, size)


def test_of_a_model_without_dtype_and_weights_sixteen_bits_are_assumed(folders, tmp_path):
    config = checkpoint.read_config(folders("llama")) | {"dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)).itemsize == 2


# ---- JSON that is nested too deeply


@pytest.mark.parametrize("levels", [65, 900, 200_000])
def test_deep_json_is_a_value_error(levels):
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        checkpoint.bounded_json("[" * levels + "]" * levels)
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        checkpoint.bounded_json('{"a":' * levels + "1" + "}" * levels)


def test_ordinary_json_is_read():
    text = "[" * 64 + "1" + "]" * 64
    assert checkpoint.bounded_json(text) == json.loads(text)
    with pytest.raises(ValueError):
        checkpoint.bounded_json("[1")


DEEP = "[" * 100_000 + "]" * 100_000


def test_deep_json_in_a_checkpoint_names_the_file(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path)
    (folder / checkpoint.INDEX).write_text(DEEP)
    assert f"{checkpoint.INDEX} is not valid JSON (nested deeper" in refusal(folder, "llama")
    (folder / checkpoint.INDEX).unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    assert "model.safetensors is damaged (" in refusal(folder, "llama")
    (folder / "config.json").write_text(DEEP)
    assert "config.json is not valid JSON (nested deeper" in refusal(folder, "llama")


@pytest.mark.parametrize("shape", [[2.0, 4], [-2, -4], [True, 8], ["8"], 8])
def test_sizes_of_a_tensor_that_are_no_whole_numbers_are_refused(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 32]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(InputError, match="is damaged"):
        list(checkpoint.tensors(path))


@pytest.mark.parametrize("command", ["prune", "recover", "evaluate"])
def test_an_unsupported_family_is_refused_before_the_work(folders, tmp_path, monkeypatch, command):
    """Evaluation used to find it after its benchmark, recovery after its training."""
    folder = changed(folders("llama"), tmp_path, model_type="gpt2")
    for module in (
        "ptl.evaluation.language_models.language_model",
        "ptl.recovery.recover.recover_checkpoint",
        "ptl.pruning.prune.prune_checkpoint",
    ):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("it began to work"))
    found = CliRunner().invoke(app, [command, str(folder), str(tmp_path / "out"), "--config", str(TINY)])
    assert isinstance(found.exception, InputError), found.output
    assert "'gpt2' is not supported" in str(found.exception)
    with pytest.raises(InputError, match="'gpt2' is not supported"):
        evaluate_checkpoint(folder, tmp_path / "out", load_config(TINY).evaluate, seed=0)


@pytest.mark.parametrize("text", ["{", "[]", DEEP], ids=["half", "a-list", "deep"])
def test_a_generation_config_that_cannot_be_read_is_named(folders, tmp_path, text):
    folder = changed(folders("llama"), tmp_path)
    check_generation_config(folder)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"model.path: .*generation_config.json (is not valid JSON|must hold a JSON)"):
        check_generation_config(folder)


def test_import_by_hand_checks_what_the_pipeline_checks(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path, num_attention_heads=8)
    with pytest.raises(InputError, match="num_attention_heads=8"):
        import_checkpoint(str(folder), None, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_without_torch_validate_says_what_it_did_not_check():
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); from ptl.cli.app import app;"
        f"app(['validate', {str(TINY)!r}])"
    )
    root = TINY.parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert "not checked: the model and what it can do of the config (without transformers or torch)" in done.stderr
