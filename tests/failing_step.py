"""A step's process for tests of its attempts: a prune step that behaves as PTL_TEST_PLAN says, one word an attempt."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from working import execute

from ptl.errors import InputError, WorkError
from ptl.steps import process, table
from ptl.steps.step import Step


def work(call):
    folder = Path(os.environ["PTL_TEST_FOLDER"])
    number = len(list(folder.glob("attempt-*"))) + 1
    (folder / f"attempt-{number}").write_text(str(os.getpid()))
    plan = os.environ["PTL_TEST_PLAN"].split()
    what = plan[min(number, len(plan)) - 1]
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "cuda":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if what == "input":
        raise InputError("schedule.target: 7 must be below 1")
    if what == "import":
        import no_such_library  # noqa: F401
    if what == "work":
        raise WorkError("the store is away")
    if what == "no-space":
        Path("/dev/full").write_text("x")
    if what == "no-space-for-the-reason":
        Path(sys.argv[1]).with_name("failure.json").symlink_to("/dev/full")
        raise WorkError("the store is away")
    if what == "exit":
        os._exit(9)
    if "with-child" in what:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "grandchild").write_text(str(child.pid))
    if what == "crash-with-child":
        os.abort()
    if what.startswith("hangs"):
        (folder / "hangs").write_text("")
        time.sleep(600)
    return call


def simple(call):
    work(call)
    for output in call.outputs.values():
        output.path.write_text("done")
        output.metadata["digest"] = "sha256:1"


def stored(call):
    """The same inside of what every step does: claimed in the store and reported in MLflow."""

    def fill(_src, dst, _run):
        work(call)
        (dst / "model.safetensors").write_bytes(b"x")
        return {"params": 1}

    execute(call, call.inputs.get("model"), {}, fill)


Step.fetch = lambda step, pointer: None  # the inputs of these tests have no files
table.STEPS["prune"] = table.STEPS["export"] = stored if os.environ.get("PTL_TEST_STORE") else simple

if __name__ == "__main__":
    process.main(Path(sys.argv[1]), int(sys.argv[2]))
