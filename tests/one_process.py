"""The command line in this process, where a test replaces parts of it."""

import contextlib
import io
import re
import sys
from unittest import mock

from ptl.cli import app

DOING = re.compile(r"^.* \.\.\.\n", re.MULTILINE)


def ptl(*arguments):
    """Run a command: its exit code, and what it printed but for the lines of `ptl.log.doing`."""
    out = io.StringIO()
    argv = mock.patch.object(sys, "argv", ["ptl", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            app.main()
        except SystemExit as done:
            return done.code or 0, DOING.sub("", out.getvalue())
