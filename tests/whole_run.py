"""Starting `ptl run` as a user does, and reading what it leaves in a local store."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHAIN = ["import-model", "evaluate-0"] + [f"{stage}-{i}" for i in (1, 2) for stage in ("prune", "recover", "evaluate")]


def start(config, home, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "ptl", "run", str(config), "--home", str(home), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def records(home):
    found = (home / "artifacts").glob("ptl/*/*/manifest.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def digests(records):
    """Of the checkpoints of the loop, by step."""
    return {step: records[step]["pointer"]["digest"] for step in CHAIN if "evaluate" not in step}
