"""A Hugging Face checkpoint as files: safetensors shards, config.json and the files that must travel with them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ptl.errors import InputError
from ptl.model import safetensors_io
from ptl.model.safetensors_io import Entries, Entry, NewTensor

if TYPE_CHECKING:
    import torch

# Names of tensors in all families
EMBEDDINGS = "model.embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"
# Names that transformers looks for in a folder
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Optimizer state between two recoveries. In the form of safetensors under another name: vLLM loads all that end so
STATE = "recovery_state.moments"
# what write_mlflow_model writes, and MLflow itself
MLFLOW_FILES = ("MLmodel", "registered_model_meta")
MISTRAL_CONFIG = "params.json"  # beside config.json in Mistral's repositories; vLLM may prefer it
ADAPTER = "adapter_config.json"  # of PEFT
# Where mlflow.transformers.model_io looks for the tokenizer, beside the weights' own folder
MLFLOW_TOKENIZER = Path("components", "tokenizer")
# transformers' folder for templates beside the default one
CHAT_TEMPLATES = "additional_chat_templates"
# Suffixes of files that can run code when they are read
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
OTHER_WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
# A checkpoint with any of these files has a tokenizer
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def checkpoint_error(problem: str, remedy: str = "fetch the checkpoint again") -> InputError:
    """An error in the files that the setting model.path names."""
    return InputError(problem, field="model.path", remedy=remedy)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises InputError when it is missing or not a JSON object."""
    path = folder / "config.json"
    # A wrong path and a folder without a checkpoint are different mistakes.
    if not folder.is_dir():
        raise checkpoint_error(f"no folder {folder}", "give a checkpoint folder or a hub id")
    if not path.is_file():
        raise checkpoint_error(
            f"{folder} has no config.json", "give the folder of a Hugging Face checkpoint"
        )
    return json_object(path)


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint; empty without one. Raises InputError when it is not a JSON object."""
    path = folder / "generation_config.json"
    return json_object(path) if path.is_file() else {}


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises InputError when it holds no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise checkpoint_error(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise checkpoint_error(f"{path} must hold a JSON object")
    return content


def shards(folder: Path) -> list[Path]:
    """The weight files, in order. Raises InputError for pickles, missing shards and paths that leave the folder."""
    index, weights = folder / INDEX, folder / WEIGHTS
    if index.is_file():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            # A name with a folder in it could point to any file on the machine.
            if Path(name).name != name or not (folder / name).is_file():
                raise checkpoint_error(f"{index} names {name!r}, which is no file beside it")
        return [folder / name for name in names]
    if weights.is_file():
        return [weights]
    pickle = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES), None)
    if pickle:
        raise checkpoint_error(
            f"{folder} has only pickled weights ({pickle}), which can run code when read",
            "convert it: load it once with transformers and save_pretrained it",
        )
    raise checkpoint_error(
        f"{folder} has no {WEIGHTS}", "give the folder of a safetensors checkpoint"
    )


def contents(folder: Path) -> dict[str, Entry]:
    """Every tensor of the weights by name, from the shards' headers alone. Raises InputError that names a bad shard."""
    entries: dict[str, Entry] = {}
    for path in shards(folder):
        for entry in safetensors_io.entries(path):
            if entry.name in entries:
                raise checkpoint_error(f"tensor {entry.name} is in two shards, {path} among them")
            entries[entry.name] = entry
    # transformers trusts the index: it would initialise a tensor that is not in the shard named there.
    for name, file in _weight_map(folder).items():
        if name not in entries or entries[name].path.name != file:
            raise checkpoint_error(
                f"{folder / INDEX} says that {file} holds {name}, but it does not"
            )
    return entries


def itemsize(folder: Path) -> int:
    """Bytes of a number in the model as transformers loads it: in the config's dtype, else in that of the weights."""
    import torch

    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        return int(getattr(torch, dtype).itemsize)
    # Of a hub id perhaps only config.json has been downloaded.
    entries = contents(folder) if any(folder.glob("*.safetensors")) else {}
    dtypes = safetensors_io.dtypes()
    sizes = [dtypes[entry.dtype].itemsize for entry in entries.values()]
    return max(sizes, default=torch.bfloat16.itemsize)


def check_tied(entries: Entries) -> None:
    """Raise InputError where a tied output layer is stored with other values: transformers would then not tie it."""
    output = entries.get(OUTPUT_LAYER)
    if output is not None and not safetensors_io.are_equal(output, entries[EMBEDDINGS]):
        raise checkpoint_error(
            f"{output.path} holds an output layer ({OUTPUT_LAYER}) that differs from the embeddings, but config.json "
            "ties them",
            "set tie_word_embeddings to false there, or remove that tensor",
        )


