"""Errors that a user sees: what was wrong, in which field, what to do; each with the exit code of its command."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ptl.address import without_login


class PtlError(Exception):
    """Something that ends a command with a message instead of a traceback.

    `field` is the setting, option or file that was wrong; `remedy` is what to do. The sentence is made here alone.
    """

    exit_code = 1

    def __init__(self, problem: str, *, field: str = "", remedy: str = "") -> None:
        # Libraries quote addresses with the password in them.
        self.problem = without_login(problem)
        self.field = without_login(field)
        self.remedy = without_login(remedy)
        # Without the parts that are empty.
        where = f"{self.field}: " if self.field else ""
        advice = f"; {self.remedy}" if self.remedy else ""
        super().__init__(f"{where}{self.problem}{advice}")


class InputError(PtlError):
    """The input was wrong and nothing expensive was started: give `field` and `remedy`."""

    exit_code = 2


class WorkError(PtlError):
    """The work itself failed."""


@contextmanager
def explained_imports() -> Iterator[None]:
    """Make an input error of a library that cannot be imported: in this environment every attempt would end so."""
    try:
        yield
    except ImportError as error:
        traceback.print_exc()
        raise InputError(
            f"{type(error).__name__}: {error}",
            field="packages",
            remedy="build the image again, or repair the environment that the step runs in",
        ) from error
