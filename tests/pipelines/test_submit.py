"""Submitting and following runs against a mock of the API server (tests/mock_kfp.py), with answers of a real one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import run_records
import yaml
from mlflow import MlflowClient
from mock_kfp import ADDED

from pipelines.prune_tune_loop import follow, kfp_api, submit
from pipelines.prune_tune_loop.kfp_api import Server
from ptl.config.run import load_config
from ptl.errors import InputError, WorkError
from ptl.lineage import run_status
from ptl.report.build import build

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(kfp_api, "PAUSE", 0.01)
    for name in ("KF_PIPELINES_ENDPOINT", "KFP_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH", "KFP_NAMESPACE", "KFP_CA_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KUBECONFIG", "none")


@pytest.fixture(scope="module")
def config():
    return load_config(TINY)


@pytest.fixture
def go(world, said, config):
    """Submit the tiny config and wait."""

    def start(**options):
        options = {"wait": True, "poll": 0.01, **options}
        return submit.submit(config, Server(host=world.url), say=said.append, **options)

    return start


def test_a_run_is_compiled_uploaded_started_and_followed(world, said, go):
    world.script = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    assert go(parameters={"seed": 7}) == 0
    (pipeline,), (version,), (run,) = world.pipelines, world.versions, world.runs
    assert pipeline["display_name"] == "tiny"
    assert yaml.safe_load(version["yaml"].split("\n---\n")[0])["pipelineInfo"]["name"] == "tiny"
    assert run["pipeline_version_reference"] == {"pipeline_id": "pipeline-0", "pipeline_version_id": "version-0"}
    assert run["experiment_id"] == "experiment-0" and world.experiments[0]["display_name"] == "ptl"
    assert run["runtime_config"]["parameters"] == {"seed": 7}
    assert f"{world.url}/#/runs/details/run-0" in said
    assert "import-model: SUCCEEDED" in said and len(world.calls("GET", "/runs/run-0")) == 4


@pytest.mark.slow
def test_the_same_content_is_one_version_and_other_content_a_new_one(world, go, said, config):
    assert go(wait=False) == 0 and go(wait=False) == 0
    assert len(world.pipelines) == len(world.versions) == len(world.experiments) == 1 and len(world.runs) == 2
    other = load_config(TINY, {"schedule.iterations": 3})
    assert submit.submit(other, Server(host=world.url), say=said.append) == 0
    assert len(world.pipelines) == 1 and len(world.versions) == 2
    assert world.runs[2]["pipeline_version_reference"]["pipeline_version_id"] == "version-1"


def test_a_failed_run_names_its_step_and_the_remedy(world, said, go, tracked):
    tracked("run-0", {"import-model": {}, "prune-1": {"status": "FAILED", "tags": {"error": "no data"}}})
    world.script = ["FAILED"]
    assert go() == 1
    assert "prune-1: FAILED: no data" in said
    assert "FAILED: prune-1: no data" in said[-1] and "`ptl retry run-0` resumes" in said[-1]


def test_a_run_that_is_canceled_ends_the_wait(world, said, go):
    world.script = ["RUNNING", "CANCELING", "FAILED"]
    assert go() == 1
    assert ": canceled; `ptl retry run-0`" in said[-1]


def test_a_run_that_never_ends_is_a_timeout(world, said, go):
    world.script = ["RUNNING"]
    assert go(timeout=1.5) == 4
    assert "it continues" in said[-1] and len(world.calls("GET", "/runs/run-0")) > 3


def test_401_says_that_the_token_is_wrong(world, go, config, tmp_path, monkeypatch):
    world.token = "right"
    with pytest.raises(InputError, match=r"401 .*; set KFP_TOKEN or --token-file"):
        go()
    monkeypatch.setenv("KFP_TOKEN", "right")
    assert submit.submit(config, Server(host=world.url), say=print) == 0
    monkeypatch.delenv("KFP_TOKEN")
    file = tmp_path / "token"
    file.write_text("right")
    assert submit.submit(config, Server(host=world.url, token_file=file), say=print) == 0
    world.token = "rotated"
    file.write_text("rotated")
    assert follow.status("run-0", Server(host=world.url, token_file=file)) == 0


def test_the_token_of_the_environment_is_used(world, config, monkeypatch):
    world.token = "right"
    monkeypatch.setenv("KFP_TOKEN", "right")
    assert submit.submit(config, Server(host=world.url), say=print) == 0
    assert world.requests[0][2]["authorization"] == "Bearer right"


def test_403_names_the_rights(world, go):
    world.faults = [("POST", "/runs", 403, False)]
    with pytest.raises(InputError, match=r"403 .*.*rbac\.yaml"):
        go()
    assert world.runs == []


def test_404_says_what_to_check(world):
    with pytest.raises(InputError, match=r"404 .*; check the id"):
        follow.status("run-9", Server(host=world.url))


def test_500_then_ok(world, go):
    world.faults = [
        ("GET", "/pipelines", 500, False),
        ("GET", "/runs/run-0", 503, False),
        ("POST", "upload", 502, False),
    ]
    assert go() == 0
    assert world.faults == [] and len(world.runs) == 1


@pytest.mark.parametrize("took_effect", [True, False])
def test_500_when_starting_never_starts_two_runs(world, go, took_effect):
    world.faults = [("POST", "/runs", 500, took_effect)]
    assert go() == 0
    assert len(world.runs) == 1 and len(world.calls("POST", "/runs")) == (1 if took_effect else 2)


@pytest.mark.slow
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


def test_500_for_good_is_a_failure_of_the_work(world, go):
    world.faults = [("GET", "/pipelines", 500, False)] * 9
    with pytest.raises(WorkError, match=r"500 .*is it healthy"):
        go()


def test_no_server_and_no_address(config):
    for host in ("", "kubeflow"):
        with pytest.raises(InputError, match=r"--host: .* must begin with https.*; give the address"):
            submit.submit(config, Server(host=host))


def test_a_dead_server_is_one_short_line_at_once(config, monkeypatch):
    monkeypatch.setattr(kfp_api, "PAUSE", 60.0)  # no request is repeated
    for start in (
        lambda server: submit.submit(config, server),
        *(lambda server, command=command: command("run-0", server) for command in (follow.status, follow.cancel)),
    ):
        with pytest.raises(WorkError) as error:
            start(Server(host="http://127.0.0.1:9"))
        said = "Failed to establish a new connection: [Errno 111] Connection refused; is --host right, and is it up?"
        assert str(error.value) == f"Kubeflow Pipelines at http://127.0.0.1:9: {said}"


def test_a_password_in_the_hosts_address_is_in_no_error(config):
    with pytest.raises(WorkError) as error:
        submit.submit(config, Server(host="http://user:secret@127.0.0.1:9"))
    assert "127.0.0.1:9: Failed to establish" in str(error.value) and "secret" not in str(error.value)


def test_the_namespace_goes_with_every_request_that_has_one(world, config):
    assert submit.submit(config, Server(host=world.url, namespace="team"), say=print) == 0
    assert world.pipelines[0]["namespace"] == world.experiments[0]["namespace"] == "team"


def test_an_unknown_parameter_is_refused_before_anything_is_sent(world, go):
    with pytest.raises(InputError, match="--param: sead is no parameter"):
        go(parameters={"sead": 1})
    assert world.requests == []


@pytest.mark.parametrize(("verdict", "code"), [("accepted", 0), ("rejected", 3), ("stopped", 3)])
def test_the_gate_decides_the_exit_code(world, said, tmp_path, tracked, verdict, code):
    run = tracked("run-0", {}, status="FINISHED")
    result = build(run_records.records(), run_records.settings(), **run_records.RUN)
    result.rows[4].verdict = verdict
    (tmp_path / "result.json").write_text(result.model_dump_json())
    MlflowClient().log_artifact(run, str(tmp_path / "result.json"), "report")
    gated = load_config(TINY, {"gate.enabled": True})
    done = submit.submit(gated, Server(host=world.url), wait=True, poll=0.01, say=said.append)
    assert done == code and f"iteration 4 {verdict}, 40.0% removed" in said[-1]


def test_a_gate_parameter_cannot_change_the_structure(world, go, config):
    with pytest.raises(InputError, match=r"--param gate: enabled is True there .* --set gate\.enabled=true"):
        go(parameters={"gate": {"enabled": True}})
    gated = load_config(TINY, {"gate.enabled": True})
    with pytest.raises(InputError, match=r"enabled is False there \(or by default\) and True in the config"):
        submit.submit(gated, Server(host=world.url), parameters={"gate": {"margin": 0.05}}, say=print)
    with pytest.raises(InputError, match=r"--param gate: wrong values\s+margin: 7"):
        go(parameters={"gate": {"margin": 7}})
    assert world.requests == []
    assert go(parameters={"gate": {"margin": 0.05}}) == 0
    assert world.runs[0]["runtime_config"]["parameters"] == {"gate": {"margin": 0.05}}


def test_a_gate_that_cannot_be_read_is_an_error(world):
    gated = load_config(TINY, {"gate.enabled": True})
    with pytest.raises(WorkError, match=r"its result cannot be read: .*MLFLOW_TRACKING_URI is not set"):
        submit.submit(gated, Server(host=world.url), wait=True, poll=0.01, say=print)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ("post-run-unknown-parameter", InputError, r"400 parameter\(s\) provided are not required by pipeline: nope$"),
        ("post-run-wrong-type", InputError, "400 input parameter target requires type double or integer"),
        ("post-run-no-experiment", InputError, r"404 .*; check the id.*\(Experiment 0{8}-[0-]* not found\)"),
        ("post-run-unknown-version", InputError, "PipelineVersion 0{8}-[0-]* not found; it was deleted"),
        ("upload-invalid", InputError, "400 unknown template format$"),
    ],
)
def test_recorded_refusals_become_the_servers_own_sentence(world, go, answer, error, message):
    world.answers = [("POST", "upload" if "upload" in answer else "/runs", answer)]
    with pytest.raises(error, match=message):
        go(wait=False)
    assert world.answers == [] and world.runs == []


def test_a_recorded_success_and_a_recorded_version_that_exists(world, go, said):
    world.answers = [("POST", "/runs", "post-run-created")]
    assert go(wait=False) == 0
    assert "(0f0e39ab-5417-415d-8814-cb90182dbb90)" in said[0]
    world.answers = [("POST", "upload", "upload-duplicate-version")]
    assert go(wait=False) == 0 and world.answers == [] and len(world.versions) == 1


@pytest.mark.parametrize("fault", ["cut answer", "hang"])
@pytest.mark.slow
def test_added_faults_of_any_request_are_tried_again(world, go, fault, monkeypatch):
    """Not recorded: what a broken connection makes of an answer."""
    monkeypatch.setattr(kfp_api, "READ_TIMEOUT", 0.3)
    requests = (("POST", "upload"), ("POST", "/runs"), ("GET", "/runs/"))
    world.answers = [(method, part, fault) for method, part in requests]
    assert go() == 0
    assert world.answers == [] and len(world.runs) == 1


def test_added_faults_for_good_say_that_the_session_may_have_expired(world, go):
    world.answers = [("POST", "upload", "login page")] * 9
    with pytest.raises(
        WorkError, match=r"it has no pipeline_version_id\); the session may have expired: .*--token-file"
    ):
        go()
    world.answers = [("POST", "/runs", "empty object")] * 9
    with pytest.raises(WorkError, match=r"it has no run_id\); the session may have expired"):
        go()


@pytest.mark.parametrize("fault", sorted(ADDED))
@pytest.mark.slow
def test_a_wait_ends_where_the_server_answers_nonsense(world, go, said, monkeypatch, fault):
    monkeypatch.setattr(kfp_api, "READ_TIMEOUT", 0.1)
    world.answers = [("GET", "/runs/", fault)] * 99
    assert go(timeout=0.3) == 4 and "not seen to finish" in said[-1]
    assert len([line for line in said if line.startswith("still waiting: ")]) <= 2
    monkeypatch.setattr(follow, "OUTAGE", 0.0)
    with pytest.raises(WorkError):
        go()


@pytest.mark.parametrize(
    "field", [{"state": "LOGGED_OUT"}, {"state": {"a": 1}}, {"created_at": 5}], ids=["state", "kind-of-state", "time"]
)
def test_a_run_of_another_kind_is_not_waited_for(world, go, monkeypatch, field):
    body = json.dumps({"run_id": "run-0", "state": "RUNNING"} | field).encode()
    monkeypatch.setitem(ADDED, "made up", body)
    monkeypatch.setattr(follow, "OUTAGE", 0.0)
    world.answers = [("GET", "/runs/", "made up")] * 99
    with pytest.raises(WorkError, match=r"is not one of the API's"):
        go()


@pytest.mark.slow
def test_the_description_names_the_run_in_mlflow(world, go, monkeypatch):
    assert go(wait=False) == 0 and "description" not in world.runs[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow.example.com/base/")
    monkeypatch.setattr(run_status, "unfinished", lambda *_: [])
    assert go(wait=False, parameters={"experiment": "new"}) == 0
    page = "http://mlflow.example.com/base"
    assert world.runs[1]["description"] == f"MLflow: experiment new, run {world.runs[1]['display_name']}: {page}"
    monkeypatch.setenv("PTL_MLFLOW_UI", "https://mlflow.example.org/")
    assert go(wait=False) == 0 and world.runs[2]["description"].endswith(": https://mlflow.example.org")


def test_unfinished_runs_of_the_same_name_are_taken_over(world, go, said, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.com")
    monkeypatch.setattr(run_status, "unfinished", lambda *named: ["new", "old"] if named == ("ptl", "tiny") else [])
    assert go(wait=False) == go(wait=False, fresh=True) == go(wait=False, parameters={"earlier_runs": "mine"}) == 0
    assert go(wait=False, parameters={"experiment": "there is none"}) == 0
    named = [run["runtime_config"].get("parameters", {}).get("earlier_runs") for run in world.runs]
    assert named == ["new old", None, "mine", None]
    assert [line for line in said if "taken over from" in line] == [
        "steps with the same inputs and settings may be taken over from new, old (--new: from none)"
    ]


def test_a_mlflow_that_is_away_does_not_hinder_a_start(world, go, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert go(wait=False) == 0
    assert world.runs[0]["description"].startswith("MLflow: experiment ptl")


def test_a_path_of_this_machine_is_a_warning(world, tmp_path, monkeypatch):
    import shutil

    import typer
    from typer.testing import CliRunner

    from ptl.cli import cluster

    app = typer.Typer()
    cluster.add_to(app)
    own = shutil.copytree(ROOT / "examples/tiny_reasoner/checkpoint", tmp_path / "model")
    monkeypatch.chdir(ROOT)
    command = ["submit", str(TINY), "--host", world.url]
    assert "warning" not in CliRunner().invoke(app, command).output
    shown = CliRunner().invoke(app, [*command, "--set", f"model.path={own}"]).output
    assert f"warning: {own} is on this machine" in shown and shown.count("warning") == 1


def test_compiling_does_not_import_the_client():
    code = (
        "import sys, pipelines.prune_tune_loop.pipeline as p; from ptl.config.run import load_config;"
        f"p.build(load_config({str(TINY)!r}));"
        "sys.exit('pipelines.prune_tune_loop.submit' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_commands_pass_their_options_on(world, monkeypatch):
    import typer
    from typer.testing import CliRunner

    from ptl.cli import cluster

    app = typer.Typer()
    cluster.add_to(app)
    runner = CliRunner()
    world.script = ["FAILED"]
    started = [
        "submit",
        str(TINY),
        "--host",
        world.url,
        "--wait",
        "--set",
        "schedule.iterations=2",
        "--param",
        "seed=3",
    ]
    done = runner.invoke(app, started)
    assert done.exit_code == 1 and ": FAILED: see `kubectl" in done.output, done.output
    assert world.runs[0]["runtime_config"]["parameters"] == {"seed": 3}
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", world.url)
    assert runner.invoke(app, ["status", "run-0"]).exit_code == 1
    assert runner.invoke(app, ["status", "run-0", "--token-file", "none"]).exit_code == 2
    assert runner.invoke(app, ["retry", "run-0", "--host", world.url]).exit_code == 0
    assert ": canceled" in runner.invoke(app, ["cancel", "run-0", "--host", world.url]).output
