"""`ptl fetch` and `ptl compare` by what a user names, on the runs of a real MLflow and a real store."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import run_records
from conftest import free_port
from mlflow import MlflowClient
from mlflow.store.artifact import s3_artifact_repo
from typer.testing import CliRunner

from ptl.cli import arguments, results
from ptl.cli.app import app
from ptl.errors import InputError, WorkError
from ptl.lineage import locate, mlflow_client, mlflow_objects, tracking
from ptl.local import servers
from ptl.report.build import build
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.s3 import CREDENTIALS, SETTINGS
from ptl.storage.store import Pointer

STEPS = ("import-model", "recover-1", "recover-2", "control-recover")


def ptl(*arguments):
    """The output of a command that succeeds, as one line; its errors are raised."""
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def made(monkeypatch, tmp_path, *, root=None, experiment="e", done=True):
    """A run as the pipeline leaves it: checkpoints of some bytes, two evaluations, versions with aliases, a report."""
    run, name = f"run-{uuid.uuid4().hex[:8]}", f"tiny-{uuid.uuid4().hex[:6]}"
    monkeypatch.setenv("PTL_RUN_ID", run)
    pointers, ids = {}, {}

    def start(step, arm="loop"):
        started = tracking.start(experiment, step, arm=arm, iteration=0, artifact_location=root)
        ids[step] = started.run_id
        return started

    def publish(step, stage, files, started, params=0):
        folder = tmp_path / run / step
        folder.mkdir(parents=True)
        for path, data in files.items():
            (folder / path).write_bytes(data)
        model, location = "", f"{started.artifact_uri}/{step}"
        if stage != "evaluate":
            model, location = tracking.new_model(started, step, {"params": params}, {})
        pointer = Pointer(
            location, digest_of(store.publish(folder, location)), params, run_id=started.run_id, model_id=model
        )
        store.commit(started.root, run, step, store.Record("k", pointer, {"stage": stage}))
        tracking.finish(started, params={}, metrics={}, inputs=[], output=model or None, step=0)
        pointers[step] = pointer

    for i, step in enumerate(STEPS):
        weights = {"config.json": b"{}", "model.safetensors": os.urandom(5000 + i)}
        publish(step, "recover", weights, start(step), params=100 - i)
    for step, right in (("evaluate-0", 10), ("evaluate-2", 9)):
        publish(step, "evaluate", {"items.jsonl": items(right)}, start(step))
    if done:
        scored = start("evaluate-1")
        for step, alias in (("recover-1", "best"), ("recover-2", "smallest")):
            version = mlflow_objects.register(scored, name, pointers[step], {})
            mlflow_objects.set_alias(name, alias, version)
        result = build(run_records.records(), run_records.settings(), run_id=run).model_dump(mode="json")
        row = result["rows"][0] | {"accuracy": 0.9, "params": 98}
        rows = [
            row | {"arm": arm, "iteration": 0, "step": step, "digest": pointers[of].digest, "uri": pointers[of].uri}
            for arm, step, of in (
                ("loop", "evaluate-0", "import-model"),
                ("loop", "evaluate-2", "recover-2"),
                ("control", "control-evaluate", "control-recover"),
            )
        ]
        last = pointers["recover-2"]
        result |= {"rows": rows}
        result["final"] |= {"uri": last.uri, "digest": last.digest, "params": last.params}
        (tmp_path / run / "result.json").write_text(json.dumps(result))
        (tmp_path / run / "README.md").write_text("the card")
        report = start("report")
        tracking.log_report(report, [tmp_path / run / "result.json", tmp_path / run / "README.md"])
        tracking.finish(report, params={}, metrics={}, inputs=[], output=None, step=0)
    parent = report.parent_run_id if done else ""
    monkeypatch.delenv("PTL_RUN_ID")
    directory = tmp_path / run
    return SimpleNamespace(id=run, name=name, pointers=pointers, ids=ids, parent=parent, directory=directory)


def items(right):
    lines = [{"task": "t", "id": str(i), "prompt_digest": str(i), "correct": int(i < right)} for i in range(10)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module")
def database(new_database, tmp_path_factory):
    """A folder that serves as --home."""
    return new_database(tmp_path_factory.mktemp("home"))


@pytest.fixture
def here(database, monkeypatch, tmp_path):
    """A finished run in a database of local runs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}/mlflow.db")
    run = made(monkeypatch, tmp_path, root=f"file://{database}/artifacts")
    MlflowClient().update_run(run.parent, name=f"named-{run.id}")
    return run


def holds(folder, source):
    """Whether the folder holds the files of that checkpoint; what else is in it."""
    names = {path.name for path in folder.iterdir()}
    same = all((folder / name).read_bytes() == (source / name).read_bytes() for name in ("model.safetensors",))
    return same, sorted(names - {"config.json", "model.safetensors"})


