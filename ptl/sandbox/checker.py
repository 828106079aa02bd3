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

from ptl.sandbox.protocol import TEXT, Tagged, decode, encode, receive, send

# its parent knows the exit code
_ENDED = "the candidate's process ended before the tests were complete"


class _GoneError(BaseException):
    """The candidate's process ended or broke the protocol. A BaseException, so that no test swallows it by accident."""


class Checker:
    """Executes the tests and reports over a pipe that the candidate's process never had."""

    def __init__(self, incoming: int, outgoing: int, report: int) -> None:
        self.incoming = incoming
        self.outgoing = outgoing
        self.report = report
        # the tests' own functions, handed to the candidate as callbacks
        self.locals: list[Any] = []
        self.exceptions: dict[str, type[Exception]] = {}  # of the candidate, by name
        # status and detail once the candidate cannot be asked; final
        self.broken: tuple[str, str] | None = None

    def run(self, source: str) -> None:
        """Execute the tests and write the report, the last thing this process does."""
        os.write(self.report, b'{"ready": true}\n')
        try:
            status, detail = self.check(source)
        except BaseException as error:  # a failed test, whatever it raised, is a result
            status = "failed"
            detail = _describe(error, source)
        if self.broken is not None:  # also where the tests swallowed it
            status, detail = self.broken
        os.write(self.report, json.dumps({"status": status, "detail": detail[: 2 * TEXT]}).encode())
        os._exit(0)

    def check(self, source: str) -> tuple[str, str]:
        """Return the status and detail of the tests; an exception out of here is a failed test."""
        # Nothing of the tests runs before the candidate's process is confined.
        if self.receive() != ["locked"]:
            return "setup_failed", "the candidate's process did not report its lock-down"
        # The names that the tests ask for are those of their code, nested functions included.
        code = compile(source, "<tests>", "exec", dont_inherit=True)
        try:
            exported = self.outcome(None)
        except Exception as error:
            return "failed", f"the candidate cannot be imported: {type(error).__name__}: {error}"
        if not isinstance(exported, dict):
            raise self.gone("not a table of names")
        namespace = {
            "__name__": "tests",
            "__builtins__": builtins,
            **self.usable(exported, _names_in(code)),
        }
        exec(code, namespace)
        return "passed", ""

    def usable(self, exported: dict[str, Any], asked: set[str]) -> dict[str, Any]:
        """Return the candidate's names for the tests; it cannot replace a builtin or a standard module of theirs.

        Unless the tests ask for nothing else of the candidate: then the function under test bears a builtin's name.
        """
        requested = {name for name in asked.intersection(exported) if not name.startswith("__")}
        names = requested.difference(dir(builtins)) or requested
        values: dict[str, Any] = {}
        # In the candidate's order: an exception may be derived from an earlier one.
        for name, data in exported.items():
            if name not in names:
                continue
            tag = data.get("t") if isinstance(data, dict) else None
            # A name of the standard library stays that module, or becomes a function that cannot pose as it.
            is_standard = name in sys.stdlib_module_names
            if tag == "module":
                if is_standard and data["v"] == name:
                    values[name] = __import__(name)
            elif tag == "exception":
                values[name] = self.exception(data)
            elif not is_standard:
                values[name] = self.decode(data)
            elif tag == "handle" and data.get("c") is True:
                values[name] = RemoteNamesake(self, data["v"])
        return values

    def exception(self, data: Tagged) -> type[Exception]:
        """Make an exception class of the candidate, which `except` in the tests can name."""
        _, *bases = data["b"]
        base = self.exception_class(bases)
        name = str(data["v"])
        self.exceptions[name] = type(name, (base,), {})
        return self.exceptions[name]

    def exception_class(self, names: list[str]) -> type[Exception]:
        """Return the first known class of a method resolution order; an exit or interrupt ends everything."""
        # The candidate's own classes first: they may bear a builtin's name.
        for name in names:
            known = self.exceptions.get(name) or getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, Exception):
                return known
        raise self.gone(f"the candidate raised {names[0]!s:.80}")

    def gone(self, detail: str, status: str = "failed") -> _GoneError:
        """Note why the candidate cannot be asked any more, and return the exception to raise."""
        if self.broken is None:  # the first reason counts
            self.broken = (status, detail)
        return _GoneError(detail)

    def require_unbroken(self) -> None:
        """Raise again what a test has swallowed."""
        if self.broken is not None:
            raise _GoneError(self.broken[1])

    def receive(self) -> Any:
        """Read one message; whatever is wrong with it ends the run."""
        self.require_unbroken()
        try:
            return receive(self.incoming)
        except EOFError:
            raise self.gone(_ENDED, "gone") from None
        except Exception as error:
            raise self.gone(f"unreadable answer of the candidate: {type(error).__name__}") from None

    def send(self, message: list[Any]) -> None:
        """Write one message."""
        try:
            send(self.outgoing, message)
        except BrokenPipeError:
            raise self.gone(_ENDED, "gone") from None

    def decode(self, data: Any) -> Any:
        """Return the value that the candidate sent; whatever is wrong with it ends the run."""
        try:
            return decode(data, self.resolve)
        except Exception as error:
            raise self.gone(f"unreadable value of the candidate: {type(error).__name__}") from None

    def resolve(self, data: Tagged) -> Any:
        """Return the object of a handle, or a function of the tests that comes back."""
        number = data["v"]
        if data["t"] == "handle" and isinstance(number, int):
            kind = RemoteCallable if data.get("c") is True else Remote
            return kind(self, number)
        if data["t"] == "local":
            return self.locals[number]
        raise ValueError("unknown tag")

    def refer(self, value: Any) -> Tagged:
        """Return the handle of a remote object or of a function of the tests; nothing else of theirs goes out."""
        if isinstance(value, Remote):
            return {"t": "handle", "v": object.__getattribute__(value, "_handle")}
        if not callable(value):
            raise TypeError(
                f"a {type(value).__name__} of the tests cannot be handed to the candidate"
            )
        # Kept for ever: the candidate may call it at any time.
        self.locals.append(value)
        return {"t": "local", "v": len(self.locals) - 1}

    def ask(
        self, name: str, *args: Any, keywords: dict[str, Any] | None = None, keep: bool = False
    ) -> Any:
        """Have the candidate's process do one operation; its exceptions are raised here as builtin ones.

        `keep` leaves the result there and returns its handle.
        """
        # Both raise TypeError for what may not go out, before anything is sent.
        operands = [encode(list(args), self.refer), encode(keywords or {}, self.refer)]
        self.require_unbroken()
        self.send(["do", name, *operands, keep])
        value = self.outcome(args, stop=name == "next")
        if keep and not isinstance(value, Remote):
            raise self.gone("the candidate answered with a value where a handle is due")
        return value

    def outcome(self, args: tuple[Any, ...] | None, stop: bool = False) -> Any:
        """Serve callbacks until the result arrives; `stop` allows StopIteration, no `args` asks for the names."""
        while True:
            message = self.receive()
            try:
                kind, first, second, *rest = message
                if kind == "callback":
                    self.callback(self.locals[first], second, rest[0])
                    continue
                if kind == "ok":
                    # The table of names is decoded one by one.
                    return first if args is None else self.result(first, second, args)
                if kind != "raise":
                    raise ValueError("unknown message")
                error = self.error(first, second, str(rest[0]), stop)
            # A message of another form than the protocol's.
            except (ValueError, TypeError, LookupError, AttributeError) as problem:
                raise self.gone(
                    f"the candidate broke the protocol: {type(problem).__name__}"
                ) from None
            # Outside of the try: the candidate's own ValueError breaks no protocol.
            raise error

    def result(self, data: Any, changes: list[Any], args: tuple[Any, ...]) -> Any:
        """Return the value of an operation, after arguments that it changed in place have been changed here too."""
        for index, content in changes:
            _replace_content(args[index], self.decode(content))
        return self.decode(data)

    def error(self, names: list[str], args: list[Any], text: str, stop: bool) -> Exception:
        """Return the exception to raise in the tests for one that the candidate raised."""
        kind = self.exception_class(names)
        # Only an iterator may say stop: raised from a call it could end a loop of the tests before their asserts.
        if issubclass(kind, StopIteration) and not stop:
            return RuntimeError("the candidate raised StopIteration")
        try:
            return kind(*args)
        except Exception:  # a class with a signature of its own, such as UnicodeDecodeError
            return RuntimeError(f"the candidate raised {names[0]}: {text}")

    def callback(self, function: Any, args: Any, kwargs: Any) -> None:
        """Call a function of the tests for the candidate and send what it gives."""
        values = self.decode(args)
        keywords = self.decode(kwargs)
        # Its exceptions are the candidate's to handle, as in one process.
        try:
            reply = ["reply", True, encode(function(*values, **keywords), self.refer)]
        except Exception as error:
            reply = ["reply", False, type(error).__name__, str(error)[:TEXT]]
        self.send(reply)


