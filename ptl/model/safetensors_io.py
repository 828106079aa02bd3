"""The safetensors format, one tensor at a time: a file is read and written with only one tensor in memory.

The safetensors library checks a file's header, but maps the tensors of a whole file into memory and writes all of them
at once; both break the promise that memory does not grow with the model. The format: 8 bytes of header length, a JSON
header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_BYTES = 8  # of the header's length, little-endian; tensors begin at a multiple of it
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that can be pruned
TensorShape = tuple[int, ...]
TensorSpec = tuple[str, str, TensorShape]  # name, dtype as in the header, shape
# and what makes it, once it is its turn to be written
NewTensor = tuple[TensorSpec, "Callable[[], Tensor]"]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    path: Path  # of the file
    name: str
    dtype: str  # as in the header: "F32"
    shape: TensorShape
    start: int  # offset in the file, bytes
    size: int  # bytes


Entries = Mapping[str, Entry]  # by the tensor's name


def dtypes() -> dict[str, Any]:
    """torch's dtype of each dtype of the format."""
    from transformers.modeling_utils import str_to_torch_dtype

    return str_to_torch_dtype


def num_bytes(shape: TensorShape, dtype: str) -> int:
    """Bytes of a tensor."""
    size: int = dtypes()[dtype].itemsize
    return math.prod(shape) * size


def entries(path: Path) -> list[Entry]:
    """The tensors of a file in the order of their bytes, from its header. Raises InputError that names the file."""
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header: known dtypes, whole sizes, and tensors that fill the file without gaps.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"shard {path} is damaged ({error})",
            field="model.path",
            remedy="fetch the checkpoint again",
        ) from error
    header.pop("__metadata__", None)
    tensors = []
    for name, fields in header.items():
        start, end = fields["data_offsets"]
        offset = LENGTH_BYTES + length + start
        tensors.append(
            Entry(path, name, fields["dtype"], tuple(fields["shape"]), offset, end - start)
        )
    # By size too: an empty tensor has the offset of the next one.
    return sorted(tensors, key=lambda entry: (entry.start, entry.size))


def read_tensor(entry: Entry) -> Tensor:
    """One tensor, in memory of its own."""
    import torch

    tensor = torch.empty(entry.shape, dtype=dtypes()[entry.dtype])
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


def are_equal(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same bytes; they are compared in the files, since each can have gigabytes."""
    import torch
    from safetensors import safe_open

    with safe_open(one.path, "pt") as first, safe_open(other.path, "pt") as second:
        return torch.equal(first.get_tensor(one.name), second.get_tensor(other.name))


def write_tensors(path: Path, specs: Iterable[TensorSpec], tensors: Iterable[Tensor]) -> None:
    """Write a file: name, dtype and shape of every tensor first, then the tensors one by one in the same order."""
    specs = list(specs)  # they are read twice
    torch_dtypes = dtypes()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in specs:
        end = position + num_bytes(shape, dtype)
        # from the header's end
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for (_, dtype, shape), tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (torch_dtypes[dtype], shape), (
                f"{tensor.dtype} {tensor.shape}"
            )
            file.write(_bytes(tensor))


def overwrite(entry: Entry, tensor: Tensor) -> None:
    """Put a tensor of the same shape in the place of one of a file, in the dtype of that one."""
    assert tensor.shape == entry.shape, f"{tensor.shape} {entry.shape}"
    with entry.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(_bytes(tensor.to(dtypes()[entry.dtype])))


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def rewrite(src: Path, dst: Path, changed: Callable[[Entry], NewTensor | None]) -> list[TensorSpec]:
    """Write a file's tensors anew, one by one; None leaves a tensor out, and without any there is no file."""
    kept = [new for entry in entries(src) if (new := changed(entry)) is not None]
    specs = [spec for spec, _ in kept]
    if kept:
        write_tensors(dst, specs, (read() for _, read in kept))
        dst.chmod(0o644)  # others may read it, whatever the umask
    return specs
