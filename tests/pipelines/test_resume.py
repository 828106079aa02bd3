"""`ptl run` that is killed, and resumed: over real S3 and MLflow servers that fail, and after files have changed."""

import gzip
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from checkout import EXAMPLE
from conftest import free_port
from kfp.local import subprocess_task_handler
from mlflow import MlflowClient
from typer.testing import CliRunner
from whole_run import MLFLOW_DOWN, S3_DOWN, Run, Servers

from pipelines.prune_tune_loop import runners
from ptl.cli.app import app
from ptl.export.compressed_tensors import PYTHON
from ptl.local import runs, servers
from ptl.storage import store

STEPS = ["import-model", "evaluate-0", "prune-1", "recover-1", "evaluate-1"]
FAILED, ADDED = "export-compressed-tensors-fp8", "export-compressed-tensors-int8"
# In place of a Python with llmcompressor: it fails while there is a file `broken` beside it, else copies float weights
# and says that they are quantized.
LLMCOMPRESSOR = """#!{python}
import json, pathlib, shutil, sys
if sys.argv[2] == "-c":
    sys.exit()
if pathlib.Path(__file__).with_name("broken").exists():
    sys.exit("no such scheme")
src, dst = map(pathlib.Path, sys.argv[4:6])
shutil.copytree(src, dst)
config = json.loads((src / "config.json").read_text())
config["quantization_config"] = {{"quant_method": "compressed-tensors"}}
(dst / "config.json").write_text(json.dumps(config))
(dst / "recipe.yaml").touch()
"""

pytestmark = pytest.mark.xdist_group("loop")  # whose worker has a server of forks


def write_problem(config, folder, **more):
    """Write a config of one short iteration, and the data files that it reads; returns its path."""
    rows = (
        gzip.decompress((EXAMPLE / "train.jsonl.gz").read_bytes())
        .decode()
        .splitlines(keepends=True)
    )
    (folder / "train.jsonl").write_text("".join(rows[:500]))
    (folder / "other.jsonl").write_text("".join(rows[500:1000]))
    shutil.copy(EXAMPLE / "test.jsonl", folder)
    task = (EXAMPLE / "tiny_reasoner.yaml").read_text()
    (folder / "task.yaml").write_text(
        task.replace("examples/tiny_reasoner/test.jsonl", f"{folder}/test.jsonl")
    )
    raw = yaml.safe_load(config.read_text()) | more
    raw["schedule"] |= {"iterations": 1, "recovery_tokens": 12_000}
    raw["training"]["sources"][0]["source"] = "train.jsonl"
    raw["training"]["decontaminate"] = {"tasks": False}
    raw["evaluate"]["tasks"][0] |= {"name": "task.yaml", "limit": 8}
    raw["evaluate"]["speed"]["repeats"] = 0
    (folder / "short.yaml").write_text(yaml.safe_dump(raw))
    return folder / "short.yaml"


# ---- servers that fail, and a kill


@pytest.fixture(scope="module")
def runs_and_servers(config, weed, new_database, tmp_path_factory):
    """The same command twice: `ptl run` is killed (kill -9) in recover-1, and then is not; and the servers.

    Before, in prune-1, the S3 server is killed and restarted; in recover-1 of the second the MLflow server is away.
    """
    home = tmp_path_factory.mktemp("home")
    path = write_problem(config, tmp_path_factory.mktemp("killed"))
    new_database(servers.folder(home))
    with Servers(home, free_port(), free_port()) as up:
        first = Run(path, home, "--s3", on={"prune-1: started": up.restart_s3})
        first.wait_for(
            lambda: [*home.glob("runs/*/scratch/recover-1/training-*/checkpoint-*/ptl-complete")]
        )
        first.kill()
        yield first, Run(path, home, "--s3", on={"recover-1: started": up.pause_mlflow}).end(), up


def test_a_killed_run_is_resumed_and_ends_the_same(runs_and_servers, commands, monkeypatch):
    """Finished steps stay, training resumes from its checkpoint, and all bytes are those of an undisturbed run."""
    killed, resumed, up = runs_and_servers
    assert resumed.folder == killed.folder and "continuing run" in resumed.output
    for step in STEPS:
        assert (f"{step}: done before" in resumed.output) == (
            step in ("import-model", "evaluate-0", "prune-1")
        )
    for name, value in up.env.items():
        monkeypatch.setenv(name, value)
    location = runs.artifact_location("ptl")
    assert location.startswith(f"s3://{servers.BUCKET}/")
    found = {step: store.committed(f"{location}/ptl", resumed.folder.name, step) for step in STEPS}
    assert found["recover-1"].metadata["resumed_at"] >= 2
    for step in ("import-model", "prune-1", "recover-1"):
        assert found[step].pointer.digest == commands[0].records[step]["pointer"]["digest"], step


def test_servers_that_are_away_are_waited_for_and_nothing_is_lost(runs_and_servers):
    killed, resumed, up = runs_and_servers
    assert killed.at("prune-1: done") - killed.at("prune-1: started") > S3_DOWN
    assert resumed.at("recover-1: done") - resumed.at("recover-1: started") > MLFLOW_DOWN
    client = MlflowClient(up.env["MLFLOW_TRACKING_URI"])
    (experiment,) = (found for found in client.search_experiments() if found.name == "ptl")
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`ptl.run` = '{resumed.folder.name}'"
    )
    by_step = {run.data.tags.get("ptl.step", "parent"): run for run in found}
    assert set(by_step) == {"parent", "report", *STEPS}
    assert {run.info.status for run in by_step.values()} == {"FINISHED"}
    assert len(client.get_metric_history(by_step["recover-1"].info.run_id, "train/loss")) >= 6