def _operation(name: str, keep: bool = False) -> Callable[..., Any]:
    """A method of `Remote` that has the candidate's process do one operation on its object."""

    def operate(self: Remote, *operands: Any) -> Any:
        return _ask(name, self, *operands, keep=keep)

    return operate


class Remote:
    """An object in the candidate's process. Compared with, or asked to be, a plain value it is never equal to it."""

    __slots__ = ("_checker", "_handle")

    def __init__(self, checker: Checker, handle: int) -> None:
        # Past our own __setattr__, which goes to the candidate's object.
        object.__setattr__(self, "_checker", checker)
        object.__setattr__(self, "_handle", handle)

    __getattr__ = _operation("getattr")
    __setattr__ = _operation("setattr")
    __getitem__ = _operation("getitem")
    __setitem__ = _operation("setitem")
    __delitem__ = _operation("delitem")
    __iter__ = _operation("iter", keep=True)
    __next__ = _operation("next")

    # Python demands plain values of these.

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

    # A plain value is no instance of the candidate's classes, whatever these say.
    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and _ask("isinstance", value, self) is True


class RemoteNamesake(RemoteCallable):
    """A function named like a standard module: callable only, so that it cannot pose as `math` for `math.isclose`."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the candidate's function is asked for {name}, as if it were the module of that name"
        )


def _ask(
    name: str,
    remote: Remote,
    *args: Any,
    keywords: dict[str, Any] | None = None,
    keep: bool = False,
) -> Any:
    return _checker_of(remote).ask(name, remote, *args, keywords=keywords, keep=keep)


def _checker_of(remote: Remote) -> Checker:
    checker: Checker = object.__getattribute__(remote, "_checker")
    return checker


def _comparison(name: str) -> Callable[[Remote, Any], Any]:
    def compare(self: Remote, other: Any) -> Any:
        if not isinstance(other, Remote):
            # falls back to identity, so an __eq__ of the candidate cannot claim a plain value
            return NotImplemented
        answer = _ask(name, self, other, keep=True)
        return _ask("bool", answer) is True

    return compare


def _arithmetic(name: str) -> Callable[[Remote, Any], Any]:
    def calculate(self: Remote, other: Any) -> Any:
        # With a plain operand the result stays remote: else `abs(x - 0.5) < eps` would believe the object's __sub__.
        return _ask(name, self, other, keep=not isinstance(other, Remote))

    return calculate


def _swapped_arithmetic(name: str) -> Callable[[Remote, Any], Any]:
    def calculate(self: Remote, other: Any) -> Any:
        return _checker_of(self).ask(name, other, self, keep=True)

    return calculate


# Python looks special methods up on the class, never by __getattr__.
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _comparison(_name))
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
):
    _method = f"__{_name}__"
    setattr(Remote, _method, _arithmetic(_method))
    setattr(Remote, f"__r{_name}__", _swapped_arithmetic(_method))


def _replace_content(target: Any, content: Any) -> None:
    """Give an argument of the tests the content that the candidate left in its copy."""
    if type(target) is not type(content) or target == content:
        return
    if isinstance(target, (list, bytearray)):
        target[:] = content
    elif isinstance(target, (dict, set)):
        target.clear()
        target.update(content)


def _names_in(code: types.CodeType) -> set[str]:
    """Return every name that the code and its functions look up (and the attributes among them)."""
    # Functions and classes are constants of the code around them.
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _describe(error: BaseException, source: str) -> str:
    """Return the error with the last line of the tests that it passed through."""
    # The innermost frame of the tests; beyond it are our own.
    number = 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            number = trace.tb_lineno
        trace = trace.tb_next
    # Empty where it is of no line, such as a SyntaxError.
    line = dict(enumerate(source.splitlines(), 1)).get(number, "").strip()
    return f"{type(error).__name__}: {str(error)[:TEXT]} (tests, line {number}: {line[:200]})"