@pytest.mark.parametrize(
    "what, step, card",
    [
        ("{id}", "recover-2", True),
        ("{parent}", "recover-2", True),
        ("{id}:recover-1", "recover-1", False),
        ("{id}:recover-2", "recover-2", True),
        ("named-{id}", "recover-2", True),
        ("named-{id}:recover-1", "recover-1", False),
        ("{parent}:recover-1", "recover-1", False),
        ("models:/{name}@best", "recover-1", False),
        ("models:/{name}@smallest", "recover-2", True),
        ("models:/{name}/1", "recover-1", False),
    ],
)
def test_fetch_by_name(here, tmp_path, what, step, card):
    said = ptl("fetch", what.format(**vars(here)), tmp_path / "out")
    assert holds(tmp_path / "out", here.directory / step) == (True, ["README.md"] if card else [])
    assert f"{here.pointers[step].params} parameters" in said and ("without a model card" in said) != card
    assert not (tmp_path / "out.partial").exists()


def test_fetch_by_address_and_arm(here, tmp_path, monkeypatch):
    ptl("fetch", here.id, tmp_path / "control", "--arm", "control")
    assert holds(tmp_path / "control", here.directory / "control-recover") == (True, [])
    ptl("fetch", here.directory, tmp_path / "directory")  # a run directory
    assert holds(tmp_path / "directory", here.directory / "recover-2") == (True, ["README.md"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # a folder of the store needs none
    ptl("fetch", here.pointers["recover-1"].uri, tmp_path / "uri")
    assert holds(tmp_path / "uri", here.directory / "recover-1") == (True, [])


def test_local_runs_are_found_by_home(here, database, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match="--home: no local runs in"):
        ptl("fetch", here.id, tmp_path / "out", "--home", tmp_path / "elsewhere")
    ptl("fetch", here.id, tmp_path / "out", "--home", database)
    assert holds(tmp_path / "out", here.directory / "recover-2")[0]


@pytest.mark.parametrize(
    "what, message",
    [
        ("nothing", r"'nothing' is neither a folder nor a run that this MLflow has"),
        ("0" * 32, "neither a folder nor a run"),
        ("no/folder", "'no/folder' is neither a folder nor the name of a run"),
        (
            "{id}:recover-9",
            r"no finished step 'recover-9' that makes a checkpoint; it has {id}:import-model",
        ),
        ("{id}:evaluate-0", "no finished step 'evaluate-0' that makes a checkpoint"),
        (
            "models:/{name}@newest",
            r"has no models:/{name}@newest; aliases of {name}: best, smallest",
        ),
        ("models:/{name}/7", "has no models:/{name}/7; aliases of {name}: best"),
        ("models:/unknown@best", "has no models:/unknown@best; aliases of unknown: none"),
        ("models:/{name}", "must be models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("file:///nowhere", "no checkpoint at file:///nowhere: it holds no ptl-files.json"),
        ("ftp://host/folder", "is neither file:// nor s3://"),
        ("{directory}/recover-1", "result.json is no result.json of a run .*; give a run's directory, RUN_ID"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(here, tmp_path, what, message):
    with pytest.raises(InputError, match=message.format(**vars(here))):
        ptl("fetch", what.format(**vars(here)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_version_of_others_is_refused(here, tmp_path):
    MlflowClient().delete_model_version_tag(here.name, "1", "ptl.digest")
    with pytest.raises(InputError, match=r"no tag ptl.digest, so ptl did not register it"):
        ptl("fetch", f"models:/{here.name}@best", tmp_path / "out")


def test_arm_is_checked(here, tmp_path):
    both = CliRunner().invoke(app, ["fetch", here.id, str(tmp_path / "out"), "--arm", "both"])
    assert both.exit_code == 2 and "'both' is not one of 'loop'" in both.output
    with pytest.raises(InputError, match=r"--arm: .* names one checkpoint"):
        ptl("fetch", f"models:/{here.name}@best", tmp_path / "out", "--arm", "control")
    result = json.loads((here.directory / "result.json").read_text())
    result["rows"].pop()
    (here.directory / "result.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match="has no scored control"):
        ptl("fetch", here.directory, tmp_path / "out", "--arm", "control")


def test_a_run_without_a_result_names_its_steps(database, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}/mlflow.db")
    run = made(monkeypatch, tmp_path, root=f"file://{database}/artifacts", done=False)
    monkeypatch.setenv("PTL_RUN_ID", run.id)
    failed = tracking.start("e", "recover-3", arm="loop", iteration=3)
    tracking.fail(failed, "out of memory")
    for command in (
        ("fetch", run.id, tmp_path / "out"),
        ("fetch", run.id, tmp_path / "out", "--report"),
        ("compare", run.id, run.id),
    ):
        with pytest.raises(InputError) as caught:
            ptl(*command)
        assert f"{run.id} has no result yet, its state is FAILED" in str(caught.value)
        assert f"{run.id}:recover-2" in str(caught.value) and "recover-3" not in str(caught.value)
    ptl("fetch", f"{run.id}:recover-2", tmp_path / "out")
    assert holds(tmp_path / "out", run.directory / "recover-2") == (True, [])


def test_only_an_empty_folder_is_written(here, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="full is a file or not empty"):
        ptl("fetch", here.id, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    ptl("fetch", here.id, tmp_path / "empty")
    assert holds(tmp_path / "empty", here.directory / "recover-2")[0]
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(InputError, match="is a mount point, which cannot be replaced; give a folder in it"):
        ptl("fetch", here.id, tmp_path / "out")


def test_a_damaged_checkpoint_leaves_nothing(here, tmp_path):
    from ptl.storage.local_files import path_of

    (path_of(here.pointers["recover-2"].uri) / "model.safetensors").write_bytes(b"other")
    with pytest.raises(WorkError, match=r"model.safetensors has 5 bytes"):
        ptl("fetch", here.id, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_failure_half_way_leaves_nothing(here, tmp_path, monkeypatch):
    def full(source, target, **_):
        Path(target).mkdir(exist_ok=True)
        Path(target, "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(WorkError, match="no space left"):
        ptl("fetch", here.id, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_kill_half_way_leaves_nothing_under_the_name(here, tmp_path):
    """kill -9 while the second file is copied; the same command again succeeds."""
    code = """
import shutil, sys, time
from pathlib import Path
from ptl.cli import results
from ptl.lineage import locate
def slow(source, target, **_):
    Path(target).mkdir(exist_ok=True)
    shutil.copyfile(Path(source, "config.json"), Path(target, "config.json"))
    print("half", flush=True)
    time.sleep(60)
shutil.copytree = slow
results._copy(locate.checkpoint(sys.argv[1]), Path(sys.argv[2]))
"""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, here.id, out], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "half\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not out.exists() and (tmp_path / "out.partial").exists()
    with arguments.writing(out), pytest.raises(InputError, match="another process executes it"):
        ptl("fetch", here.id, out)
    ptl("fetch", here.id, out)
    assert holds(out, here.directory / "recover-2")[0] and not (tmp_path / "out.partial").exists()


def test_report_from_a_run_a_directory_and_a_file(here, tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr("ptl.report.render.render", lambda result, out: pages.append((result.run_id, out)))
    monkeypatch.chdir(tmp_path)
    for source in (here.id, here.parent, here.directory, here.directory / "result.json"):
        assert "wrote pages/report.html" in ptl("fetch", source, "pages", "--report")
    assert pages == [(here.id, Path("pages"))] * 4
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(InputError, match=r"other.json is no result.json of a run"):
        ptl("fetch", "other.json", "pages", "--report")
    result = json.loads((here.directory / "result.json").read_text())
    del result["rows"][0]["scores"]
    (tmp_path / "other.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match=r"other.json is no result of a run, or another version's \(rows.0.scores"):
        ptl("fetch", "other.json", "pages", "--report")
    with pytest.raises(InputError, match="neither a folder nor a run"):
        ptl("fetch", "nothing", "pages", "--report")


def test_compare_by_name(here, tmp_path):
    files = [
        here.directory / "evaluate-0",
        f"{here.id}:evaluate-0",
        here.ids["evaluate-0"],
        f"{here.parent}:evaluate-0",
        f"{here.directory}:evaluate-0",
    ]
    last = [
        here.directory / "evaluate-2" / "items.jsonl",
        f"{here.id}:evaluate-2",
        here.id,
        here.parent,
        here.directory,
    ]
    for reference, candidate in zip(files, last, strict=True):
        assert "│ 100.0% │ 1 │ -10.0 │ 0.5 │ unclear │ │ 10 │ 90.0% │ 0 │ (-30.0 to" in ptl(
            "compare", reference, candidate
        )


def test_the_directory_of_a_run_leads_to_the_mlflow_of_its_home(here, tmp_path, monkeypatch):
    """As .ptl/latest does, from any working directory."""
    home = tmp_path / ".ptl"
    (home / "runs").mkdir(parents=True)
    shutil.copytree(here.directory, home / "runs" / here.id)
    (home / "latest").symlink_to(f"runs/{here.id}")
    database = os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
    shutil.copyfile(database, home / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert "unclear" in ptl("compare", f"{home}/latest:evaluate-0", home / "latest", "--home", tmp_path / "none")
    (home / "latest" / "result.json").unlink()
    (home / "latest" / "config.yaml").touch()  # all that a run without a result has
    ptl("fetch", f"{home}/latest:recover-1", tmp_path / "out", "--home", tmp_path / "none")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "what, message",
    [
        ("{id}:recover-1", r"no finished step 'recover-1' that evaluates; it has .*:evaluate-0, .*:evaluate-2"),
        ("{id}:evaluate-7", "no finished step 'evaluate-7' that evaluates"),
        ("nothing", "neither a folder nor a run"),
    ],
)
def test_compare_refuses_other_steps(here, what, message):
    with pytest.raises(InputError, match=message):
        ptl("compare", f"{here.id}:evaluate-0", what.format(**vars(here)))


def test_a_run_is_found_in_any_experiment(database, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}/mlflow.db")
    runs = [
        made(monkeypatch, tmp_path, root=f"file://{database}/{name}", experiment=name) for name in ("kfp", "another")
    ]
    for run in runs:
        assert run.parent in locate.find_run(run.id)[0].artifacts
        assert locate.checkpoint(run.id).pointer.digest == run.pointers["recover-2"].digest


def test_a_run_with_a_second_unfinished_parent_is_the_finished_one(here):
    """Begun with Kubeflow's MLflow plugin in its experiment, retried without it."""
    client = MlflowClient()
    other = client.create_experiment(f"plugin-{here.id}", "file:///nowhere")
    client.create_run(other, start_time=1, tags={"ptl.run": here.id, "ptl.role": "parent"})
    assert here.parent in locate.find_run(here.id)[0].artifacts


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A real S3 server and a real MLflow server: their folder and their environment."""
    root = tmp_path_factory.mktemp("stack")
    env = servers.up(root, s3_port=free_port(), mlflow_port=free_port())
    yield root, env
    servers.down(root)


@pytest.fixture
def cluster(running, monkeypatch, tmp_path):
    """A run whose checkpoints are on S3, seen from a laptop with both addresses and the keys in its environment."""
    for name in (*SETTINGS, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in running[1].items():
        monkeypatch.setenv(name, value)
    # MLflow keeps its S3 client and boto3 its session, whatever the keys in the environment become.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    yield made(monkeypatch, tmp_path, experiment="cluster")
    s3_artifact_repo._cached_get_s3_client.cache_clear()


def test_fetch_and_compare_from_a_laptop(cluster, tmp_path):
    assert cluster.pointers["recover-2"].uri.startswith("s3://")
    names = {cluster.id: "recover-2", cluster.parent: "recover-2", f"{cluster.id}:recover-1": "recover-1"}
    names |= {f"models:/{cluster.name}@best": "recover-1", f"models:/{cluster.name}/2": "recover-2"}
    names |= {cluster.pointers["recover-1"].uri: "recover-1"}
    for i, (what, step) in enumerate(names.items()):
        ptl("fetch", what, tmp_path / f"out-{i}")
        same, more = holds(tmp_path / f"out-{i}", cluster.directory / step)
        card = step == "recover-2"
        assert same and more == ["README.md"] * card, what
    ptl("fetch", cluster.id, tmp_path / "control", "--arm", "control")
    assert holds(tmp_path / "control", cluster.directory / "control-recover") == (True, [])
    assert "│ 100.0% │ 1 │ -10.0 │ 0.5 │ unclear │ │ 10 │ 90.0% │ 0 │ (-30.0 to" in ptl(
        "compare", f"{cluster.id}:evaluate-0", cluster.id
    )


def test_the_servers_of_ptl_up_are_reached_by_home(cluster, running, tmp_path, monkeypatch):
    for name in (*SETTINGS, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    ptl("fetch", cluster.id, tmp_path / "out", "--s3", "--home", running[0])
    assert holds(tmp_path / "out", cluster.directory / "recover-2")[0]


def test_wrong_credentials_are_named(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for what in (cluster.id, f"models:/{cluster.name}@best", cluster.pointers["recover-1"].uri):
        with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            ptl("fetch", what, tmp_path / "out")
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="environment: no S3 credentials"):
        ptl("fetch", cluster.id, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_mlflow_that_refuses_a_password_is_named(monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import UNAUTHENTICATED

    def refuse():
        raise MlflowException("failed with error code 401", error_code=UNAUTHENTICATED)

    monkeypatch.setattr(mlflow_client, "connect", refuse)
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_PASSWORD: MLflow at .*401.*; set them"):
        locate.find_run("run-1")


def test_an_mlflow_that_is_away_is_soon_said(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    with pytest.raises(WorkError, match="is the server up"):
        ptl("fetch", "run-1", tmp_path / "out")
    assert time.monotonic() - started < 10 and int(results.RETRIES) < int(mlflow_client.RETRIES)
