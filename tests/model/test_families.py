"""Every family, cut right: the same statements on a tiny random model of each. A new family is a line in VARIANTS."""

import copy
import json

import pytest
import torch
from tiny_models import VARIANTS, batches, build, logits, save
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ptl.errors import InputError
from ptl.model import checkpoint
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES, family_of
from ptl.pruning.layerwise import LayerwiseModel
from ptl.pruning.surgery import Selection, prune_config, write_pruned

# Cutting changes how many terms each sum of down_proj has, and so the order of fp32 additions: logits of size ~10 may
# differ by a few units in the last place of an intermediate sum.
SUMMATION = {"rtol": 1e-4, "atol": 2e-4}
ALL = tuple(range(4))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def model(variant):
    return build(variant)


@pytest.fixture
def source(model, tmp_path):
    return save(model, tmp_path / "source")


def family_at(folder):
    return family_of(checkpoint.read_config(folder))


def random_neurons(width=24):
    return {i: torch.randperm(40, generator=torch.Generator().manual_seed(i))[:width].sort().values for i in ALL}


def masked(model, family, neurons):
    """The original model with the removed neurons' activations set to zero: the reference for a cut."""
    for i, kept in neurons.items():
        keep = torch.zeros(40)
        keep[kept] = 1
        down = model.get_decoder().layers[i].get_submodule(family.down_projection)
        down.register_forward_pre_hook(lambda _module, inputs, keep=keep: (inputs[0] * keep,))
    return model


def skipping(model, layers):
    """The original model with some layers passed over: the reference for a layer cut."""
    for i in set(ALL) - set(layers):
        model.get_decoder().layers[i].forward = lambda hidden, *_args, **_kwargs: hidden
    return model


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_neuron_cut_equals_the_masked_model(model, source, tmp_path):
    family, neurons = family_at(source), random_neurons()
    write_pruned(source, tmp_path / "cut", family, Selection(ALL, neurons))
    cut = load(tmp_path / "cut")
    reference = masked(model, family, neurons)
    for batch in batches():
        torch.testing.assert_close(logits(cut, batch), logits(reference, batch), **SUMMATION)
    assert cut.num_parameters() == model_dimensions(tmp_path / "cut", family).params < model.num_parameters()
    assert cut.config.intermediate_size == 24


@pytest.mark.parametrize("layers", [(0, 2, 3), (1, 2), (3,), (0, 3)])
def test_layer_cut_equals_the_model_that_skips_the_layers(model, source, tmp_path, layers):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(layers, {}))
    cut, reference = load(tmp_path / "cut"), skipping(model, layers)
    for batch in batches():
        assert torch.equal(logits(cut, batch), logits(reference, batch))
    assert [layer.self_attn.layer_idx for layer in cut.get_decoder().layers] == list(range(len(layers)))
    for field in ("layer_types", "no_rope_layers"):
        entries = getattr(model.config, field, None)
        if entries:
            assert getattr(cut.config, field) == [entries[i] for i in layers]


def test_neurons_and_layers_in_one_cut(model, source, tmp_path):
    family, layers = family_at(source), (0, 1, 3)
    neurons = {i: kept for i, kept in random_neurons().items() if i in layers}
    write_pruned(source, tmp_path / "cut", family, Selection(layers, neurons))
    reference = skipping(masked(model, family, neurons), layers)
    batch = batches()[0]
    torch.testing.assert_close(logits(load(tmp_path / "cut"), batch), logits(reference, batch), **SUMMATION)


def test_keeping_everything_changes_no_logit_and_no_tensor(model, source, tmp_path):
    everything = {i: torch.arange(40) for i in ALL}
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(ALL, everything))
    for batch in batches():
        assert torch.equal(logits(load(tmp_path / "cut"), batch), logits(model, batch))
    assert json.loads((tmp_path / "cut/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_generation_with_the_cache_equals_generation_without(source, tmp_path):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((1, 2, 3), random_neurons()))
    cut, prompt = load(tmp_path / "cut"), batches(((9, 9),))[0]["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, plain = (cut.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.shape == (2, 21) and torch.equal(cached, plain)


def test_saved_again_and_reloaded_it_is_the_same(source, tmp_path):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((0, 2, 3), random_neurons()))
    cut = load(tmp_path / "cut")
    cut.save_pretrained(tmp_path / "again")
    again, batch = load(tmp_path / "again"), batches()[0]
    assert torch.equal(logits(again, batch), logits(cut, batch))
    assert model_dimensions(tmp_path / "again", family_at(source)) == model_dimensions(
        tmp_path / "cut", family_at(source)
    )


def test_config_has_only_fields_that_the_family_has(source, tmp_path):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((1, 3), random_neurons()))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "cut"))
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {"intermediate_size", "num_hidden_layers", "layer_types", "no_rope_layers", "max_window_layers"}


