"""Sizes and costs are read from config.json and headers; a config that does not fit its weights is named from them."""

import shutil

import pytest
import torch
from checkout import TINY
from safetensors.torch import load_file, save_file
from tiny_models import DAILY, VARIANTS, build, change_config, nightly_but, save
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from ptl.cli.app import app
from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.model import checkpoint, dimensions, pretrained, shapes
from ptl.model.dimensions import dimensions_of, model_dimensions
from ptl.model.families import FAMILIES
from ptl.model.hub import import_checkpoint
from ptl.model.pretrained import load_tokenizer
from ptl.preflight.forecast_model import shape_of
from ptl.preflight.preflight import check_model

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = Schedule(target=0.3, recovery_tokens=100)
UNREADABLE = "transformers cannot read config.json in "
WRONG_SIZES = [
    ("hidden_size", 64),
    ("num_attention_heads", 2),
    ("num_attention_heads", 8),
    ("vocab_size", 47),
]
WRONG_SIZES += [("num_key_value_heads", 4), ("head_dim", 16), ("intermediate_size", 48)]


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
    """A folder with the weights of another and a changed config.json."""
    return change_config(
        shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True), **changes
    )


def refusal(folder, variant):
    with pytest.raises(InputError) as error:
        model_dimensions(folder, FAMILIES[VARIANTS[variant][0]])
    assert error.value.field == "model.path"
    return str(error.value)


@pytest.mark.parametrize("variant", nightly_but(*DAILY, of=VARIANTS))
def test_sizes_and_costs_are_those_of_the_real_model(folders, variant):
    """By config.json alone as by the weights."""
    model, folder = build(variant), folders(variant)
    counted = shapes.of_config(
        checkpoint.read_config(folder), FAMILIES[VARIANTS[variant][0]], "config.json"
    )
    body, static = model_dimensions(folder, counted.family), dimensions.static_cost(folder)
    assert body == dimensions_of(counted) and body.params == model.num_parameters()
    assert (body.layers, body.width) == (4, 40)
    assert body.params_per_layer == sum(
        p.numel() for p in model.get_decoder().layers[0].parameters()
    )
    assert counted.matrix_params == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)
    )
    assert (static.active_params, static.widths, static.experts) == (static.params, [40] * 4, 0)
    model.set_attn_implementation("eager")
    for length in (1, 7):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
        assert counter.get_total_flops() == length * (
            static.flops_per_token + 2 * length * counted.attention_width
        )


@pytest.mark.parametrize(
    ("dtype", "size", "named"), [(torch.bfloat16, 2, None), (torch.float32, 4, ...)]
)
def test_without_a_dtype_in_the_config_the_weights_have_it(tmp_path, dtype, size, named):
    folder = changed(save(build("llama").to(dtype), tmp_path / "stored"), tmp_path, dtype=named)
    kv_bytes = 2 * 4 * 2 * 8 * size  # keys and values, layers, KV heads, head_dim
    assert dimensions.static_cost(folder).kv_bytes_per_token == kv_bytes
    assert (shape_of(str(folder)).kv_bytes, shape_of(str(folder)).itemsize) == (kv_bytes, size)
    (folder / "model.safetensors").unlink()
    # of a model without dtype and weights sixteen bits are assumed
    assert shape_of(str(folder)).itemsize == 2


# ---- a config.json that is wrong


# With longrope transformers itself refuses Phi-3's sizes, by the number of factors.
CHECKED_BY_SHAPE = [variant for variant in VARIANTS if "longrope" not in variant]


@pytest.mark.parametrize("variant", nightly_but(*DAILY, of=CHECKED_BY_SHAPE))
def test_a_size_that_differs_from_the_weights_is_named(folders, tmp_path, variant):
    """Two of the sizes in each variant, each size in several."""
    number = [*VARIANTS].index(variant)
    for field, value in (WRONG_SIZES[number % 7], WRONG_SIZES[(number + 3) % 7]):
        folder = changed(folders(variant), tmp_path / field, **{field: value})
        message = refusal(folder, variant)
        assert f"{field}={value}" in message and "has shape" in message


def test_head_sizes_that_are_left_out_follow_from_the_others(folders, tmp_path):
    folder = changed(folders("llama"), tmp_path, head_dim=...)
    assert model_dimensions(folder, FAMILIES["llama"]).layers == 4
    change_config(folder, num_attention_heads=8)
    assert "has shape [16, 32], and config.json gives it [8, 32]" in refusal(folder, "llama")


