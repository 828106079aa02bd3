"""The CI examples pass their linters, and their scripts do what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run_records
import yaml
from mock_kfp import MockKubeflow

from ptl.report.build import build

ROOT = Path(__file__).parents[1]
CI = ROOT / "examples" / "ci"
TINY = "pipelines/prune_tune_loop/configs/tiny.yaml"


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False, **options
    )


def tool(name):
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"NOT CHECKED: {name} is not installed here; `pip install '.[dev]'` brings it")
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("actionlint", *sorted(CI.glob("github/*.yml"))),
        ("zizmor", "--offline", *sorted(CI.glob("github/*.yml"))),
        ("shellcheck", *sorted(CI.glob("*.sh"))),
        ("yamllint", "--strict", "-c", ROOT / "manifests/.yamllint", CI),
    ],
    ids=lambda command: command[0],
)
def test_linters(command):
    done = run(tool(command[0]), *command[1:])
    assert done.returncode == 0, done.stdout + done.stderr


def test_gitlab_jobs_have_scripts_and_known_stages():
    told = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
    jobs = {name: told[name] for name in ("compile", "images", "run")}
    assert [job["stage"] for job in jobs.values()] == told["stages"]
    assert all(job["script"] for job in jobs.values())


@pytest.fixture
def environment(tmp_path):
    """`ptl` on the PATH: this checkout's commands."""
    tool = tmp_path / "bin" / "ptl"
    tool.parent.mkdir()
    code = (
        "from ptl.cli.app import app, main\nfrom ptl.cli import cluster\n"
        "'submit' in [c.name for c in app.registered_commands] or cli_cluster.add_to(app); main()"
    )
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_changed_compiled_pipeline_fails(environment):
    golden = ROOT / "tests/golden"
    done = run(CI / "compiled.sh", env=environment)
    assert done.returncode in (0, 1)
    assert (done.returncode == 1) == ("differs from" in done.stderr)
    assert all(f"{path.stem}.yaml" in done.stdout for path in golden.glob("*.yaml"))


@pytest.mark.parametrize(("verdict", "code"), [("accepted", 0), ("rejected", 3)])
@pytest.mark.slow
def test_a_run_is_waited_for_and_its_table_written(environment, new_database, tmp_path, verdict, code):
    from mlflow import MlflowClient

    world = MockKubeflow()
    try:
        uri = f"sqlite:///{new_database(tmp_path)}/mlflow.db"
        client = MlflowClient(uri)
        experiment = client.create_experiment("ptl", f"file://{tmp_path}/artifacts")
        parent = client.create_run(experiment, tags={"ptl.run": "run-0", "ptl.role": "parent"})
        written = build(run_records.records(), run_records.settings(), experiment_id="1").model_dump(mode="json")
        last = next(row for row in written["rows"] if row["iteration"] == 4)
        last["verdict"] = verdict
        result = tmp_path / "result.json"
        result.write_text(json.dumps(written))
        client.log_artifact(parent.info.run_id, str(result), "report")
        done = run(
            *(CI / "run.sh", TINY, tmp_path / "table.md", "--set", "gate.enabled=true", "--host", world.url),
            env={**environment, "MLFLOW_TRACKING_URI": uri},
        )
    finally:
        world.close()
    text = (tmp_path / "table.md").read_text()
    assert done.returncode == code, done.stdout + done.stderr
    assert re.search(rf"^ *4 \(final\) +127,872 .* {verdict} *$", text, re.MULTILINE)
    assert "one-shot pruning reached 90.0 %" in text and f"{world.url}/#/runs/details/run-0" in text
    assert text.splitlines()[-1] == "```" and text.splitlines()[-2].startswith("MLflow: ")


@pytest.mark.slow
def test_a_failed_run_says_so(environment, tmp_path):
    world = MockKubeflow()
    world.script = ["FAILED"]
    try:
        done = run(CI / "run.sh", TINY, tmp_path / "table.md", "--host", world.url, env=environment)
    finally:
        world.close()
    assert done.returncode == 1 and "failed" in (tmp_path / "table.md").read_text()


STUB = """#!/bin/sh
echo "$*" >>"$PTL_HOME/log"
case "$1" in
up) echo "export MLFLOW_TRACKING_URI=http://127.0.0.1:9" ;;
run)
    mkdir -p "$PTL_HOME/latest" && echo page >"$PTL_HOME/latest/report.html"
    echo "$STEPS" >"$PTL_HOME/latest/result.json" ;;
compare) test "$MLFLOW_TRACKING_URI" = http://127.0.0.1:9 && exit "$VERDICT" ;;
esac
"""


@pytest.mark.parametrize(("decision", "verdict", "code"), [("accepted", 0, 0), ("gate off", 1, 1), ("rejected", 0, 1)])
def test_the_path_on_one_machine(tmp_path, decision, verdict, code):
    """With stubs named ptl and docker: the order of the commands, what is compared, and the exit code."""
    for name, text in (("ptl", STUB), ("docker", "#!/bin/sh\nexit 0\n")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    scored = [("baseline", "dense"), ("accepted", "first"), (decision, "last")][:: 2 if decision == "rejected" else 1]
    steps = [{"stage": "prune", "decision": ""}]
    steps += [{"stage": "evaluate", "decision": said, "run_id": run} for said, run in scored]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PTL_HOME": str(tmp_path),
        "STEPS": json.dumps({"steps": steps}),
        "VERDICT": str(verdict),
        "PIP_FIND_LINKS": str(tmp_path),
    }
    done = run(CI / "local_path.sh", TINY, "--set", "seed=1", env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    called = (tmp_path / "log").read_text().splitlines()
    compared = [] if decision == "rejected" else ["compare dense last --margin 0.05"]
    assert called == [
        f"compile {TINY} -o {tmp_path}/pipeline.yaml --set seed=1",
        f"images build --cpu --base-image ptl-base:cpu --wheels {tmp_path}",
        f"up --home {tmp_path} --s3-port 8433 --mlflow-port 15000",
        f"run {TINY} --runner docker --s3 --new --home {tmp_path} --set seed=1",
        *compared,
        f"up --stop --home {tmp_path}",
    ]
    assert (f"report: {tmp_path}/latest/report.html" in done.stdout) == bool(compared)
    assert bool(compared) or "no iteration was accepted" in done.stderr
