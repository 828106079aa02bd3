"""What can be wrong with a checkpoint's files, each found by name; and the format's reader and writer."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, change_config, save

from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.model import checkpoint, safetensors_io
from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES
from ptl.model.hub import import_checkpoint
from ptl.preflight.preflight import check_model
from ptl.storage.manifest import digest_of, scan
from ptl.storage.store import publish

LLAMA = FAMILIES["llama"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def single(tmp_path):
    return save(build("llama"), tmp_path / "single")


@pytest.fixture
def sharded(tmp_path):
    return save(build("llama"), tmp_path / "sharded", "8KB")


def change(folder, file="model.safetensors", **changed):
    """Rewrite a weight file with tensors changed or added; one that becomes `...` is left out."""
    tensors = load_file(folder / file) | changed
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not ...}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def change_index(folder, name, file):
    index = json.loads((folder / checkpoint.INDEX).read_text())
    index["weight_map"][name] = file
    (folder / checkpoint.INDEX).write_text(json.dumps(index))


def refused(folder, *parts):
    with pytest.raises(InputError) as error:
        model_dimensions(folder, LLAMA)
    assert error.value.field == "model.path"
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_file_is_read_and_written_as_the_safetensors_library_does(tmp_path):
    tensors = {
        "b": torch.rand(4, 3).t(),
        "a": torch.rand(5).bfloat16(),
        "scalar": torch.tensor(2.0),
    }
    tensors |= {
        "whole": torch.tensor([7]),
        "truth": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }
    specs = [("b", "F32", (3, 4)), ("a", "BF16", (5,)), ("scalar", "F32", ())]
    specs += [("whole", "I64", (1,)), ("truth", "BOOL", (2,)), ("none", "F32", (0, 4))]
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    safetensors_io.write_tensors(ours, specs, iter(tensors.values()))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs)
    for read in (load_file(ours), dict(checkpoint.tensors(theirs))):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name
    assert struct.unpack("<Q", ours.read_bytes()[:8])[0] % 8 == 0  # tensors are aligned


def test_a_damaged_shard_is_named(sharded):
    shard = checkpoint.shards(sharded)[1]
    data = shard.read_bytes()
    for damaged in (
        data[:-100],  # truncated
        struct.pack("<Q", 2**40) + data[8:],  # a huge header
        data[:8] + b"\xff" * 40 + data[48:],  # no JSON
        data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
        b"",
    ):
        shard.write_bytes(damaged)
        refused(sharded, f"shard {shard} is damaged")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("lm_head.weight", ..., "lacks tensor lm_head.weight, for model_type llama with 4 layers"),
        ("model.norm.weight", torch.zeros(24), "model.norm.weight in "),
        ("model.norm.weight", torch.ones(32).to(torch.int8), "is I8; one of F64, F32, F16"),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_or_no_float_is_named(single, name, tensor, message):
    change(single, **{name: tensor})
    refused(single, message)


def test_old_buffers_change_no_size_and_layers_and_biases_are_those_of_the_config(single):
    before = model_dimensions(single, LLAMA)
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.norm.weight": torch.ones(32).half(),
    }
    change(single, **more)
    assert model_dimensions(single, LLAMA) == before
    change_config(single, num_hidden_layers=3)
    refused(single, "has an unknown tensor model.layers.3.", "and 8 more", "with 3 layers")
    change_config(single, num_hidden_layers=...)
    refused(single, "lacks tensor model.layers.10.input_layernorm.weight and 251 more")
    change_config(single, num_hidden_layers=4, attention_bias=True)
    # transformers would make them up
    refused(single, "lacks tensor model.layers.0.self_attn.k_proj.bias and 15 more")


def test_weights_that_are_no_numbers_are_refused(single):
    for value in (torch.nan, torch.inf):
        change(single, **{"model.norm.weight": torch.tensor([*[1.0] * 31, value])})
        with pytest.raises(
            InputError,
            match=r"tensor model.norm.weight in .*model.safetensors holds NaN or infinite",
        ):
            checkpoint.check_finite(checkpoint.shards(single))


def test_an_index_that_leaves_the_folder_is_refused(sharded):
    (sharded.parent / "evil.safetensors").touch()
    for name in ("../evil.safetensors", str(sharded.parent / "evil.safetensors")):
        change_index(sharded, "model.norm.weight", name)
        refused(sharded, repr(name), "which is no file beside it")


def test_shards_that_do_not_fit_the_index_are_named(single, sharded):
    assert model_dimensions(sharded, LLAMA) == model_dimensions(single, LLAMA)
    _, second, *_, last = checkpoint.shards(sharded)
    moved = load_file(second)
    name, _ = moved  # with the other one the file stays in the index
    change_index(sharded, name, last.name)
    refused(sharded, f"says that {last.name} holds")
    change_index(sharded, name, second.name)
    change(sharded, last.name, **moved)
    refused(sharded, "is in two shards")
    second.unlink()
    refused(sharded, f"names {second.name!r}, which is no file beside it")
    for text in ("[]", '{"weight_map": 3}'):
        (sharded / checkpoint.INDEX).write_text(text)
        refused(sharded, checkpoint.INDEX)


def test_a_folder_without_config_or_weights_or_with_an_adapter_is_refused(single, tmp_path):
    refused(tmp_path / "none", "no folder")
    refused(tmp_path, "has no config.json")
    (single / checkpoint.ADAPTER).write_text("{}")
    refused(single, "has adapter_config.json")
    (single / checkpoint.ADAPTER).unlink()
    (single / "model.safetensors").unlink()
    refused(single, "has no model.safetensors")


def test_pickles_foreign_weights_and_what_mlflow_reads_are_not_copied(single, tmp_path):
    files = (
        "optimizer.bin",
        "other.safetensors",
        "model.gguf",
        checkpoint.MISTRAL_CONFIG,
        "ptl-files.json",
        "registered_model_meta",
    )
    for name in (*files, "notes.txt"):
        (single / name).write_text("{}")
    checkpoint.write_mlflow_model(single)
    (tmp_path / "copy").mkdir()
    checkpoint.copy_companions(single, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"notes.txt", "generation_config.json", "chat_template.jinja", *TOKENIZER}


def test_equal_checkpoints_are_equal_as_mlflow_models(single, tmp_path):
    """Though a step takes over the files of an earlier run, of which MLflow has loaded a version."""
    before, digests = set(scan(single)), set()
    for name in ("one", "two"):
        checkpoint.write_mlflow_model(single)
        (single / "registered_model_meta").write_text(f"model_name: {name}\n")
        digests.add(digest_of(publish(single, f"{tmp_path}/published/{name}")))
    assert len(digests) == 1
    tokenizer = ("chat_template.jinja", "config.json", "generation_config.json", *TOKENIZER)
    assert set(scan(single)) - before == {
        "MLmodel",
        *(f"components/tokenizer/{name}" for name in tokenizer),
    }


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


@pytest.mark.parametrize(
    ("link", "target", "cached"),
    [
        ("notes.txt", "/etc/passwd", False),
        ("model.safetensors", "../secret/key", False),
        ("templates", "../secret", False),
        ("notes.txt", "../../../../secret/key", True),
        ("notes.txt", "../../blobs/../../../secret/key", True),
    ],
)
def test_a_link_that_leaves_the_folder_is_refused_and_not_copied(
    single, tmp_path, link, target, cached
):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret")
    source, copy = hub_cache(single, tmp_path) if cached else single, tmp_path / "copy"
    (source / link).unlink(missing_ok=True)
    (source / link).symlink_to(target)
    for check in (
        lambda: import_checkpoint(str(source), None, copy),
        lambda: check_model(source, Schedule(target=0.3, recovery_tokens=10), Prune()),
        lambda: checkpoint.copy_companions(source, copy),
    ):
        with pytest.raises(
            InputError, match=rf"model.path: .*{link} is a link to .*, outside of that folder"
        ):
            check()
    assert not copy.exists()


def test_links_within_a_folder_or_the_hubs_cache_are_copied_as_files(single, tmp_path):
    (single / "more.txt").symlink_to("generation_config.json")
    names = {path.name for path in single.iterdir()}
    import_checkpoint(str(single), None, tmp_path / "copy")
    (single / "more.txt").unlink()
    (single / "more.txt").write_text("a file")
    linked = tmp_path / "by-name"
    linked.symlink_to(hub_cache(single, tmp_path))
    import_checkpoint(str(linked), None, tmp_path / "again")
    for copy in (tmp_path / "copy", tmp_path / "again"):
        assert {path.name for path in copy.iterdir()} == names
        assert not any(path.is_symlink() for path in copy.iterdir())