def test_the_sources_config_stays_as_it_was():
    """transformers writes rope_theta into the scaling that it is given."""
    config = {"model_type": "qwen2", "num_hidden_layers": 4, "rope_theta": 1e6}
    config["rope_scaling"] = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    before = copy.deepcopy(config)
    pruned = prune_config(config, FAMILIES["qwen2"], Selection((0, 2, 3), {}))
    assert config == before and pruned["rope_scaling"] == before["rope_scaling"]


def test_companions_travel(source, tmp_path):
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(ALL, random_neurons()))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "cut")
    assert tokenizer.apply_chat_template([{"content": "w5 w6", "role": "user"}])["input_ids"] == [5, 6]
    assert load(tmp_path / "cut").generation_config.max_length == 40


def test_shards_and_bfloat16_are_cut_as_a_single_file_is(variant, tmp_path):
    model = build(variant).bfloat16()
    cut, family = Selection((0, 2, 3), random_neurons()), FAMILIES[VARIANTS[variant][0]]
    for name, size in (("single", "5GB"), ("sharded", "8KB")):
        write_pruned(save(model, tmp_path / name, size), tmp_path / f"{name}-cut", family, cut)
    assert len(checkpoint.shards(tmp_path / "sharded-cut")) > 3
    parts = [dict(checkpoint.tensors(path)) for path in checkpoint.shards(tmp_path / "sharded-cut")]
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    single = dict(checkpoint.tensors(tmp_path / "single-cut/model.safetensors"))
    assert joined.keys() == single.keys() and all(torch.equal(joined[name], single[name]) for name in single)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded-cut", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and loaded.num_parameters() == sum(t.numel() for t in single.values())


def test_a_stream_computes_what_the_whole_model_does(model, source):
    given = batches()
    given[0]["labels"][:, :4] = -100  # a prompt
    stream = LayerwiseModel(source, family_at(source), given)
    states = stream.embed()
    with torch.no_grad():
        for i in ALL:
            with stream.layer(i):
                states = [stream.run(i, b, hidden) for b, hidden in enumerate(states)]
        with stream.head():
            loss = sum(stream.loss(b, row, states[b][row : row + 1]) for b, row in ((0, 0), (0, 1), (0, 2)))
    batch = given[0]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1),
            batch["labels"][:, 1:].flatten(),
            reduction="sum",
        )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.device.type == "meta" for parameter in stream.causal_lm.parameters())


@pytest.mark.parametrize("layers", [(0, 1, 3), (2, 3), (1,)])
@pytest.mark.parametrize("variant", ["qwen2-sliding", "gemma2", "gemma3_text", "smollm3", "cwm"], indirect=True)
def test_lists_that_the_file_leaves_out_stay_with_their_layers(model, source, tmp_path, layers):
    config = json.loads((source / "config.json").read_text())
    fields = family_at(source).per_layer_fields
    (source / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - set(fields)}))
    whole = AutoConfig.from_pretrained(source)
    write_pruned(source, tmp_path / "cut", family_at(source), Selection(layers, {}))
    cut = AutoConfig.from_pretrained(tmp_path / "cut")
    for field in fields:
        assert getattr(cut, field) == [getattr(whole, field)[i] for i in layers]


def test_a_mistral_with_layer_types_is_read_as_ministral(tmp_path):
    """So does transformers: Ministral 8B has a file with model_type mistral."""
    source = save(build("ministral"), tmp_path / "source")
    text = (source / "config.json").read_text().replace('"model_type": "ministral"', '"model_type": "mistral"')
    (source / "config.json").write_text(text)
    write_pruned(source, tmp_path / "cut", family_at(source), Selection((0, 2, 3), {}))
    reference, batch = skipping(build("ministral"), (0, 2, 3)), batches()[0]
    assert torch.equal(logits(load(tmp_path / "cut"), batch), logits(reference, batch))


def test_internlm3_is_read_with_the_names_of_its_files_on_the_hub(tmp_path):
    source = save(build("internlm3"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"qkv_bias": config.pop("attention_bias"), "bias": config.pop("mlp_bias")}
    (source / "config.json").write_text(json.dumps(config))
    assert model_dimensions(source, family_at(source)).params == load(source).num_parameters()


def test_every_family_is_tested():
    dense = {name for name, family in FAMILIES.items() if not family.experts}  # the others: test_experts.py
    assert {model_type for model_type, _ in VARIANTS.values()} == dense


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported (supported: cohere2, cwm, deepseek_v3, "),
        ({"model_type": "gpt2"}, "one record in ptl/model/families.py and one of VARIANTS in tests/tiny_models.py"),
        ({}, "model_type 'None' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 128}, "'ernie4_5_moe' is not supported"),
        ({"model_type": "gemma3n", "vision_config": {"a": 1}}, "'gemma3n' is not supported"),
        ({"model_type": "qwen3_5_text"}, "'qwen3_5_text' is not supported"),
        ({"model_type": "gemma3", "vision_config": {"a": 1}}, "run `ptl import-model`, which saves its text model"),
    ],
)
def test_other_architectures_are_refused(config, said):
    with pytest.raises(InputError) as refused:
        family_of(config)
    assert said in str(refused.value)
