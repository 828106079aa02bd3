"""Values between the checker and the candidate as JSON: builtin data by value, everything else as a handle.

The checker decodes what a hostile process sent, so decoding only ever builds the types named here: no pickle, no code.
A tagged value is `{"t": type, "v": content}`; a bare JSON value is None, bool, a 64-bit int, float, str or list.
"""

from __future__ import annotations

import builtins
import json
import os
import struct
import types
from collections import namedtuple
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

MAX_FRAME = 32 << 20  # bytes of one message
TEXT = 1500  # characters of an error's text

Tagged = dict[str, Any]  # a value or handle with its tag

_HEADER = struct.Struct("<I")  # length of the JSON that follows
_CHUNK = 1 << 20  # bytes of one read


class _Codec(NamedTuple):
    """How values of one type travel."""

    module: str  # of the type, which is imported at the first use: both children start faster
    parts: Callable[[Any], Any]  # of a value, simpler values
    build: str  # in the module: what is called with the parts
    takes_list: bool = False  # whether it takes them as one list


def _pairs(value: Any) -> list[list[Any]]:
    return [[key, item] for key, item in value.items()]


def _text(value: Any) -> list[str]:
    return [str(value)]


def _latin_text(value: Any) -> list[str]:
    return [value.decode("latin-1"), "latin-1"]


def _hex_text(value: int) -> list[Any]:
    return [hex(value), 16]


# By the type's name, which is its tag.
_CODECS = {
    "int": _Codec("builtins", _hex_text, "int"),  # of more than 64 bits
    "bytes": _Codec("builtins", _latin_text, "bytes"),
    "bytearray": _Codec("builtins", _latin_text, "bytearray"),
    "complex": _Codec("builtins", attrgetter("real", "imag"), "complex"),
    "range": _Codec("builtins", attrgetter("start", "stop", "step"), "range"),
    "slice": _Codec("builtins", attrgetter("start", "stop", "step"), "slice"),
    "tuple": _Codec("builtins", list, "tuple", True),
    "set": _Codec("builtins", list, "set", True),
    "frozenset": _Codec("builtins", list, "frozenset", True),
    "dict": _Codec("builtins", _pairs, "dict", True),
    "deque": _Codec("collections", list, "deque", True),
    # its factory stays
    "defaultdict": _Codec("collections", lambda value: [None, _pairs(value)], "defaultdict"),
    "OrderedDict": _Codec("collections", _pairs, "OrderedDict", True),
    "Counter": _Codec("collections", lambda value: [dict(value)], "Counter"),
    "Decimal": _Codec("decimal", _text, "Decimal"),
    "Fraction": _Codec("fractions", _text, "Fraction"),
    "date": _Codec("datetime", _text, "date.fromisoformat"),
    "time": _Codec("datetime", _text, "time.fromisoformat"),
    "datetime": _Codec("datetime", _text, "datetime.fromisoformat"),
    "timedelta": _Codec("datetime", attrgetter("days", "seconds", "microseconds"), "timedelta"),
    "array": _Codec("array", lambda value: [value.typecode, value.tolist()], "array"),
}


def send(descriptor: int, message: object) -> None:
    """Write one message: four bytes of length, then JSON."""
    payload = json.dumps(message).encode()
    if len(payload) > MAX_FRAME:
        raise ValueError(f"a value of {len(payload)} bytes is too large to hand over")
    unsent = memoryview(_HEADER.pack(len(payload)) + payload)
    while unsent:
        num_written = os.write(descriptor, unsent)
        unsent = unsent[num_written:]


def receive(descriptor: int) -> Any:
    """Read one message; EOFError when the other side has closed, ValueError when it is not one."""
    header = _read_exactly(descriptor, _HEADER.size)
    (size,) = _HEADER.unpack(header)
    if size > MAX_FRAME:
        raise ValueError(f"a message of {size} bytes is too large")
    return json.loads(_read_exactly(descriptor, size))


def _read_exactly(descriptor: int, size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(descriptor, min(size, _CHUNK))
        if not chunk:
            raise EOFError("the other side has gone")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return `value` as JSON data; `refer` makes the handle of what is not plain data (or raises TypeError)."""
    # Exact types: an object of a subclass is more than its value.
    kind = type(value)
    if kind in (types.NoneType, bool, str, float):
        return value
    if kind is int and -(2**63) <= value < 2**63:
        return value
    if kind is list:
        return [encode(item, refer) for item in value]
    name = kind.__name__
    codec = _CODECS.get(name)
    if codec is not None and codec.module == kind.__module__:
        return {"t": name, "v": [encode(part, refer) for part in codec.parts(value)]}
    if kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
        parts = [name, list(value._fields), list(value)]
        return {"t": "namedtuple", "v": [encode(part, refer) for part in parts]}
    if isinstance(value, types.ModuleType):
        return {"t": "module", "v": value.__name__}
    # Asked for its name only if it is surely a class: any other object may run code of its own for that.
    if kind is type:
        name = value.__name__
        if getattr(builtins, name, None) is value:
            return {"t": "builtin", "v": name}
    return refer(value)


def decode(data: Any, resolve: Callable[[Tagged], Any]) -> Any:
    """Return the value that `data` stands for; `resolve` turns handles (any other tag) into objects."""
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    # Data of another form raises one of Python's own errors, which the caller expects.
    tag = data["t"]
    content = data.get("v")
    codec = _CODECS.get(tag)
    if codec is not None or tag == "namedtuple":
        if not isinstance(content, list):
            raise ValueError(f"the content of a {tag} is no list")
        parts = [decode(part, resolve) for part in content]
        if codec is None:
            name, fields, items = parts
            # which itself refuses names that are no identifiers
            return namedtuple(name, fields)(*items)
        build = attrgetter(codec.build)(__import__(codec.module))
        return build(parts) if codec.takes_list else build(*parts)
    if tag == "builtin":
        builtin = getattr(builtins, str(content))
        # a function such as eval must not come from the candidate
        if not isinstance(builtin, type):
            raise ValueError(f"{content} is no builtin type")
        return builtin
    return resolve(data)
