"""The scripts of examples/ci, with stubs of `ptl` and `docker`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / "examples/ci"
TINY = "pipelines/prune_tune_loop/configs/tiny.yaml"
SUBMIT = """#!/bin/sh
printf '%s\\n' "$*" https://kubeflow.example.com/run 'tiny (seed 0)' ' 4 (final) 127,872' 'MLflow: page' after
exit CODE
"""
STEPS_OF_A_RUN = """#!/bin/sh
echo "$*" >>"$PTL_HOME/log"
case "$1" in
up) echo "export MLFLOW_TRACKING_URI=http://127.0.0.1:9" ;;
run)
    mkdir -p "$PTL_HOME/latest" && echo page >"$PTL_HOME/latest/report.html"
    echo "$STEPS" >"$PTL_HOME/latest/result.json" ;;
compare) test "$MLFLOW_TRACKING_URI" = http://127.0.0.1:9 && exit "$VERDICT" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Run a script with this text in the place of `ptl`."""

    def run(ptl, script, *arguments, **variables):
        for name, text in (("ptl", ptl), ("docker", "#!/bin/sh\nexit 0\n")):
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = [CI / script, *map(str, arguments)]
        return subprocess.run(
            command, env=os.environ | {"PATH": path} | variables, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize(
    ("code", "word"), [(0, "done"), (1, "failed"), (3, "gate not passed"), (4, "still running")]
)
def test_a_run_is_waited_for_and_its_table_written(run, tmp_path, code, word):
    done = run(
        SUBMIT.replace("CODE", str(code)), "run.sh", TINY, tmp_path / "table.md", "--set", "seed=1"
    )
    assert done.returncode == code
    assert done.stdout.startswith(f"submit {TINY} --set seed=1 --wait --timeout 21000\n")
    result = ["```", "tiny (seed 0)", " 4 (final) 127,872", "MLflow: page", "```"]
    head = [f"**ptl tiny.yaml**: {word}", "https://kubeflow.example.com/run"]
    assert (tmp_path / "table.md").read_text().splitlines() == [*head, *result]


@pytest.mark.parametrize(
    ("decision", "verdict", "code"), [("accepted", 0, 0), ("gate off", 3, 3), ("rejected", 0, 3)]
)
def test_the_path_on_one_machine(run, tmp_path, decision, verdict, code):
    """The order of the commands, what is compared, and the exit code."""
    scored = [("baseline", "dense"), ("accepted", "first"), (decision, "last")][
        :: 2 if decision == "rejected" else 1
    ]
    steps = [{"stage": "prune", "decision": ""}]
    steps += [{"stage": "evaluate", "decision": said, "run_id": name} for said, name in scored]
    variables = {
        "PTL_HOME": str(tmp_path),
        "STEPS": json.dumps({"steps": steps}),
        "VERDICT": str(verdict),
    }
    done = run(
        STEPS_OF_A_RUN,
        "local_path.sh",
        TINY,
        "--set",
        "seed=1",
        PIP_FIND_LINKS=str(tmp_path),
        **variables,
    )
    assert done.returncode == code, done.stdout + done.stderr
    compared = [] if decision == "rejected" else ["compare dense last --margin 0.05"]
    assert (tmp_path / "log").read_text().splitlines() == [
        f"compile {TINY} -o {tmp_path}/pipeline.yaml --set seed=1",
        f"images build --cpu --base-image ptl-base:cpu --wheels {tmp_path}",
        f"up --home {tmp_path} --s3-port 8433 --mlflow-port 15000",
        f"run {TINY} --runner docker --s3 --new --home {tmp_path} --set seed=1",
        *compared,
        f"up --stop --home {tmp_path}",
    ]
    assert (f"report: {tmp_path}/latest/report.html" in done.stdout) == bool(compared)
    assert bool(compared) or "no iteration was accepted" in done.stderr
