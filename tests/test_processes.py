"""Work that one process does at a time, and processes that end together; in every case a real process is killed."""

import os
import subprocess
import sys
import time

import pytest
from checkout import ROOT

from ptl import processes
from ptl.errors import InputError


def python(code, *arguments, **more):
    command = [sys.executable, "-c", f"from ptl import processes\n{code}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **more)


def gone(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while processes.start_time(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


HOLDS = """
import sys, time, pathlib
with processes.exclusive(pathlib.Path(sys.argv[1]), "step x"):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_is_free_when_that_was_killed(tmp_path):
    lock = tmp_path / "lock"
    holder = python(HOLDS, lock)
    assert holder.stdout.readline() == "holds\n"
    refusal = pytest.raises(
        InputError, match=rf"step y: another process executes it \(process id {holder.pid}\)"
    )
    with refusal, processes.exclusive(lock, "step y"):
        raise AssertionError("two at once")
    holder.kill()
    with processes.exclusive(lock, "step y", wait=10):
        assert lock.read_text().split()[0] == str(os.getpid())
    holder.communicate()
    # An id of another container is not one to kill here.
    with processes.exclusive(lock, "step x"):
        lock.write_text("7 pid:[4026530000]")
        refusal = pytest.raises(
            InputError, match=r"in another container, or .*remove its container"
        )
        with refusal, processes.exclusive(lock, "step x"):
            raise AssertionError("two at once")


FOLLOWS = "import time; processes.follow_lifeline(); print('follows', flush=True); time.sleep(60)"
LEADS = """
import os, pathlib, signal, subprocess, sys, time
path = pathlib.Path(sys.argv[1])
with processes.lifeline(path):
    # as KFP's runner: a shell between the two
    code = "from ptl import processes\\n" + sys.argv[2]
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, code]
    subprocess.Popen(command, env={**os.environ, processes.LIFELINE: str(path)}, stdout=sys.stdout)
    time.sleep(60)
"""


def test_a_lifeline_ends_what_a_killed_command_has_started(tmp_path):
    code = FOLLOWS.replace("'follows'", "__import__('os').getpid()")
    leader = python(LEADS, tmp_path / "lifeline", code)
    follower = int(leader.stdout.readline())
    assert processes.start_time(follower)
    leader.kill()
    leader.wait()
    assert gone(follower)
    leader.communicate()


TIES = """
import subprocess, sys, time
inner = "import os, time; from ptl import processes; processes.die_with_tied(); print(os.getpid(), flush=True)"
inner += "; time.sleep(60)"
outer = f"import subprocess, sys, os; print(os.getpid(), flush=True); subprocess.run([sys.executable, '-c', {inner!r}])"
subprocess.Popen(processes.tied([sys.executable, "-c", outer]), stdout=sys.stdout)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_launcher_and_its_workers_die_with_the_step_that_was_killed():
    step = python(TIES)
    launcher, worker = int(step.stdout.readline()), int(step.stdout.readline())
    assert processes.start_time(launcher) and processes.start_time(worker)
    step.kill()
    step.wait()
    assert gone(launcher) and gone(worker)
    step.communicate()
