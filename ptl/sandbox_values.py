"""Values between the checker and the candidate as JSON: builtin data by value, everything else as a handle.

The checker decodes what a hostile process sent, so decoding only ever builds the types named here: no pickle, no code.
A tagged value is `{"t": type, "v": content}`; a bare JSON value is None, bool, a 64-bit int, float, str or list.
"""

from __future__ import annotations

import builtins
import json
import os
import struct
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable
from typing import Any

MAX_FRAME = 32 << 20  # bytes of one message
TEXT = 1500  # characters of an error's text

_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque,
    "range": lambda v: range(*v), "slice": lambda v: slice(*v), "complex": lambda v: complex(*v),
}  # fmt: skip
_MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
}


def send(descriptor: int, message: object) -> None:
    """Write one message: four bytes of length, then JSON."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"a value of {len(body)} bytes is too large to hand over")
    data = memoryview(struct.pack("<I", len(body)) + body)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Read one message; EOFError when the other side has closed, ValueError when it is not one."""
    (size,) = struct.unpack("<I", _read(descriptor, 4))
    if size > MAX_FRAME:
        raise ValueError(f"a message of {size} bytes is too large")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError("the other side has gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return `value` as JSON data; `refer` makes the handle of what is not plain data (or raises TypeError)."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else {"t": "int", "v": hex(value)}
    if kind is list:
        return [encode(item, refer) for item in value]
    name = kind.__name__
    if kind in (tuple, set, frozenset, deque):
        return {"t": name, "v": [encode(item, refer) for item in value]}
    if kind in (dict, OrderedDict, Counter) or (kind.__module__, name) == ("collections", "defaultdict"):
        name = "dict" if name == "defaultdict" else name
        return {"t": name, "v": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
    tagged = _encode_scalar(value, kind, refer)
    return refer(value) if tagged is None else tagged


def _encode_scalar(value: Any, kind: Any, refer: Callable[[Any], Any]) -> dict[str, Any] | None:
    name: str = kind.__name__
    if kind in (bytes, bytearray):
        return {"t": name, "v": value.decode("latin-1")}
    if kind is range or kind is slice:
        return {"t": name, "v": [encode(part, refer) for part in (value.start, value.stop, value.step)]}
    if kind is complex:
        return {"t": name, "v": [value.real, value.imag]}
    if (kind.__module__, name) in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return {"t": name, "v": str(value)}
    if kind.__module__ == "datetime" and name in ("date", "time", "datetime"):
        return {"t": name, "v": value.isoformat()}
    if kind.__module__ == "datetime" and name == "timedelta":
        return {"t": name, "v": [value.days, value.seconds, value.microseconds]}
    if (kind.__module__, name) == ("array", "array"):
        return {"t": name, "c": value.typecode, "v": value.tolist()}
    if kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
        return {"t": "namedtuple", "n": name, "f": list(kind._fields), "v": [encode(item, refer) for item in value]}
    if isinstance(value, type(sys)):
        return {"t": "module", "v": value.__name__}
    if kind is type:  # asked first: any other object may run code of its own for __name__
        known = str(value.__name__)
        if getattr(builtins, known, None) is value:
            return {"t": "builtin", "v": known}
    return None


def decode(data: Any, resolve: Callable[[dict[str, Any]], Any]) -> Any:
    """Return the value that `data` stands for; `resolve` turns handles (any other tag) into objects."""
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    tag: str = data["t"]
    content: Any = data.get("v")
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([decode(item, resolve) for item in content])
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]([(decode(key, resolve), decode(item, resolve)) for key, item in content])
    if tag == "int":
        return int(content, 16)
    if tag in ("bytes", "bytearray"):
        return content.encode("latin-1") if tag == "bytes" else bytearray(content, "latin-1")
    if tag in ("Decimal", "Fraction"):
        import decimal
        import fractions

        return decimal.Decimal(content) if tag == "Decimal" else fractions.Fraction(content)
    if tag in ("date", "time", "datetime", "timedelta"):
        import datetime

        return datetime.timedelta(*content) if tag == "timedelta" else getattr(datetime, tag).fromisoformat(content)
    if tag == "array":
        import array

        return array.array(data["c"], content)
    if tag == "namedtuple":  # namedtuple itself refuses names that are no identifiers
        return namedtuple(data["n"], data["f"])(*decode(content, resolve))
    if tag == "builtin":
        found = getattr(builtins, content)
        if not isinstance(found, type):  # a function such as eval must not come from the candidate
            raise ValueError(f"{content} is no builtin type")
        return found
    return resolve(data)