def check_no_adapter(folder: Path) -> None:
    """Raise InputError where an adapter is left in the folder: transformers would load it on top of the weights."""
    if (folder / ADAPTER).is_file():
        raise checkpoint_error(
            f"{folder} has {ADAPTER}, with which transformers loads an adapter, or the adapter's own base model, in "
            "place of these weights",
            "merge the adapter and save the model, or remove its files",
        )


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one after the other, so that only one is in memory."""
    for entry in safetensors_io.entries(path):
        yield entry.name, safetensors_io.read_tensor(entry)


def write_shard(path: Path, named: dict[str, torch.Tensor]) -> None:
    """Save one shard in the form that transformers reads."""
    from safetensors.torch import save_file

    save_file(named, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, which another UID cannot read


def rewrite(src: Path, dst: Path, changed: Callable[[Entry], NewTensor | None]) -> None:
    """Write the weights of `src` anew, tensor by tensor, in shards of the same names; None leaves a tensor out."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    files = shards(src)
    for shard in files:
        for name, dtype, shape in safetensors_io.rewrite(shard, dst / shard.name, changed):
            weight_map[name] = shard.name
            total_bytes += safetensors_io.num_bytes(shape, dtype)
    if files != [src / WEIGHTS]:
        write_index(dst, weight_map, total_bytes)


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """The index of a checkpoint with several shards; `total_size` in bytes."""
    metadata = {"total_size": total_size}
    write_json(
        folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file of a checkpoint, as transformers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def check_links(folder: Path) -> None:
    """Raise InputError for a link to a file outside the folder: its content would be copied and published.

    A snapshot in the hub's cache is made of links to the `blobs` beside it, which are its own.
    """
    root = folder.resolve()
    allowed = [root]
    # models--org--name/snapshots/<commit> and models--org--name/blobs
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for path in sorted(root.rglob("*")):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not any(map(target.is_relative_to, allowed)):
            link = folder / path.relative_to(root)
            raise checkpoint_error(
                f"{link} is a link to {target}, outside of that folder",
                "copy the file in its place",
            )


def copy_companions(src: Path, dst: Path, excluded: Collection[str] = ()) -> None:
    """Copy tokenizer, generation config, license, chat templates and so on: no weights, no pickles, nothing `excluded`.

    Mistral's own config is left out too, since its sizes would be wrong after pruning, and the model card, whose scores
    would be.
    """
    check_links(src)
    # The caller writes the weights, and with them the index and the config; manifests would be out of date.
    excluded_names = {
        INDEX,
        STATE,
        "config.json",
        "README.md",
        MISTRAL_CONFIG,
        "ptl-files.json",
        *MLFLOW_FILES,
        *excluded,
    }
    for path in [*src.iterdir(), *src.glob(f"{CHAT_TEMPLATES}/*.jinja")]:
        is_excluded = path.name in excluded_names or path.suffix in PICKLES + OTHER_WEIGHTS
        if path.is_file() and not is_excluded:
            copy = dst / path.relative_to(src)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def check_tokenizer(folder: Path) -> None:
    """Raise InputError when a checkpoint has no tokenizer files."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        names = ", ".join(TOKENIZERS)
        raise checkpoint_error(
            f"{folder} has no tokenizer ({names})",
            "save it beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )


def check_finite(paths: Iterable[Path]) -> None:
    """Raise InputError that names the first tensor with NaN or infinite values."""
    for path in paths:
        for name, tensor in tensors(path):
            # Integers are always finite.
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise checkpoint_error(
                    f"tensor {name} in {path} holds NaN or infinite values",
                    "use another checkpoint",
                )


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, by the index; empty without one."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    weight_map = json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise checkpoint_error(f"{path} must hold a weight_map")
    return {name: str(file) for name, file in weight_map.items()}


def write_mlflow_model(folder: Path) -> None:
    """Make an MLflow model of a checkpoint's folder: the file MLmodel, and the tokenizer where MLflow looks for it.

    `mlflow.transformers.load_model("models:/NAME/VERSION")` and `mlflow.pyfunc.load_model` then load it from the store.
    Both hold nothing but what follows from the checkpoint: equal checkpoints stay equal, byte for byte.
    """
    tokenizer = folder / MLFLOW_TOKENIZER
    tokenizer.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, tokenizer)
    # Some tokenizers are chosen by the model's type.
    shutil.copyfile(folder / "config.json", tokenizer / "config.json")
    transformers = {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        # Not the class in config.json, which need not name one.
        "pipeline_model_type": "AutoModelForCausalLM",
        "source_model_name": "",
        "model_binary": ".",
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
    }
    flavors = {
        "python_function": {"loader_module": "mlflow.transformers"},
        "transformers": transformers,
    }
    (folder / MLFLOW_FILES[0]).write_text(yaml.safe_dump({"flavors": flavors}))