def test_a_field_that_cannot_be_is_named_before_any_work(folders, tmp_path):
    """By validate and by the first step, and never as a tokenizer that cannot be read."""
    for variant, field, value, reason in (
        ("llama", "num_key_value_heads", 3, "self_attn.k_proj.weight"),
        (
            "llama",
            "intermediate_size",
            0,
            "intermediate_size=0, which must be a whole number of 1 or more",
        ),
        *(
            ("llama", "num_hidden_layers", value, "whole number from 1 to 10,000")
            for value in (10_001, 0, "4")
        ),
        (
            "llama",
            "quantization_config",
            {"quant_method": "gptq", "bits": 4},
            "has a quantization_config (gptq)",
        ),
        # Of these transformers builds no model.
        *(("llama", "num_attention_heads", value, UNREADABLE) for value in (0, "4", 5)),
        *(("llama", "hidden_size", value, UNREADABLE) for value in (10**30, [32])),
        ("llama", "dtype", "float8", UNREADABLE),
        ("llama", "hidden_act", ["silu"], UNREADABLE),
        ("llama", "rope_parameters", {"rope_type": "yarn"}, UNREADABLE),
        ("llama", "pad_token_id", 48, UNREADABLE),
        ("qwen3", "layer_types", ["full_attention"] * 3, UNREADABLE),
        ("gemma2", "rms_norm_eps", None, UNREADABLE),
    ):
        folder = changed(folders(variant), tmp_path, **{field: value})
        message = refusal(folder, variant)
        assert reason in message and (field in message or reason == UNREADABLE)
        imports = (import_checkpoint, str(folder), None, tmp_path / "imported")
        for check, *given in ((check_model, folder, SCHEDULE, Prune()), imports):
            with pytest.raises(InputError) as error:
                check(*given)
            assert reason in str(error.value) and error.value.field == "model.path"
        assert not (tmp_path / "imported").exists()
        if reason == UNREADABLE:
            with pytest.raises(
                InputError, match=r"model\.path: transformers cannot read config\.json in .*changed"
            ):
                pretrained.causal_lm(folder)
            try:
                load_tokenizer(folder)  # a config may be sound so far
            except InputError as error:
                assert UNREADABLE in str(error)


@pytest.mark.parametrize("command", ["prune", "recover", "evaluate"])
def test_an_unsupported_family_is_refused_before_the_work(folders, tmp_path, monkeypatch, command):
    """Evaluation used to find it after its benchmark, recovery after its training."""
    folder = changed(folders("llama"), tmp_path, model_type="gpt2")
    works = ("evaluation.language_models.language_model", "recovery.recover.recover_checkpoint")
    for work in (*works, "pruning.prune.prune_checkpoint"):
        monkeypatch.setattr(f"ptl.{work}", lambda *_, **__: pytest.fail("it began to work"))
    result = CliRunner().invoke(
        app, [command, str(folder), str(tmp_path / "out"), "--config", str(TINY)]
    )
    assert isinstance(result.exception, InputError) and "'gpt2' is not supported" in str(
        result.exception
    )


def test_without_torch_validate_says_what_it_did_not_check(monkeypatch):
    monkeypatch.setattr(pretrained, "can_build", lambda: False)
    result = CliRunner().invoke(app, ["validate", str(TINY)])
    assert result.exit_code == 0 and "not checked: the model" in result.stderr


@pytest.mark.parametrize("variant", ["llama-tied", "gemma2"])
def test_a_tied_output_layer_that_is_stored_too_counts_once(folders, tmp_path, variant):
    folder = changed(folders(variant), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    output = tensors["model.embed_tokens.weight"].clone()
    save_file(
        tensors | {"lm_head.weight": output},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    counted = model_dimensions(folder, FAMILIES[VARIANTS[variant][0]]).params
    assert counted == dimensions.static_cost(folder).params == build(variant).num_parameters()
    output[-1, -1] += 0.5
    save_file(
        tensors | {"lm_head.weight": output},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "differs from the embeddings" in refusal(folder, variant)


def test_json_that_is_nested_too_deeply_names_the_file(folders, tmp_path):
    """Python's reader may end the process."""
    deep, folder = "[" * 100_000 + "]" * 100_000, changed(folders("llama"), tmp_path)
    (folder / checkpoint.INDEX).write_text(deep)
    assert f"{checkpoint.INDEX} is not valid JSON (maximum recursion depth" in refusal(
        folder, "llama"
    )
    (folder / checkpoint.INDEX).unlink()
    (folder / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
    assert "model.safetensors is damaged (" in refusal(folder, "llama")
    for text in (deep, '{"a":' * 100_000 + "1" + "}" * 100_000, "{", "[]"):
        (folder / "config.json").write_text(text)
        assert "config.json" in refusal(folder, "llama")
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(
            InputError,
            match=r"model.path: .*generation_config.json (is not valid|must hold a) JSON",
        ):
            checkpoint.generation_config(folder)
    assert checkpoint.generation_config(folders("llama"))["eos_token_id"] == 2
