"""Errors that a user sees: what was wrong, in which field, what to do; each with the exit code of its command."""

from __future__ import annotations

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
