"""A Hugging Face checkpoint as files: safetensors shards, config.json and the files that must travel with them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl import bounded_json, safefile
from ptl.errors import InputError
from ptl.families import ROTARY, family_of

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
STATE = "recovery_state.safetensors"  # Adam's moments between two recoveries; transformers does not read it
DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # as config.json names them: bytes of a number
ADAPTER = "adapter_config.json"  # of PEFT
CHAT_TEMPLATES = "additional_chat_templates"  # transformers' folder for templates beside the default one
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises InputError when it is missing or no JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"model.path: no folder {folder}; give a checkpoint folder or a hub id")
    if not path.is_file():
        raise InputError(f"model.path: {folder} has no config.json; give the folder of a Hugging Face checkpoint")
    return json_object(path)


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises InputError when it holds no JSON object."""
    try:
        content = bounded_json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"model.path: {path} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise InputError(f"model.path: {path} must hold a JSON object; fetch the checkpoint again")
    return content


def shards(folder: Path) -> list[Path]:
    """The weight files, in order. Raises InputError for pickles, missing shards and paths that leave the folder."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if Path(name).name != name:
                raise InputError(f"model.path: {index} names {name!r}, which is no plain file name; refused")
            if not (folder / name).is_file():
                raise InputError(f"model.path: {index} names {name}, which is missing; fetch the checkpoint again")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"model.path: {folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code when read; "
            "convert it: load it once with transformers and save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"model.path: {folder} has no {WEIGHTS}; give the folder of a safetensors checkpoint")


def contents(folder: Path) -> dict[str, safefile.Entry]:
    """Every tensor of the weights by name, from the shards' headers alone. Raises InputError that names a bad shard."""
    found: dict[str, safefile.Entry] = {}
    for path in shards(folder):
        for entry in safefile.entries(path):
            if entry.name in found:
                raise InputError(f"model.path: tensor {entry.name} is in two shards, {path} among them; fetch it again")
            found[entry.name] = entry
    for name, file in _weight_map(folder).items():
        if name not in found or found[name].path.name != file:
            raise InputError(
                f"model.path: {folder / INDEX} says that {file} holds {name}, and it does not; fetch it again"
            )
    return found


def num_params(folder: Path) -> int:
    """Parameters of a checkpoint. Raises InputError for a family that is not supported."""
    config = read_config(folder)
    return count(contents(folder), family_of(config).is_tied(config))


def itemsize(folder: Path) -> int:
    """Bytes of a number in the model as transformers loads it: in the config's dtype, else in that of the weights."""
    config = read_config(folder)
    named = config.get("dtype") or config.get("torch_dtype")
    if named:
        return DTYPES[named]
    found = contents(folder) if any(folder.glob("*.safetensors")) else {}
    return max((safefile.ITEM_BYTES[entry.dtype] for entry in found.values()), default=DTYPES["bfloat16"])


def count(found: Mapping[str, safefile.Entry], tied: bool) -> int:
    """Parameters of these tensors. An output layer that is the embeddings counts once, also where both are stored."""
    return sum(
        math.prod(entry.shape)
        for name, entry in found.items()
        if not ROTARY.match(name) and not (tied and name == "lm_head.weight")
    )


def check_tied(found: Mapping[str, safefile.Entry]) -> None:
    """Raise InputError where a tied output layer is stored with other values: transformers would then not tie it."""
    if "lm_head.weight" not in found or "model.embed_tokens.weight" not in found:
        return
    output, embeddings = found["lm_head.weight"], found["model.embed_tokens.weight"]
    if any(one != other for one, other in zip(safefile.blocks(output), safefile.blocks(embeddings), strict=True)):
        raise InputError(
            f"model.path: {output.path} holds an output layer (lm_head.weight) that differs from the embeddings, but "
            "config.json ties them; set tie_word_embeddings to false there, or remove that tensor"
        )


def check_no_adapter(folder: Path) -> None:
    """Raise InputError where an adapter is left in the folder: transformers would load it on top of the weights."""
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"model.path: {folder} has {ADAPTER}, with which transformers loads an adapter, or the adapter's own base "
            "model, in place of these weights; merge the adapter and save the model, or remove its files"
        )


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one after the other, so that only one is in memory."""
    for entry in safefile.entries(path):
        yield entry.name, safefile.read(entry)


def write_shard(path: Path, named: dict[str, torch.Tensor]) -> None:
    """Save one shard in the form that transformers reads."""
    from safetensors.torch import save_file

    save_file(named, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, which another UID cannot read


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """The index of a checkpoint with several shards."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_links(folder: Path) -> None:
    """Raise InputError for a link to a file outside the folder: its content would be copied and published.

    A snapshot in the hub's cache is made of links to the `blobs` beside it, which are its own.
    """
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in allowed):
                raise InputError(
                    f"model.path: {folder / path.relative_to(root)} is a link to {target}, outside of that folder; "
                    "copy the file there in its place"
                )


def copy_companions(src: Path, dst: Path) -> None:
    """Everything beside the weights: tokenizer, generation config, chat templates; no pickles, no weights."""
    check_links(src)
    weights = {path.name for path in shards(src)} | {INDEX, "config.json", STATE, "ptl-files.json"}
    for path in sorted(src.iterdir()):
        if path.is_file() and path.name not in weights and path.suffix not in (*PICKLES, ".safetensors"):
            shutil.copyfile(path, dst / path.name)
    for path in sorted((src / CHAT_TEMPLATES).glob("*.jinja")):
        (dst / CHAT_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, dst / CHAT_TEMPLATES / path.name)


def check_tokenizer(folder: Path) -> None:
    """Raise InputError when a checkpoint has no tokenizer files."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(
            f"model.path: {folder} has no tokenizer ({', '.join(TOKENIZERS)}); "
            "save it beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )


def check_finite(paths: Iterable[Path]) -> None:
    """Raise InputError that names the first tensor with NaN or infinite values."""
    for path in paths:
        for name, tensor in tensors(path):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise InputError(
                    f"model.path: tensor {name} in {path} holds NaN or infinite values; use a sound checkpoint"
                )


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, by the index; empty without one."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        weight_map = bounded_json.loads(path.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"model.path: {path} is no index of shards ({error}); fetch the checkpoint again") from error
