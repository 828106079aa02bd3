"""Software with compiled parts, which an older system or another machine may not load."""

import sys

import pytest

from ptl import extras
from ptl.extras import AbsentError, UnusableError

GLIBC = "libc.so.6: version `GLIBC_2.38' not found (required by x)"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            f'#!/bin/sh\necho "{GLIBC.replace("`", "")}" >&2; echo; exit 1',
            "version GLIBC_2.38' not found",
        ),
        ("#!/bin/sh\nkill -ILL $$", "killed by SIGILL"),  # a CPU without AVX2
        ("#!/bin/sh\nexit 3", "exit code 3"),
        ("not of this machine", "Exec format error"),
    ],
)
def test_the_reason_is_the_systems(script, reason, tmp_path):
    program = tmp_path / "program"
    program.write_text(script)
    program.chmod(0o755)
    with pytest.raises(UnusableError) as caught:
        extras.check_loads("x", [str(program)], field="export", remedy="take another")
    message = str(caught.value)
    assert message.startswith("export: x cannot be loaded here (") and reason in message
    assert message.endswith("; take another") and not isinstance(caught.value, AbsentError)


def test_what_is_not_installed_is_distinguished():
    # which lacks what it needs itself
    for name, absent in (("no_such_module", True), ("another", False)):
        with pytest.raises(UnusableError) as caught:
            extras.check_loads(
                name, [sys.executable, "-c", "import no_such_module"], field="x", remedy="y"
            )
        assert isinstance(caught.value, AbsentError) == absent
