"""Software with compiled parts, which an older system or another machine may not load."""

import sys

import pytest

from ptl import extras
from ptl.errors import InputError
from ptl.extras import AbsentError, UnusableError
from ptl.local import servers

GLIBC = "libc.so.6: version `GLIBC_2.38' not found (required by x)"


def program(path, script):
    path.write_text(script)
    path.chmod(0o755)
    return path


def check(*command, name="x"):
    extras.check_loads(name, [str(word) for word in command], field="export", remedy="take another")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"#!/bin/sh\necho '{GLIBC.replace(chr(39), chr(34))}' >&2; exit 1", 'version `GLIBC_2.38" not found'),
        ("#!/bin/sh\nkill -ILL $$", "killed by SIGILL"),  # a CPU without AVX2
        ("#!/bin/sh\nexit 3", "exit code 3"),
        ("not of this machine", "Exec format error"),
    ],
)
def test_the_reason_is_the_systems(script, reason, tmp_path):
    with pytest.raises(UnusableError) as caught:
        check(program(tmp_path / "program", script))
    said = str(caught.value)
    assert said.startswith("export: x cannot be loaded here (") and reason in said and said.endswith("; take another")
    assert not isinstance(caught.value, AbsentError)


def test_what_is_not_installed_is_distinguished():
    with pytest.raises(AbsentError, match="No module named 'no_such_module'"):
        check(sys.executable, "-c", "import no_such_module", name="no_such_module")
    # Installed, without what it needs itself.
    with pytest.raises(UnusableError) as raised:
        check(sys.executable, "-c", "import no_such_module", name="another")
    assert not isinstance(raised.value, AbsentError)


def test_the_reason_is_the_last_line_that_says_something(tmp_path):
    path = program(tmp_path / "program", "#!/bin/sh\necho broken\necho\nexit 3")
    with pytest.raises(UnusableError, match="broken"):
        check(path)


@pytest.mark.parametrize("code", [0, 1])
def test_it_is_tried_once(code, tmp_path):
    path = program(tmp_path / "program", f"#!/bin/sh\necho tried >> {tmp_path}/tries; exit {code}")
    for _ in range(2):
        if code:
            with pytest.raises(InputError):
                check(path)
        else:
            check(path)
    assert (tmp_path / "tries").read_text() == "tried\n"


def test_a_server_that_does_not_run_here_is_wrong_input(tmp_path, monkeypatch):
    program(tmp_path / "weed", f'#!/bin/sh\necho "{GLIBC}" >&2; exit 1')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UnusableError, match=r"^S3 server: SeaweedFS cannot be loaded here \(.*put a `weed` for this"):
        servers.s3_up(tmp_path, 14000)
    assert not (tmp_path / "s3").exists()
