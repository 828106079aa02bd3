"""The checker's side of the sandbox: executes the tests and asks the candidate's process for every answer.

A name that the candidate defines is a `Remote` here, which sends each call over a pipe. Plain answers come back by
value, so comparing them runs no code of the candidate; other objects stay `Remote`, which never equals a plain value.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from ptl.sandbox_values import TEXT, decode, encode, receive, send


class _Gone(BaseException):
    """The candidate's process ended or broke the protocol. A BaseException, so that no test swallows it by accident."""


class Checker:
    """Executes the tests and reports over a pipe that the candidate's process never had."""

    def __init__(self, incoming: int, outgoing: int, result: int) -> None:
        self.incoming, self.outgoing, self.result = incoming, outgoing, result
        self.locals: list[Any] = []  # the tests' own functions, handed to the candidate as callbacks
        self.exceptions: dict[str, type[Exception]] = {}
        self.broken = ""  # why the candidate can no longer be asked; final

    def run(self, source: str) -> None:
        """Execute the tests and write the report, the last thing this process does."""
        os.write(self.result, b'{"ready": true}\n')
        status, detail = "failed", ""
        try:
            status, detail = self.check(source)
        except BaseException as error:  # a failed test, whatever it raised, is a result
            detail = _where(error, source)
        if self.broken:  # also where the tests swallowed it
            status, _, detail = self.broken.partition(": ")
        os.write(self.result, json.dumps({"status": status, "detail": detail[: 2 * TEXT]}).encode() + b"\n")
        os._exit(0)

    def check(self, source: str) -> tuple[str, str]:
        """Return the status and detail of the tests; an exception out of here is a failed test."""
        if self.receive() != ["locked"]:
            return "setup_failed", "the candidate's process did not report its lock-down"
        code = compile(source, "<tests>", "exec", dont_inherit=True)
        namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        try:
            exported = self.outcome(None)
        except Exception as error:
            return "failed", f"the candidate cannot be imported: {type(error).__name__}: {error}"
        if not isinstance(exported, dict):
            raise self.gone("failed: not a table of names")
        namespace.update(self.usable(exported, _names(code)))
        exec(code, namespace)
        return "passed", ""

    def usable(self, exported: dict[str, Any], asked: set[str]) -> dict[str, Any]:
        """Return the candidate's names for the tests; it cannot replace a builtin or a standard module of theirs.

        Unless the tests ask for nothing else of the candidate: then the function under test bears a builtin's name.
        """
        reserved = set(dir(builtins))
        wanted = {name: data for name, data in exported.items() if name in asked and not name.startswith("__")}
        plain = {name: data for name, data in wanted.items() if name not in reserved}
        values: dict[str, Any] = {}
        for name, data in (plain or wanted).items():
            tag = data.get("t") if isinstance(data, dict) else None
            if tag == "module":
                if data["v"] == name in sys.stdlib_module_names:
                    values[name] = __import__(name)
            elif tag == "exception":
                values[name] = self.exception(data)
            elif name not in sys.stdlib_module_names:
                values[name] = self.decode(data)
            elif tag == "handle" and data.get("c") is True:
                values[name] = RemoteNamesake(self, data["v"])
        return values

    def exception(self, data: dict[str, Any]) -> type[Exception]:
        """Make an exception class of the candidate, which `except` in the tests can name."""
        base = self.exception_class(data["b"][1:])
        made = type(str(data["v"]), (base,), {})
        self.exceptions[made.__name__] = made
        return made

    def exception_class(self, names: list[str]) -> type[Exception]:
        """Return the first known class of a method resolution order; an exit or interrupt ends everything."""
        for name in names:
            found = self.exceptions.get(name) or getattr(builtins, name, None)
            if isinstance(found, type) and issubclass(found, Exception):
                return found
        raise self.gone(f"failed: the candidate raised {str(names[0])[:80]}")

    def gone(self, reason: str) -> _Gone:
        """Note why the candidate cannot be asked any more, and return the exception to raise."""
        self.broken = self.broken or reason
        return _Gone(self.broken)

    def receive(self) -> Any:
        """Read one message; whatever is wrong with it ends the run."""
        if self.broken:
            raise self.gone(self.broken)
        try:
            return receive(self.incoming)
        except EOFError:
            raise self.gone("gone: the candidate's process ended before the tests were complete") from None
        except Exception as error:
            raise self.gone(f"failed: unreadable answer of the candidate: {type(error).__name__}") from None

    def decode(self, data: Any) -> Any:
        """Return the value that the candidate sent; whatever is wrong with it ends the run."""
        try:
            return decode(data, self.resolve)
        except Exception as error:
            raise self.gone(f"failed: unreadable value of the candidate: {type(error).__name__}") from None

    def resolve(self, data: dict[str, Any]) -> Any:
        """Return the object of a handle, or a function of the tests that comes back."""
        if data["t"] == "handle" and isinstance(data["v"], int):
            return (RemoteCallable if data.get("c") is True else Remote)(self, data["v"])
        if data["t"] == "local":
            return self.locals[data["v"]]
        raise ValueError("unknown tag")

    def refer(self, value: Any) -> dict[str, Any]:
        """Return the handle of a remote object or of a function of the tests; nothing else of theirs goes out."""
        if isinstance(value, Remote):
            return {"t": "handle", "v": object.__getattribute__(value, "_handle")}
        if not callable(value):
            raise TypeError(f"a {type(value).__name__} of the tests cannot be handed to the candidate")
        self.locals.append(value)
        return {"t": "local", "v": len(self.locals) - 1}

    def ask(self, name: str, *args: Any, keywords: dict[str, Any] | None = None, keep: bool = False) -> Any:
        """Have the candidate's process do one operation; its exceptions are raised here as builtin ones."""
        message = ["do", name, encode(list(args), self.refer), encode(keywords or {}, self.refer), keep]
        if self.broken:
            raise self.gone(self.broken)
        try:
            send(self.outgoing, message)
        except BrokenPipeError:
            raise self.gone("gone: the candidate's process ended before the tests were complete") from None
        value = self.outcome(args, stop=name == "next")
        if keep and not isinstance(value, Remote):
            raise self.gone("failed: the candidate answered with a value where a handle is due")
        return value

    def outcome(self, args: tuple[Any, ...] | None, stop: bool = False) -> Any:
        """Serve callbacks until the result arrives; `stop` allows StopIteration, no `args` asks for the names."""
        while True:
            message = self.receive()
            try:
                kind, first, second, *rest = message
                if kind == "ok" and args is None:
                    return first  # the table of names, decoded one by one
                if kind == "ok" and args is not None:
                    for index, after in second:
                        _change(args[index], self.decode(after))
                    return self.decode(first)
                if kind == "raise":
                    error = self.error(first, second, str(rest[0]), stop)
                elif kind == "callback":
                    self.callback(self.locals[first], second, rest[0])
                    continue
                else:
                    raise ValueError("unknown message")
            except (ValueError, TypeError, LookupError, AttributeError) as problem:
                raise self.gone(f"failed: the candidate broke the protocol: {type(problem).__name__}") from None
            raise error

    def error(self, names: list[str], args: list[Any], text: str, stop: bool) -> Exception:
        """Return the exception to raise in the tests for one that the candidate raised."""
        made = self.exception_class(names)
        # Only an iterator may say stop: raised from a call it could end a loop of the tests before their asserts.
        if issubclass(made, StopIteration) and not stop:
            return RuntimeError("the candidate raised StopIteration")
        try:
            return made(*args)
        except Exception:  # a class with a signature of its own, such as UnicodeDecodeError
            return RuntimeError(f"the candidate raised {names[0]}: {text}")

    def callback(self, function: Any, args: Any, kwargs: Any) -> None:
        """Call a function of the tests for the candidate and send what it gives."""
        values, keywords = self.decode(args), self.decode(kwargs)
        try:
            reply = ["reply", True, encode(function(*values, **keywords), self.refer)]
        except Exception as error:
            reply = ["reply", False, type(error).__name__, str(error)[:TEXT]]
        try:
            send(self.outgoing, reply)
        except BrokenPipeError:
            raise self.gone("gone: the candidate's process ended before the tests were complete") from None


