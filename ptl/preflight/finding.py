"""One finding of the doctor, and how a check becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ptl.address import without_login
from ptl.errors import InputError, PtlError


class DoubtError(InputError):
    """A run may work nevertheless, or it could not be checked: a warning."""


@dataclass(frozen=True)
class Finding:
    """What a check says."""

    subject: str  # for example MLflow
    state: Literal["ok", "warning", "error"]
    message: str
    remedy: str = ""  # empty where all is well

    def __str__(self) -> str:
        line = f"{self.state:7} {self.subject}: {self.message}"
        if self.remedy:
            line += f"\n        -> {self.remedy}"
        return without_login(line)


def as_finding(subject: str, check: Callable[..., str], *arguments: Any) -> Finding:
    """What a check says where all is well; an explained error that it raises is a finding too."""
    try:
        return Finding(subject, "ok", check(*arguments))
    except PtlError as error:  # whose sentence ends with the remedy, which is shown on a line of its own
        message = f"{error.field}: {error.problem}" if error.field else error.problem
        state: Literal["warning", "error"] = "warning" if isinstance(error, DoubtError) else "error"
        return Finding(subject, state, message, error.remedy or "see the message")