def test_no_secret_is_written_into_the_run(runs_and_servers):
    _, resumed, up = runs_and_servers
    secret = up.env["AWS_SECRET_ACCESS_KEY"].encode()
    written = [path for path in resumed.folder.rglob("*") if path.is_file()]
    assert {"pipeline.yaml", "log.txt", "result.json"} <= {path.name for path in written}
    assert not [path for path in written if secret in path.read_bytes()]


# ---- files and configs that change


def edit(path, change):
    raw = yaml.safe_load(path.read_text())
    change(raw)
    path.write_text(yaml.safe_dump(raw))


def killed_in_evaluate_1(run_task):
    """What runs a task, but this one is killed."""

    def run(full_command, env_vars=None):
        return (
            137
            if '"step": "evaluate-1"' in " ".join(full_command)
            else run_task(full_command, env_vars)
        )

    return run


@pytest.fixture(scope="module")
def commands(config, tmp_path_factory, new_database):
    """The same command four times: its error, what it printed, and what it left. Between any two something changes.

    The first two are killed in evaluate-1.
    """
    folder = tmp_path_factory.mktemp("problem")
    path = write_problem(config, folder, export=[{"format": "compressed-tensors", "type": "fp8"}])
    home, train, benchmark, python = (
        folder / name for name in ("home", "train.jsonl", "test.jsonl", "python")
    )
    python.write_text(LLMCOMPRESSOR.format(python=sys.executable))
    python.chmod(0o755)
    (folder / "broken").touch()
    done = []
    home.mkdir()
    new_database(home)

    def run():
        # which the command changes, for its steps
        with mock.patch.dict(os.environ, {PYTHON: str(python)}):
            for name in ("MLFLOW_TRACKING_URI", "PTL_ARTIFACT_ROOT"):
                os.environ.pop(name, None)
            # in this process, which saves imports
            ran = CliRunner().invoke(app, ["run", str(path), "--home", str(home)])
        latest = (home / "latest").resolve()
        manifests = (home / f"artifacts/ptl/{latest.name}").glob("*/manifest.json")
        found = {manifest.parent.name: json.loads(manifest.read_text()) for manifest in manifests}
        result = (
            json.loads((latest / "result.json").read_text())
            if (latest / "result.json").exists()
            else {}
        )
        about = {"run": latest.name, "error": ran.exception, "output": ran.output}
        done.append(SimpleNamespace(**about, records=found, result=result))

    with pytest.MonkeyPatch.context() as kill:
        # The one that forks, and KFP's own, which is used beside a GPU
        for module, name in (
            (runners, "_run_forked"),
            (subprocess_task_handler, "run_local_subprocess"),
        ):
            kill.setattr(module, name, killed_in_evaluate_1(getattr(module, name)))
        run()
        # Other questions under the same ids
        benchmark.write_text("".join(reversed(benchmark.read_text().splitlines(keepends=True))))
        train.write_bytes((folder / "other.jsonl").read_bytes())
        run()
    edit(path, lambda raw: raw["gate"].update(margin=0.5))
    os.utime(train, (2, 2))  # the same bytes
    run()
    (folder / "broken").unlink()
    edit(
        path,
        lambda raw: raw["export"].append(
            {"format": "compressed-tensors", "type": "int8", "limit": 4}
        ),
    )
    run()
    return done


def digests(command):
    return {
        step: command.records[step]["pointer"]["digest"]
        for step in ("evaluate-0", "prune-1", "recover-1")
    }


def test_a_changed_file_repeats_what_read_it(commands):
    first, second = commands[:2]
    assert (
        "evaluate-1" in str(first.error)
        and "evaluate-1" in str(second.error)
        and first.run == second.run
    )
    for step, file in {"evaluate-0": "test.jsonl", "recover-1": "train.jsonl"}.items():
        assert re.search(
            rf"{step}: \S+/{file} has changed since it was done: it is done again", second.output
        )
        assert digests(first)[step] != digests(second)[step]
    assert "import-model: done before" in second.output and "prune-1: done before" in second.output
    assert digests(first)["prune-1"] == digests(second)["prune-1"]


def test_a_corrected_config_is_a_run_of_its_own_and_takes_over_what_it_does_not_affect(commands):
    second, corrected = commands[1:3]
    assert corrected.run != second.run
    for step in digests(second):
        assert f"{step}: taken over from run {second.run}" in corrected.output
    assert digests(corrected)["recover-1"] == digests(second)["recover-1"]
    assert corrected.result["examples"]["compared"] == 8


def test_an_export_that_failed_is_made_by_a_later_command_and_another_is_added(commands):
    """The report is written without it, but not all was made that the config asks for. The run keeps its records."""
    failing, again = commands[2:]
    assert failing.error.exit_code == 1
    assert f"{FAILED}: export: llmcompressor ended with 1: no such scheme\n" in str(failing.error)
    assert [export["failed"] != "" for export in failing.result["exports"]] == [True]
    assert "report" in failing.records and FAILED not in failing.records

    assert (
        again.error is None
        and again.run == failing.run
        and "evaluate-1: done before" in again.output
    )
    assert again.records.keys() == {*failing.records, FAILED, ADDED}
    kept = failing.records.keys() - {"report"}
    assert {step: again.records[step] for step in kept} == {
        step: failing.records[step] for step in kept
    }
    fp8, int8 = again.result["exports"]
    assert (fp8["failed"], int8["failed"]) == ("", "")
    assert [task["items"] for task in int8["models"]["final"]["tasks"]] == [4]
    pairs = int8["pairs"]["tiny_reasoner"]
    assert {name: pair["items"] for name, pair in pairs.items()} == {
        "final": 4,
        "dense_export": 4,
        "dense": 4,
    }
