"""Processes that are forked from one that has imported their libraries."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ptl import fork_server

TESTS = Path(__file__).parent
PROGRAM = """
import os, sys
print("module", sys.argv[0], "arguments", sys.argv[1:-1], "numbers" , "fractions" in sys.modules)
print("cwd", os.getcwd(), "variable", os.environ.get("PTL_TEST_VARIABLE"), file=sys.stderr)
assert int(sys.argv[-1]) == os.getppid() and os.getsid(0) == os.getpid()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write a module that a server's process can run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(TESTS.parent)]))

    def write(code):
        (tmp_path / "some_program.py").write_text(code)
        return "some_program"

    return write


def test_there_is_none_where_a_sockets_path_would_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 25)))
    with fork_server.serving(["fractions"]):
        assert fork_server.start("fractions") is None


def test_it_is_the_module_with_its_arguments_environment_folder_and_outputs(program, tmp_path, monkeypatch, capfd):
    name = program(PROGRAM)
    with fork_server.serving(["fractions"]):
        monkeypatch.setenv("PTL_TEST_VARIABLE", "set after the server was started")
        monkeypatch.chdir(tmp_path)
        codes = [fork_server.start(name, code).wait(60) for code in ("0", "7")]
    assert codes == [0, 7]
    printed = capfd.readouterr()
    assert printed.out.splitlines()[0] == f"module {tmp_path}/some_program.py arguments ['0'] numbers True"
    assert printed.err.splitlines()[0] == f"cwd {tmp_path} variable set after the server was started"
    assert fork_server.ADDRESS not in os.environ


def test_without_a_server_the_caller_starts_the_process_itself(program):
    assert fork_server.start(program("")) is None
    # One that cannot import what it should has ended.
    with fork_server.serving(["no_such_module"]):
        assert fork_server.start(program("")) is None


def test_beside_a_gpu_there_is_none(program, tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server, "GPU_DEVICES", (str(tmp_path),))
    with fork_server.serving([]):
        assert fork_server.start(program("")) is None


def test_how_a_process_ended_is_told_as_subprocess_tells_it(program):
    with fork_server.serving([]):
        process = fork_server.start(program("import time; time.sleep(600)"))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM == process.wait()


def test_processes_end_with_the_server_and_it_with_the_command(program, tmp_path):
    """Even where the command is killed and ends nothing itself."""
    program("import time; time.sleep(600)")
    command = """
import os, signal
from ptl import fork_server
with fork_server.serving([]):
    print(fork_server.start("some_program").pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while _runs(int(killed.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(killed.stdout))


def _runs(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