class Remote:
    """An object in the candidate's process. Compared with, or asked to be, a plain value it is never equal to it."""

    __slots__ = ("_checker", "_handle")

    def __init__(self, checker: Checker, handle: int) -> None:
        object.__setattr__(self, "_checker", checker)
        object.__setattr__(self, "_handle", handle)

    def __getattr__(self, name: str) -> Any:
        return _ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        _ask("delitem", self, key)

    def __iter__(self) -> Any:
        return _ask("iter", self, keep=True)

    def __next__(self) -> Any:
        return _ask("next", self)

    def __len__(self) -> int:
        return int(_ask("len", self))

    def __bool__(self) -> bool:
        return _ask("bool", self) is True

    def __hash__(self) -> int:
        return int(_ask("hash", self))

    def __repr__(self) -> str:
        return str(_ask("repr", self))

    def __str__(self) -> str:
        return str(_ask("str", self))


class RemoteCallable(Remote):
    """A function or class in the candidate's process."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it over there."""
        return _ask("call", self, *args, keywords=kwargs)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and _ask("isinstance", value, self) is True


class RemoteNamesake(RemoteCallable):
    """A function named like a standard module: callable only, so that it cannot pose as `math` for `math.isclose`."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the candidate's function is asked for {name}, as if it were the module of that name")


def _ask(name: str, remote: Remote, *args: Any, keywords: dict[str, Any] | None = None, keep: bool = False) -> Any:
    return object.__getattribute__(remote, "_checker").ask(name, remote, *args, keywords=keywords, keep=keep)


def _comparison(name: str) -> Callable[[Remote, Any], Any]:
    def compare(self: Remote, other: Any) -> Any:
        if not isinstance(other, Remote):
            return NotImplemented  # falls back to identity, so an __eq__ of the candidate cannot claim a plain value
        return _ask("bool", _ask(name, self, other, keep=True)) is True

    return compare


def _arithmetic(name: str, swapped: bool) -> Callable[[Remote, Any], Any]:
    def calculate(self: Remote, other: Any) -> Any:
        # With a plain operand the result stays remote: else `abs(x - 0.5) < eps` would believe the object's __sub__.
        if swapped:
            return object.__getattribute__(self, "_checker").ask(name, other, self, keep=True)
        return _ask(name, self, other, keep=not isinstance(other, Remote))

    return calculate


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _comparison(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Remote, f"__{_name}__", _arithmetic(f"__{_name}__", swapped=False))
    setattr(Remote, f"__r{_name}__", _arithmetic(f"__{_name}__", swapped=True))


def _change(target: Any, after: Any) -> None:
    """Give an argument of the tests the content that the candidate left in its copy."""
    if type(target) is not type(after) or target == after:
        return
    if isinstance(target, (list, bytearray)):
        target[:] = after
    elif isinstance(target, (dict, set)):
        target.clear()
        target.update(after)


def _names(code: types.CodeType) -> set[str]:
    """Return every name that the code and its functions look up (and the attributes among them)."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _where(error: BaseException, source: str) -> str:
    """Return the error with the last line of the tests that it passed through."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    return f"{type(error).__name__}: {str(error)[:TEXT]} (tests, line {line}: {text[:200]})"
