"""Starting `ptl run` as a user does, in a process of its own, and reading what it leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from checkout import ROOT

from ptl.local import servers

CHAIN = ["import-model", "evaluate-0"] + [
    f"{stage}-{i}" for i in (1, 2) for stage in ("prune", "recover", "evaluate")
]
S3_DOWN, MLFLOW_DOWN = 3, 6  # seconds


def start(config, home, *arguments, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "ptl", "run", str(config), "--home", str(home), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


class Servers:
    """The stack of one home while the block runs, and what tests do to it."""

    def __init__(self, home, s3_port, mlflow_port):
        self.home, self.ports = home, {"s3_port": s3_port, "mlflow_port": mlflow_port}

    def __enter__(self):
        self.env = servers.up(self.home, **self.ports)
        return self

    def __exit__(self, *_):
        servers.down(self.home)

    def restart_s3(self):
        os.kill(
            json.loads((self.home / "stack" / "s3.service.json").read_text())["pid"], signal.SIGKILL
        )
        time.sleep(S3_DOWN)
        servers.s3_up(self.home, self.ports["s3_port"])

    def pause_mlflow(self):
        servers.stop(self.home, "mlflow")
        time.sleep(MLFLOW_DOWN)
        servers.up(self.home, **self.ports)


class Run:
    """A `ptl run` whose lines of progress are read as they come; `on` is called at those that begin with its keys."""

    def __init__(self, config, home, *arguments, on=None, **variables):
        self.process = start(config, home, *arguments, **variables)
        self.on, self.lines, self.home = on or {}, [], home
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        acts = []
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))
            for beginning in filter(line.startswith, self.on):
                acts.append(threading.Thread(target=self.on[beginning]))
                acts[-1].start()
        for act in acts:
            act.join()

    def wait_for(self, is_so):
        deadline = time.monotonic() + 300
        while not is_so():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def kill(self):
        """kill -9 of the command alone: what it has started must end by itself."""
        self.process.send_signal(signal.SIGKILL)
        self.end(-signal.SIGKILL)

    def end(self, code=0):
        assert self.process.wait(900) == code, self.output
        self.reader.join()
        return self

    @property
    def output(self):
        return "\n".join(line for _, line in self.lines)

    @property
    def folder(self):
        return Path(
            next(line for _, line in self.lines if " run " in line and " in /" in line).rpartition(
                " in "
            )[2]
        )

    def at(self, beginning):
        """When the first line came that begins like this."""
        return next(at for at, line in self.lines if line.startswith(beginning))


def records(home):
    return {
        path.parent.name: json.loads(path.read_text())
        for path in home.glob("artifacts/ptl/*/*/manifest.json")
    }


def digests(records):
    """Of the checkpoints of the loop, by step."""
    return {step: records[step]["pointer"]["digest"] for step in CHAIN if "evaluate" not in step}
