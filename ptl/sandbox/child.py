"""What a sandboxed child process runs: lock-down first, then the candidate's module and calls into it by messages.

Started by `ptl.sandbox.runner`; imports nothing but the standard library. There are two children: the *candidate*
process here knows neither the tests nor where their result goes; the *checker* process (`ptl.sandbox.checker`) executes
the tests.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from ptl.sandbox import lockdown
from ptl.sandbox.protocol import TEXT, Tagged, decode, encode, receive, send

SETUP_FAILED = 97  # exit code of a child that could not be locked down


def main() -> None:
    """Read the order from stdin, lock down, and become the candidate or the checker."""
    order = json.loads(sys.stdin.buffer.read())
    # Nothing of the parent stays: no input, no environment.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    # All imports need files that the lock-down takes away.
    # where they are linked to a shared library, its folder is out of reach later
    for module in ("zlib", "binascii"):
        with contextlib.suppress(ImportError):
            __import__(module)
    actor: Any = Candidate
    if order["role"] == "checker":
        from ptl.sandbox.checker import Checker

        actor = Checker
    try:
        # pathlib would cost 8 ms of start-up
        readable = [path for path in sys.path if os.access(path, os.F_OK)]
        lockdown.lock_down(readable, **order["limits"])
        if os.getppid() != order["parent"]:  # it died before PR_SET_PDEATHSIG was in force
            raise OSError("the parent has gone")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"sandbox set-up failed: {error}\n")
        sys.stderr.flush()
        os._exit(SETUP_FAILED)
    actor(*order["pipes"]).run(order["source"])


# Besides the functions of the module operator.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (getattr, setattr, iter, next, len, bool, repr, str, hash, isinstance)
}
_MUTABLE = (list, dict, set, bytearray)


class Candidate:
    """Executes the candidate's module, then the operations that the checker asks for. Nothing here is trusted."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming = incoming
        self.outgoing = outgoing
        self.objects: list[Any] = []  # by handle
        self.handles: dict[int, int] = {}  # id() of an object in `objects` -> its handle
        # id() of a callback -> its number there, and itself
        self.callbacks: dict[int, tuple[int, Any]] = {}

    def run(self, source: str) -> None:
        """Execute the module, send its names, and serve until the checker goes."""
        send(self.outgoing, ["locked"])
        module = types.ModuleType("candidate")
        # The candidate finds no module of the sandbox to patch, and itself under its name.
        for name in list(sys.modules):
            if name.split(".")[0] == "ptl":
                del sys.modules[name]
        sys.modules["candidate"] = module
        try:
            exec(compile(source, "<candidate>", "exec", dont_inherit=True), module.__dict__)
        except BaseException as error:
            send(self.outgoing, self.failure(error))
        else:
            send(self.outgoing, ["ok", self.exported(module), []])
        while True:
            try:
                message = receive(self.incoming)
            except EOFError:
                os._exit(0)  # the checker has finished
            self.answer(message)

    def exported(self, module: types.ModuleType) -> dict[str, Any]:
        """Return the data for every name of the module."""
        # A copy: asking a value for its class may run the candidate's code, which may change the module.
        names = list(vars(module).items())
        return {name: self.export(value) for name, value in names if not name.startswith("__")}

    def export(self, value: Any) -> Any:
        """Return the data for one name of the module."""
        if (
            isinstance(value, type)
            and issubclass(value, BaseException)
            and value.__module__ == "candidate"
        ):
            return {"t": "exception", "v": value.__name__, "b": _base_names(value)}
        try:
            return encode(value, self.refer)
        except (RecursionError, ValueError):  # such as a list that holds itself
            return self.refer(value)

    def refer(self, value: Any) -> Tagged:
        """Return the handle of an object that stays here; it is kept for ever, so that its id() stays its own."""
        key = id(value)
        if key in self.callbacks:
            return {"t": "local", "v": self.callbacks[key][0]}
        if key not in self.handles:
            self.handles[key] = len(self.objects)
            self.objects.append(value)
        return {"t": "handle", "v": self.handles[key], "c": callable(value)}

    def resolve(self, data: Tagged) -> Any:
        """Return the object of a handle, or a function that calls back into the tests."""
        number = data["v"]
        if data["t"] == "handle":
            return self.objects[number]

        def callback(*args: Any, **kwargs: Any) -> Any:
            content = [encode(list(args), self.refer), encode(kwargs, self.refer)]
            send(self.outgoing, ["callback", number, *content])
            return self.await_reply()

        # When it goes back it is the tests' own function again; kept for ever, as in `refer`.
        self.callbacks[id(callback)] = (number, callback)
        return callback

    def await_reply(self) -> Any:
        """Return what a function of the tests gave, serving meanwhile what it asks of the candidate."""
        while True:
            message = receive(self.incoming)
            if message[0] != "reply":
                self.answer(message)
                continue
            _, succeeded, *content = message
            if succeeded:
                return decode(content[0], self.resolve)
            kind, text = content
            raise RuntimeError(f"{kind}: {text}")

    def answer(self, message: Any) -> None:
        """Do one operation that the checker asked for."""
        try:
            _, name, encoded_args, encoded_keywords, keep = message
            args = decode(encoded_args, self.resolve)
            keywords = decode(encoded_keywords, self.resolve)
            operation = _OPERATIONS.get(name) or getattr(operator, name)
            value = operation(*args, **keywords)
            result = self.refer(value) if keep else encode(value, self.refer)
            send(self.outgoing, ["ok", result, self.changes(args, encoded_args)])
        except (EOFError, BrokenPipeError):
            os._exit(0)  # the checker has finished
        except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
            send(self.outgoing, self.failure(error))

    def changes(self, args: list[Any], encoded_before: list[Any]) -> list[Any]:
        """Return index and content of the arguments that the candidate changed in place."""
        changes = []
        for index, (arg, before) in enumerate(zip(args, encoded_before, strict=True)):
            content = encode(arg, self.refer) if type(arg) in _MUTABLE else before
            if content != before:
                changes.append([index, content])
        return changes

    def failure(self, error: BaseException) -> list[Any]:
        """Return the message that reports an exception."""
        # The candidate's exception may raise another where it is asked for its text.
        try:
            args = [arg if isinstance(arg, (str, int)) else repr(arg) for arg in error.args]
            text = str(error)[:TEXT]
        except Exception:
            args = []
            text = "(its text cannot be read)"
        return ["raise", _base_names(type(error)), args, text]


def _base_names(kind: type[BaseException]) -> list[str]:
    """Names of a class and its bases, in the order in which Python looks them up."""
    return [base.__name__ for base in kind.__mro__]
