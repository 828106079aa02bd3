"""What can be wrong with a checkpoint's files, each found by name; and the format's reader and writer."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, save

from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.model import checkpoint, safetensors_io
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.model.hub import import_checkpoint
from ptl.preflight.preflight import check_model

LLAMA = FAMILIES["llama"]


@pytest.fixture
def single(tmp_path):
    return save(build("llama"), tmp_path / "single")


@pytest.fixture
def sharded(tmp_path):
    return save(build("llama"), tmp_path / "sharded", "8KB")


def change(folder, edit, file="model.safetensors"):
    """Rewrite a weight file with its tensors edited in place."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def change_index(folder, edit):
    index = json.loads((folder / checkpoint.INDEX).read_text())
    edit(index)
    (folder / checkpoint.INDEX).write_text(json.dumps(index))


def refused(folder, *said):
    with pytest.raises(InputError) as error:
        model_dimensions(folder, LLAMA)
    assert all(words in str(error.value) for words in said), str(error.value)
    assert str(error.value).startswith("model.path: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_a_file_is_read_as_the_safetensors_library_reads_it(tmp_path, dtype):
    tensors = {"a": torch.rand(3, 5).mul(9).to(dtype), "scalar": torch.tensor(7).to(dtype), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = {
        entry.name: safetensors_io.read_tensor(entry) for entry in safetensors_io.entries(tmp_path / "x.safetensors")
    }
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_a_written_file_is_read_by_the_safetensors_library(tmp_path):
    tensors = {"b": torch.rand(4, 3).t(), "a": torch.rand(5).bfloat16(), "s": torch.tensor(2.0)}
    specs = [("b", "F32", (3, 4)), ("a", "BF16", (5,)), ("s", "F32", ())]
    safetensors_io.write_tensors(tmp_path / "x.safetensors", specs, iter(tensors.values()))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_sizes_are_read_from_the_headers(single, sharded):
    model = build("llama")
    assert model_dimensions(single, LLAMA) == model_dimensions(sharded, LLAMA)
    body = model_dimensions(single, LLAMA)
    assert (body.params, body.layers, body.width) == (model.num_parameters(), 4, 40)
    assert body.params_per_neuron == 4 * 3 * 32
    assert body.params_per_layer == sum(p.numel() for p in model.model.layers[0].parameters())


def test_a_missing_tensor_is_named(single):
    change(single, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(single, "lacks tensor model.layers.2.mlp.up_proj.weight,", "model_type llama with 4 layers")


def test_an_untied_model_needs_its_output_projection(single):
    change(single, lambda tensors: tensors.pop("lm_head.weight"))
    refused(single, "lacks tensor lm_head.weight")


def test_an_extra_tensor_is_named(single):
    change(single, lambda tensors: tensors.update({"model.layers.0.mlp.router.weight": torch.zeros(2)}))
    refused(single, "has an unknown tensor model.layers.0.mlp.router.weight")


def test_layers_beyond_the_config_are_extra(single):
    config = checkpoint.read_config(single) | {"num_hidden_layers": 3}
    (single / "config.json").write_text(json.dumps(config))
    refused(single, "has an unknown tensor model.layers.3.", "and 8 more", "with 3 layers")


def test_biases_are_those_of_the_config(single):
    name = "model.layers.1.self_attn.q_proj.bias"
    change(single, lambda tensors: tensors.update({name: torch.zeros(32)}))
    refused(single, f"has an unknown tensor {name},")  # transformers would leave it out
    config = checkpoint.read_config(single) | {"attention_bias": True}
    (single / "config.json").write_text(json.dumps(config))
    refused(single, "lacks tensor model.layers.0.self_attn.k_proj.bias and 14 more")  # transformers would make them up


def test_old_rotary_buffers_are_let_through_and_not_counted(single):
    params = model_dimensions(single, LLAMA).params
    change(single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert model_dimensions(single, LLAMA).params == params


def test_a_width_that_differs_from_the_config_is_refused(single):
    def narrow(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 24)

    change(single, narrow)
    refused(single, "model.layers.1.mlp.down_proj.weight in", "[32, 24]", "intermediate_size=40")


def test_a_mix_of_dtypes_is_read(single):
    before = model_dimensions(single, LLAMA)
    change(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).half()}))
    assert model_dimensions(single, LLAMA) == before


def test_quantized_weights_are_refused(single):
    change(single, lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()}))
    refused(single, "is I8; one of F64, F32, F16, BF16 is needed", "load it with from_pretrained")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(sharded, name):
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(sharded, repr(name), "which is no file beside it")


def test_a_missing_shard_is_named(sharded):
    shard = checkpoint.shards(sharded)[2]
    shard.unlink()
    refused(sharded, f"names {shard.name!r}, which is no file beside it")


def test_an_index_that_is_wrong_about_a_tensor_is_refused(sharded):
    first, last = checkpoint.shards(sharded)[0].name, checkpoint.shards(sharded)[-1].name

    def move(index):
        held = next(name for name, file in index["weight_map"].items() if file == first)
        index["weight_map"][held] = last

    change_index(sharded, move)
    refused(sharded, f"says that {last} holds")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{}"])
def test_a_malformed_index_is_refused(sharded, text):
    (sharded / checkpoint.INDEX).write_text(text)
    refused(sharded, checkpoint.INDEX, "fetch the checkpoint again")


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, last = checkpoint.shards(sharded)[0], checkpoint.shards(sharded)[-1]
    change(sharded, lambda tensors: tensors.update(load_file(first)), last.name)
    refused(sharded, "is in two shards")


def cut_short(data):
    return data[:-100]


def too_long(data):
    return data + b"\0" * 8


