"""The safetensors format, one tensor at a time: a file is read and written with only one tensor in memory.

The safetensors library checks a file's header, but maps the tensors of a whole file into memory and writes all of them
at once; both break the promise that memory does not grow with the model. The format: 8 bytes of header length, a JSON
header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 1 << 20  # bytes that are read at once
LENGTH_BYTES = 8  # of the header's length, little-endian; tensors begin at a multiple of it
# Each dtype of the format: its name in torch, and the bytes of a number
FORMAT_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
ITEM_BYTES = {name: size for name, (_, size) in FORMAT_DTYPES.items()}
TensorShape = tuple[int, ...]
TensorSpec = tuple[str, str, TensorShape]  # name, dtype as in the header, shape
NewTensor = tuple[TensorSpec, "Callable[[], Tensor]"]  # and what makes it, once it is its turn to be written
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that can be pruned


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    path: Path  # of the file
    name: str
    dtype: str  # as in the header: "F32"
    shape: TensorShape
    start: int  # offset in the file, bytes

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return num_bytes(self.shape, self.dtype)


Entries = Mapping[str, Entry]  # by the tensor's name


def num_bytes(shape: TensorShape, dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def entries(path: Path) -> list[Entry]:
    """The tensors of a file in the order of their bytes, from its header. Raises InputError that names the file."""
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header: whole sizes, and tensors that fill the file without gaps.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    header.pop("__metadata__", None)
    tensors = []
    for name, fields in header.items():
        if fields["dtype"] not in ITEM_BYTES:
            raise _damaged(path, f"tensor {name} has an unknown dtype {fields['dtype']!r}")
        start = LENGTH_BYTES + length + fields["data_offsets"][0]
        tensors.append(Entry(path, name, fields["dtype"], tuple(fields["shape"]), start))
    # By size too: an empty tensor has the offset of the next one.
    return sorted(tensors, key=lambda entry: (entry.start, entry.size))


def read_tensor(entry: Entry) -> Tensor:
    """One tensor, in memory of its own. Raises InputError when the file ends early."""
    import torch

    raw = torch.empty(entry.size, dtype=torch.uint8)
    view = raw.numpy().data
    done = 0
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while done < entry.size:
            count = file.readinto(view[done:])  # at most 2 GiB a call on Linux
            if not count:
                raise _damaged(entry.path, "it ends early")
            done += count
    return raw.view(dtypes()[entry.dtype]).reshape(entry.shape)


def byte_chunks(entry: Entry) -> Iterator[bytes]:
    """The bytes of a tensor, 1 MiB at a time."""
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        for done in range(0, entry.size, READ_BYTES):
            yield file.read(min(READ_BYTES, entry.size - done))


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterable[Tensor],
) -> None:
    """Write a file: name, dtype and shape of every tensor first, then the tensors one by one in the same order."""
    import torch

    specs = list(specs)  # they are read twice
    torch_dtypes = dtypes()
    with path.open("wb") as file:
        file.write(_header(specs))
        for (_, dtype, shape), tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (torch_dtypes[dtype], shape), f"{tensor.dtype} {tensor.shape}"
            flat = tensor.contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def rewrite(src: Path, dst: Path, changed: Callable[[Entry], NewTensor | None]) -> list[TensorSpec]:
    """Write a file's tensors anew, one by one; None leaves a tensor out, and without any there is no file."""
    kept = [new for entry in entries(src) if (new := changed(entry)) is not None]
    specs = [spec for spec, _ in kept]
    if kept:
        write_tensors(dst, specs, (read() for _, read in kept))
        dst.chmod(0o644)  # others may read it, whatever the umask
    return specs


def _header(specs: Iterable[TensorSpec]) -> bytes:
    """Length and JSON that precede the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in specs:
        end = position + num_bytes(shape, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, end],  # from the end of the header
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return struct.pack("<Q", len(text)) + text


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"shard {path} is damaged ({reason})", field="model.path", remedy="fetch the checkpoint again")


def dtypes() -> dict[str, Any]:
    """torch's dtype of each dtype of the format."""
    import torch

    return {name: getattr(torch, torch_name) for name, (torch_name, _) in FORMAT_DTYPES.items()}
