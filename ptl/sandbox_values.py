"""Values between the checker and the candidate as JSON: builtin data by value, everything else as a handle.

The checker decodes what a hostile process sent, so decoding only ever builds the types named here: no pickle, no code.
A tagged value is `{"t": type, "v": content}`; a bare JSON value is None, bool, a 64-bit int, float, str or list.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import struct
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_FRAME = 32 << 20  # bytes of one message
TEXT = 1500  # characters of an error's text

Refer = Callable[[Any], Any]  # the handle of an object that is not plain data, or TypeError
Resolve = Callable[[dict[str, Any]], Any]  # the object of a handle

_HEADER = struct.Struct("<I")  # length of the JSON that follows
_CHUNK = 1 << 20  # bytes of one read


class _Codec(NamedTuple):
    """How values of one type travel: the type is known by its name and module, as some are not imported yet."""

    module: str
    parts: Callable[[Any], Any]  # of a value, simpler values
    build: Callable[[Any], Any]  # the value, from its parts


def _star(function: Callable[..., Any]) -> Callable[[Any], Any]:
    def build(arguments: Any) -> Any:
        return function(*arguments)

    return build


def _star_later(module: str, path: str) -> Callable[[Any], Any]:
    """As `_star`, with a function of a module that is imported at the first use: both children start faster."""

    def build(arguments: Any) -> Any:
        function = operator.attrgetter(path)(__import__(module))
        return function(*arguments)

    return build


def _items(value: Any) -> Any:
    return value.items()


def _bounds(value: Any) -> list[Any]:
    return [value.start, value.stop, value.step]


def _text(value: Any) -> list[str]:
    return [str(value)]


def _iso_text(value: Any) -> list[str]:
    return [value.isoformat()]


def _latin_text(value: bytes) -> list[str]:
    return [value.decode("latin-1"), "latin-1"]


def _complex_parts(value: complex) -> list[float]:
    return [value.real, value.imag]


def _timedelta_parts(value: Any) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _array_parts(value: Any) -> list[Any]:
    return [value.typecode, value.tolist()]


def _counter(pairs: list[Any]) -> Counter[Any]:
    return Counter(dict(pairs))


# The parts are any values.
_SEQUENCES = {
    "tuple": _Codec("builtins", list, tuple),
    "set": _Codec("builtins", list, set),
    "frozenset": _Codec("builtins", list, frozenset),
    "deque": _Codec("collections", list, deque),
    "range": _Codec("builtins", _bounds, _star(range)),
    "slice": _Codec("builtins", _bounds, _star(slice)),
}
# The parts are pairs of any values.
_MAPPINGS = {
    "dict": _Codec("builtins", _items, dict),
    "defaultdict": _Codec("collections", _items, dict),  # its factory is a function and stays where it is
    "OrderedDict": _Codec("collections", _items, OrderedDict),
    "Counter": _Codec("collections", _items, _counter),
}
# The parts are numbers and texts: JSON as they are.
_SCALARS = {
    "bytes": _Codec("builtins", _latin_text, _star(bytes)),
    "bytearray": _Codec("builtins", _latin_text, _star(bytearray)),
    "complex": _Codec("builtins", _complex_parts, _star(complex)),
    "Decimal": _Codec("decimal", _text, _star_later("decimal", "Decimal")),
    "Fraction": _Codec("fractions", _text, _star_later("fractions", "Fraction")),
    "date": _Codec("datetime", _iso_text, _star_later("datetime", "date.fromisoformat")),
    "time": _Codec("datetime", _iso_text, _star_later("datetime", "time.fromisoformat")),
    "datetime": _Codec("datetime", _iso_text, _star_later("datetime", "datetime.fromisoformat")),
    "timedelta": _Codec("datetime", _timedelta_parts, _star_later("datetime", "timedelta")),
    "array": _Codec("array", _array_parts, _star_later("array", "array")),
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


def encode(value: Any, refer: Refer) -> Any:
    """Return `value` as JSON data; `refer` makes the handle of what is not plain data (or raises TypeError)."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        is_json = -(2**63) <= value < 2**63
        return value if is_json else {"t": "int", "v": hex(value)}
    if kind is list:
        return [encode(item, refer) for item in value]

    name: str = kind.__name__
    content: Any
    if _has_codec(kind, _SEQUENCES):
        content = [encode(part, refer) for part in _SEQUENCES[name].parts(value)]
    elif _has_codec(kind, _MAPPINGS):
        content = [[encode(key, refer), encode(item, refer)] for key, item in _MAPPINGS[name].parts(value)]
    elif _has_codec(kind, _SCALARS):
        content = _SCALARS[name].parts(value)
    elif kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
        items = [encode(item, refer) for item in value]
        return {"t": "namedtuple", "n": name, "f": list(kind._fields), "v": items}
    elif isinstance(value, type(sys)):
        return {"t": "module", "v": value.__name__}
    elif kind is type and _is_builtin(value):
        return {"t": "builtin", "v": value.__name__}
    else:
        return refer(value)
    return {"t": name, "v": content}


def _has_codec(kind: type, codecs: dict[str, _Codec]) -> bool:
    codec = codecs.get(kind.__name__)
    return codec is not None and codec.module == kind.__module__


def _is_builtin(kind: type) -> bool:
    # Only for what is surely a class: any other object may run code of its own for __name__.
    name = str(kind.__name__)
    return getattr(builtins, name, None) is kind


def decode(data: Any, resolve: Resolve) -> Any:
    """Return the value that `data` stands for; `resolve` turns handles (any other tag) into objects."""
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    tag: str = data["t"]
    content: Any = data.get("v")
    if tag in _SEQUENCES:
        parts = [decode(part, resolve) for part in content]
        return _SEQUENCES[tag].build(parts)
    if tag in _MAPPINGS:
        pairs = [(decode(key, resolve), decode(item, resolve)) for key, item in content]
        return _MAPPINGS[tag].build(pairs)
    if tag in _SCALARS:
        return _SCALARS[tag].build(content)
    if tag == "int":
        return int(content, 16)
    if tag == "namedtuple":
        items = decode(content, resolve)
        return namedtuple(data["n"], data["f"])(*items)  # which itself refuses names that are no identifiers
    if tag == "builtin":
        builtin = getattr(builtins, content)
        if not isinstance(builtin, type):  # a function such as eval must not come from the candidate
            raise ValueError(f"{content} is no builtin type")
        return builtin
    return resolve(data)
