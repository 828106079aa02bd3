"""One finding of the doctor, and how a check becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptl.address import without_login
from ptl.errors import PtlError


@dataclass(frozen=True)
class Line:
    """One finding; `remedy` is empty where all is well."""

    what: str
    state: str  # ok, warning, error
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n        -> {self.remedy}" if self.remedy else ""
        return without_login(f"{self.state:7} {self.what}: {self.message}{remedy}")


def guard(what: str, check: Callable[[], Line]) -> Line:
    """A check that raises an explained error is a line too."""
    try:
        return check()
    except PtlError as error:
        message, _, remedy = str(error).rpartition("; ")
        return Line(what, "error", message or remedy, remedy if message else "see the message")
