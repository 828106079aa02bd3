"""Submitting and following runs against a mock of the API server (tests/mock_kfp.py), with answers of a real one."""

import re
import subprocess

import compiled
import pytest
import run_records
import typer
import yaml
from checkout import ROOT, TINY
from mlflow import MlflowClient
from typer.testing import CliRunner

from pipelines.prune_tune_loop import descriptions, follow, kfp_api, pipeline, submit
from pipelines.prune_tune_loop.kfp_api import Server
from ptl.cli import cluster
from ptl.config.run import load_config
from ptl.errors import InputError, WorkError
from ptl.lineage import run_status
from ptl.report.build import build

CONFIG, GATED = load_config(TINY), load_config(TINY, {"gate.enabled": True})


@pytest.fixture(autouse=True)
def quick(world, monkeypatch):
    monkeypatch.setattr(pipeline, "compile_pipeline", compiled.write)


@pytest.fixture
def go(world, said):
    """Submit the tiny config, or another, and wait."""

    def start(other=None, server=None, **options):
        options = {"wait": True, "poll": 0.01, **options}
        return submit.submit(
            other or CONFIG, Server(host=world.url, **(server or {})), say=said.append, **options
        )

    return start


def test_a_run_is_compiled_uploaded_started_and_followed(world, said, go):
    world.script = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    assert go(given={"seed": 7}, server={"namespace": "team"}) == 0
    (pipeline,), (version,), (experiment,), (run,) = (
        world.pipelines,
        world.versions,
        world.experiments,
        world.runs,
    )
    assert (pipeline["display_name"], pipeline["namespace"]) == ("tiny", "team")
    assert yaml.safe_load(version["yaml"].split("\n---\n")[0])["pipelineInfo"]["name"] == "tiny"
    assert run["pipeline_version_reference"] == {
        "pipeline_id": "pipeline-0",
        "pipeline_version_id": "version-0",
    }
    assert (experiment["display_name"], experiment["namespace"]) == ("ptl", "team")
    assert run["runtime_config"]["parameters"] == {"seed": 7}
    assert f"{world.url}/#/runs/details/run-0" in said
    assert "import-model: SUCCEEDED" in said and len(world.calls("GET", "/runs/run-0")) == 4


def test_the_same_content_is_one_version_and_other_content_a_new_one(world, go):
    assert go(wait=False) == 0 and go(wait=False) == 0
    assert (
        len(world.pipelines) == len(world.versions) == len(world.experiments) == 1
        and len(world.runs) == 2
    )
    assert go(load_config(TINY, {"schedule.iterations": 3}), wait=False) == 0
    assert len(world.pipelines) == 1 and len(world.versions) == 2
    assert world.runs[2]["pipeline_version_reference"]["pipeline_version_id"] == "version-1"


def test_a_run_that_fails_or_is_canceled_and_one_that_never_ends(world, said, go, tracked):
    tracked(
        "run-0",
        {
            "import-model": {},
            "prune-1": {"status": "FAILED", "tags": {"error": "no data", "attempt": 3}},
        },
    )
    world.script = ["FAILED"]
    assert go() == 1 and "prune-1: FAILED (attempt 3): no data" in said
    assert "FAILED: prune-1: no data" in said[-1] and "`ptl retry run-0` resumes" in said[-1]
    world.script = ["RUNNING", "CANCELING", "FAILED"]
    assert go() == 1 and ": canceled; `ptl retry run-1`" in said[-1]
    world.script = ["RUNNING"]
    assert go(timeout=1) == 4
    assert "it continues" in said[-1] and len(world.calls("GET", "/runs/run-2")) > 3


@pytest.mark.parametrize(("verdict", "code"), [("accepted", 0), ("rejected", 3)])
def test_the_gate_decides_the_exit_code(
    world, said, go, tmp_path, tracked, monkeypatch, verdict, code
):
    run = tracked("run-0", {}, status="FINISHED")
    result = build(run_records.records(), run_records.settings(), **run_records.RUN)
    result.rows[4].verdict = verdict
    (tmp_path / "result.json").write_text(result.model_dump_json())
    MlflowClient().log_artifact(run, str(tmp_path / "result.json"), "report")
    assert go(GATED) == code and "4 (final)" in said[-2]  # the table
    assert f"iteration 4 {verdict}, 40.0% removed" in said[-1]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(
        WorkError, match=r"its result cannot be read: .*MLFLOW_TRACKING_URI is not set"
    ):
        go(GATED)


def test_a_server_that_is_away_for_a_while_does_not_end_the_wait(world, go, said, monkeypatch):
    world.script = ["RUNNING", "SUCCEEDED"]
    world.faults = [("GET", "/runs/run-0", 503, False)] * (kfp_api.REPEATS + 2)
    assert go() == 0
    assert [line for line in said if line.startswith("still waiting: ")] and world.faults == []
    world.faults = [("GET", "/runs/run-1", 503, False)] * 99
    assert go(timeout=0.0) == 4 and "not seen to finish" in said[-1] and "503" in said[-1]
    monkeypatch.setattr(follow, "OUTAGE", 0.0)
    world.faults = [("GET", "/runs/run-2", 503, False)] * 99
    with pytest.raises(WorkError, match="503"):
        go()