def huge_header(data):
    return struct.pack("<Q", 2**40) + data[8:]


def no_json(data):
    return data[:8] + b"\xff" * 40 + data[48:]


def no_such_dtype(data):
    return data.replace(b'"F32"', b'"F31"', 1)


def overlapping(data):
    return data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)


@pytest.mark.parametrize(
    "damage", [cut_short, too_long, huge_header, no_json, no_such_dtype, overlapping, lambda _data: b""]
)
def test_a_damaged_shard_is_named(sharded, damage):
    shard = checkpoint.shards(sharded)[1]
    shard.write_bytes(damage(shard.read_bytes()))
    refused(sharded, f"shard {shard} is damaged", "fetch the checkpoint again")


def test_only_pickles_are_refused(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, "only pickled weights (pytorch_model.bin)", "save_pretrained")


def test_no_weights_at_all(single):
    (single / "model.safetensors").unlink()
    refused(single, "has no model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_malformed_config_is_refused(single, text):
    (single / "config.json").write_text(text)
    refused(single, "config.json", "fetch the checkpoint again")


def test_a_config_without_sizes_is_refused(single):
    config = checkpoint.read_config(single)
    del config["num_hidden_layers"]
    (single / "config.json").write_text(json.dumps(config))
    refused(single, "lacks tensor model.layers.10.input_layernorm.weight and 251 more")


def test_no_folder_and_no_config(tmp_path):
    refused(tmp_path / "none", "no folder")
    refused(tmp_path, "has no config.json")


def test_a_missing_tokenizer_is_refused(tmp_path):
    folder = save(build("llama"), tmp_path / "bare", tokenizer=False)
    with pytest.raises(InputError, match="has no tokenizer"):
        checkpoint.check_tokenizer(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(sharded, value):
    shard = checkpoint.shards(sharded)[3]
    name = next(iter(load_file(shard)))

    def spoil(tensors):
        tensors[name].view(-1)[-1] = value

    change(sharded, spoil, shard.name)
    with pytest.raises(InputError) as error:
        checkpoint.check_finite(checkpoint.shards(sharded))
    assert name in str(error.value) and shard.name in str(error.value)


def test_pickles_and_foreign_weights_are_not_copied(single, tmp_path):
    (single / "optimizer.bin").write_bytes(b"")
    (single / "other.safetensors").write_bytes(b"")
    (single / "notes.txt").write_text("kept")
    (tmp_path / "copy").mkdir()
    checkpoint.copy_companions(single, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"notes.txt", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not names & {"optimizer.bin", "other.safetensors", "model.safetensors", "config.json"}


# ---- links: what is copied is also published


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.mkdir()
    (path / "key").write_text("secret")
    return path


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "model.safetensors", "config.json"])
def test_a_link_that_leaves_the_folder_is_refused_and_not_copied(single, secret, tmp_path, name):
    outside = secret / name
    if (single / name).exists():
        (single / name).rename(outside)
    else:
        outside.write_text("secret")
    (single / name).symlink_to(outside)
    dst = tmp_path / "copy"
    with pytest.raises(InputError, match=rf"model.path: .*{name} is a link to .*secret/{name}, outside of that folder"):
        import_checkpoint(str(single), None, dst)
    assert not dst.exists()
    with pytest.raises(InputError, match="is a link to"):
        check_model(single, Schedule(target=0.3, recovery_tokens=10), Prune())
    dst.mkdir()
    with pytest.raises(InputError, match="is a link to"):
        checkpoint.copy_companions(single, dst)


@pytest.mark.parametrize("link", ["../secret/key", "chain", "templates/key"])
def test_links_in_every_disguise_are_refused(single, secret, link):
    """Relative, through another link, and a folder of files."""
    (single / "first").symlink_to("../secret/key")
    if link == "templates/key":
        (single / "first").unlink()
        (single / "templates").symlink_to(secret)
    elif link == "chain":
        (single / "chain").symlink_to("first")
    with pytest.raises(InputError, match="is a link to"):
        checkpoint.check_links(single)


def test_a_link_within_the_folder_is_copied_as_a_file(single, tmp_path):
    (single / "notes.txt").write_text("kept")
    (single / "more.txt").symlink_to("notes.txt")
    import_checkpoint(str(single), None, tmp_path / "copy")
    assert (tmp_path / "copy/more.txt").read_text() == "kept" and not (tmp_path / "copy/more.txt").is_symlink()


def hub_cache(single, tmp_path):
    """As huggingface_hub keeps it: files by hash in blobs, a snapshot of links."""
    repository = tmp_path / "hub/models--org--name"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(single.iterdir())):
        path.rename(repository / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_imported(single, tmp_path):
    names = {path.name for path in single.iterdir()}
    snapshot = hub_cache(single, tmp_path)
    import_checkpoint(str(snapshot), None, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    linked = tmp_path / "by-name"
    linked.symlink_to(snapshot)
    import_checkpoint(str(linked), None, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == names


@pytest.mark.parametrize("target", ["../../../../secret/key", "../../blobs/../../../secret/key", "/etc/passwd"])
def test_a_snapshot_that_leaves_the_cache_is_refused(single, secret, tmp_path, target):
    snapshot = hub_cache(single, tmp_path)
    (snapshot / "notes.txt").symlink_to(target)
    with pytest.raises(InputError, match=r"notes.txt is a link to"):
        import_checkpoint(str(snapshot), None, tmp_path / "copy")


def test_blobs_that_are_a_link_do_not_count(single, secret, tmp_path):
    snapshot = hub_cache(single, tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link to"):
        import_checkpoint(str(snapshot), None, tmp_path / "copy")
