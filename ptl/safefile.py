"""The safetensors format, one tensor at a time: a file is read and written with only one tensor in memory.

The safetensors library maps a whole file into memory and writes all tensors of a file at once; both break the promise
that memory does not grow with the model. The format: 8 bytes of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl import bounded_json
from ptl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = ("F64", "F32", "F16", "BF16")  # what a cut can work on


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` is its offset in the file, in bytes."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def entries(path: Path) -> list[Entry]:
    """The tensors of a file in the order of their bytes, from its header. Raises InputError that names the file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise ValueError("header longer than the file")
            header = bounded_json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
        found.sort(key=lambda entry: (entry.start, entry.size))
        position = 8 + length
        for entry in found:
            if entry.start != position:
                raise ValueError(f"tensor {entry.name} does not begin where the one before it ends")
            position += entry.size
        if path.stat().st_size != position:
            raise ValueError(f"{path.stat().st_size:,} bytes, {position:,} by its header")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"model.path: shard {path} is damaged ({error}); fetch the checkpoint again") from error
    return found


def read(entry: Entry) -> Tensor:
    """One tensor, in memory of its own. Raises InputError when the file ends early."""
    import torch

    raw = torch.empty(entry.size, dtype=torch.uint8)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view, done = _bytes(raw), 0
        while done < entry.size:
            count = file.readinto(view[done:])  # at most 2 GiB a call on Linux
            if not count:
                raise InputError(f"model.path: shard {entry.path} is damaged (it ends early); fetch it again")
            done += count
    return raw.view(dtypes()[entry.dtype]).reshape(entry.shape)


def blocks(entry: Entry) -> Iterator[bytes]:
    """The bytes of a tensor, 1 MiB at a time."""
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        for done in range(0, entry.size, BLOCK):
            yield file.read(min(BLOCK, entry.size - done))


def write(path: Path, specs: Iterable[tuple[str, str, tuple[int, ...]]], tensors: Iterable[Tensor]) -> None:
    """Write a file: name, dtype and shape of every tensor first, then the tensors one by one in the same order."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    expected, position = [], 0
    for name, dtype, shape in specs:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        expected.append((dtype, tuple(shape)))
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    known = dtypes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (dtype, shape), tensor in zip(expected, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (known[dtype], shape), f"{tensor.dtype} {tensor.shape}"
            file.write(_bytes(tensor.contiguous().reshape(-1).view(torch.uint8)))


def _entry(path: Path, name: str, fields: dict[str, Any], data: int) -> Entry:
    begin, end = fields["data_offsets"]
    if fields["dtype"] not in ITEM_BYTES:
        raise ValueError(f"tensor {name} has dtype {fields['dtype']!r}, which is not known here")
    if not all(type(number) is int and number >= 0 for number in (begin, end, *fields["shape"])):
        raise ValueError(f"tensor {name} has sizes that are no whole numbers")
    entry = Entry(path, name, fields["dtype"], tuple(fields["shape"]), data + begin)
    if end - begin != entry.size:
        raise ValueError(f"tensor {name} has {end - begin} bytes, its shape {entry.size}")
    return entry


def _bytes(raw: Any) -> memoryview:
    """The memory of a uint8 tensor on the CPU."""
    return memoryview(raw.numpy())


def dtypes() -> dict[str, Any]:
    """torch's name of each dtype of the format."""
    import torch

    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    names |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    return names | {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