def test_a_token_is_of_the_environment_or_of_a_file_that_is_read_again(
    world, go, tmp_path, monkeypatch
):
    world.token = "right"
    with pytest.raises(InputError, match=r"401 .*; set KFP_TOKEN or --token-file"):
        go()
    monkeypatch.setenv("KFP_TOKEN", "right")
    assert go(wait=False) == 0 and world.requests[-1][2]["authorization"] == "Bearer right"
    monkeypatch.setenv("KFP_TOKEN", "expired")  # the option wins
    file = tmp_path / "token"
    file.write_text("right")
    assert go(wait=False, server={"token_file": file}) == 0
    world.token = "rotated"
    file.write_text("rotated")
    assert follow.status("run-0", Server(host=world.url, token_file=file)) == 0


def test_a_dead_server_is_one_short_line_without_a_password():
    with pytest.raises(
        WorkError,
        match=r"^Kubeflow Pipelines at http://\*{3}@127.0.0.1:9 does not answer: connection refused; is --host right",
    ) as error:
        submit.submit(CONFIG, Server(host="http://user:secret@127.0.0.1:9"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("requests", "number"),
    [
        (
            [
                ("GET", "/pipelines", 500, False),
                ("GET", "/runs/run-0", 503, False),
                ("POST", "upload", 502, True),
            ],
            1,
        ),
        ([("POST", "/runs", 500, True)], 1),  # it is looked for before it is started again
        ([("POST", "/runs", 500, False)], 2),
    ],
)
def test_requests_that_fail_once_never_start_two_runs(world, go, requests, number):
    world.faults = list(requests)
    assert go() == 0 and world.faults == []
    assert len(world.runs) == 1 and len(world.calls("POST", "/runs")) == number


def test_refusals_and_nonsense_start_no_run(world, go):
    for part, answer, error, message in (
        (
            "upload",
            "login page",
            WorkError,
            r"no pipeline_version_id\); the session may have expired: .*--token-file",
        ),
        # Recorded refusals become the server's own sentence.
        (
            "/runs",
            "post-run-unknown-parameter",
            InputError,
            r"400 parameter\(s\) .* not required by pipeline: nope$",
        ),
        (
            "/runs",
            "post-run-unknown-version",
            InputError,
            "PipelineVersion 0{8}-[0-]* not found; it was deleted",
        ),
    ):
        world.answers = [("POST", part, answer)] * (9 if error is WorkError else 1)
        with pytest.raises(error, match=message):
            go(wait=False)
        assert world.runs == []


def test_a_part_of_the_gate_can_be_a_parameter(world, go):
    """Those that are refused, before anything is asked, are in golden/commands.txt."""
    assert go(given={"gate": {"margin": 0.05}}) == 0
    assert world.runs[0]["runtime_config"]["parameters"] == {"gate": {"margin": 0.05}}


def test_pipeline_and_version_say_what_they_do_and_what_each_parameter_means(world, go):
    go()
    (pipeline,), (version,) = world.pipelines, world.versions
    text = version["description"]
    assert (
        pipeline["description"]
        == f"Each version has a description of its own. The first one:\n\n{text}"
    )
    assert text.startswith("Prune-Tune Loop: prune, recover and evaluate ")
    lines = re.findall(r"^- `(\w+)`", text, re.M)
    assert set(descriptions.PARAMETERS) < set(lines) and {"prune", "report"} < set(lines)
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert re.search(rf"commit {head.stdout.strip()}(-dirty)?\. More: `docs/ui.md`", text)


def test_the_description_names_the_run_in_mlflow_which_may_be_away(world, go, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9/base/")
    assert go(wait=False) == 0
    name = world.runs[0]["display_name"]
    link = "http://127.0.0.1:9/base/#/experiments?workflowType=machine_learning"
    assert world.runs[0]["description"] == f"MLflow: experiment ptl, run {name}: {link}"


def test_unfinished_runs_of_the_same_name_are_taken_over(world, go, said, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.com")
    monkeypatch.setattr(
        run_status, "unfinished", lambda name: ["new", "old"] if name == "tiny" else []
    )
    for options in ({}, {"fresh": True}, {"given": {"earlier_runs": "mine"}}):
        assert go(wait=False, **options) == 0
    named = [run["runtime_config"].get("parameters", {}).get("earlier_runs") for run in world.runs]
    assert named == ["new old", None, "mine"]
    assert (
        len([line for line in said if "may be taken over from new, old (--new: from none)" in line])
        == 1
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert go(wait=False) == 0 and any(
        "MLFLOW_TRACKING_URI, which would find them, is not set" in line for line in said
    )


def test_the_commands_pass_their_options_on(world, monkeypatch):
    app = typer.Typer()
    cluster.add_to(app)

    def invoke(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        return done.exit_code, done.output

    world.script = ["FAILED"]
    options = ["--host", world.url, "--wait", "--set", "schedule.iterations=2", "--param", "seed=3"]
    code, output = invoke("submit", TINY, *options)
    assert code == 1 and ": FAILED: see `kubectl" in output, output
    assert world.runs[0]["runtime_config"]["parameters"] == {"seed": 3}
    assert "prune-3" not in world.versions[0]["yaml"]
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", world.url)
    assert (
        invoke("status", "run-0")[0] == 1
        and invoke("status", "run-0", "--token-file", "none")[0] == 2
    )
    assert invoke("retry", "run-0", "--host", world.url)[0] == 0
    assert ": canceled" in invoke("cancel", "run-0", "--host", world.url)[1]


def test_the_proxy_of_the_environment_holds_for_what_is_not_here(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example.com")
    hosts = (
        "https://kfp.example.com/pipeline",
        "https://inside.example.com",
        "https://localhost:8888",
    )
    assert [kfp_api._proxy(host) for host in hosts] == ["http://proxy:3128", None, None]
