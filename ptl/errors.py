"""Errors that a user sees, each with the exit code of the command that raised it."""

from ptl.address import without_login


class PtlError(Exception):
    """Something that ends a command with a message instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(without_login(message))  # libraries quote addresses with the password in them


class InputError(PtlError):
    """The input was wrong and nothing expensive was started: names the field, the value and the remedy."""

    exit_code = 2


class WorkError(PtlError):
    """The work itself failed."""

    exit_code = 1
