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


def work():
    folder, plan = Path(os.environ["PTL_TEST_FOLDER"]), os.environ["PTL_TEST_PLAN"].split()
    number = len(list(folder.glob("attempt-*"))) + 1
    (folder / f"attempt-{number}").write_text(str(os.getpid()))
    what = plan[min(number, len(plan)) - 1]
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    # torch's, whose import takes seconds
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    errors = {
        "out-of-memory": out_of_memory(
            "CUDA out of memory. Tried to allocate 20 GiB.\nSee the documentation."
        ),
        "cuda": RuntimeError("CUDA error: an illegal memory access was encountered"),
        "input": InputError("schedule.target: 7 must be below 1"),
        "import": ModuleNotFoundError("No module named 'no_such_library'"),
        "work": WorkError("the store is away"),
    }
    if what in errors:
        raise errors[what]
    if what == "no-space":
        Path("/dev/full").write_text("x")
    if what == "exit":
        os._exit(9)
    if "with-child" in what:
        (folder / "grandchild").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    if what == "crash-with-child":
        os.abort()
    if what.startswith("hangs"):
        (folder / "hangs").touch()
        time.sleep(600)


def simple(call):
    work()
    call.outputs["out"].path.write_text("done")
    call.outputs["out"].metadata["digest"] = "sha256:1"


def stored(call):
    def fill(_src, dst, _run):
        work()
        (dst / "model.safetensors").write_bytes(b"x")
        return {"params": 1}

    execute(call, call.inputs.get("model"), {}, fill)


Step.fetch = lambda step, pointer: None  # the inputs of these tests have no files
table.STEPS["prune"] = table.STEPS["export"] = (
    stored if os.environ.get("PTL_TEST_STORE") else simple
)

if __name__ == "__main__":
    process.main(Path(sys.argv[1]), int(sys.argv[2]))
